"""Packages that bring task classes, apps and boot steps of their own run unchanged."""

import os
import subprocess
import sys

import pytest
from support.waiting import until
from support.worker import APPS

# As the packages themselves say.
needs_311 = pytest.mark.skipif(sys.version_info < (3, 11), reason="the package needs Python 3.11")


@needs_311
def test_django_structlog_logs_every_turn_of_a_task(alike):
    def logged(stage):
        worker = stage.worker(app="structlog_app", concurrency=2)
        for name in ("add", "fail", "parent_of"):
            until(stage.send(name, *((1, 2) if name == "add" else ())).ready, stage.logs)
        stage.wait_journal("structlog", log_event="task_succeeded", count=3)
        stage.send("nobody.knows.it")
        stage.wait_journal("structlog", log_event="task_not_found")
        stage.send("add", 1, 1, expires=-1)
        stage.wait_journal("structlog", log_event="task_revoked", log_expired=True)
        busy = stage.send("sleep", 30)
        stage.wait_journal("structlog", log_event="task_started", log_task="sleep")
        stage.app.control.revoke(busy.id, terminate=True)
        stage.wait_journal("structlog", log_event="task_revoked", log_terminated=True)
        skip = ("pid", "time", "log_duration_ms", "log_routing_key", "log_parent_task_id")

        def shown(line):
            return {key: value for key, value in line.items() if key not in skip} | {
                "in the parent": line["pid"] == worker.pid,
                "has a parent": "log_parent_task_id" in line,
            }

        return sorted(
            (shown(line) for line in stage.journal("structlog")),
            key=lambda line: sorted(line.items(), key=str).__repr__(),
        )

    seen = alike(logged)
    events = [line["log_event"] for line in seen]
    assert {name: events.count(name) for name in sorted(set(events))} == {
        # Its Django app and its boot step each have a receiver.
        "task_enqueued": 2,
        "task_failed": 1,
        "task_not_found": 1,
        "task_revoked": 2,
        "task_started": 5,
        "task_succeeded": 3,
    }
    assert any(line["has a parent"] for line in seen if line["log_event"] == "task_started")


@pytest.mark.parametrize(("package", "second"), [("once", "AlreadyQueued"), ("singleton", "same")])
def test_a_task_that_may_wait_once_only_is_locked_until_it_has_run(alike, package, second):
    def locked(stage):
        stage.worker(app="locks_app")
        seen = {}
        for name in ("one", "failing"):
            first, then = stage.send("twice", f"{package}.{name}").get(timeout=30)
            result = stage.app.AsyncResult(first)
            until(result.ready, stage.logs)
            until(lambda: not locks(stage), lambda: f"the lock to go: {locks(stage)}\n{stage.logs()}")
            seen[name] = [then, result.state]
        if package == "once":
            seen["early"] = stage.send("once.early", 1).get(timeout=30)
        return seen

    def locks(stage):
        return [key for prefix in ("qo_*", "SINGLETONLOCK_*") for key in stage.redis().keys(prefix)]

    seen = alike(locked)
    assert seen["one"] == [second, "SUCCESS"]
    assert seen["failing"] == [second, "FAILURE"]


@needs_311
def test_tenant_schemas_celery_switches_the_schema_around_each_task(alike):
    def switched(stage):
        stage.worker(app="tenant_app")

        def ask(name, schema=None):
            return stage.send(name, headers={"_schema_name": schema} if schema else None)

        here = [ask("schema_here", schema).get(timeout=30) for schema in ("north", None, "south")]
        schema, child = ask("schema_of_child", "east").get(timeout=30)
        failed = ask("fail_here", "west")
        until(failed.ready, stage.logs)
        return {
            "here": here,
            "sender and sent": [schema, stage.app.AsyncResult(child).get(timeout=30)],
            "failed": str(failed.result),
            "after the failure": ask("schema_here").get(timeout=30),
            "kinds": ask("kinds").get(timeout=30),
            "switches": [line["to"] for line in stage.journal("schema")],
            "looked up": [line["schema"] for line in stage.journal("tenant.looked_up")],
        }

    seen = alike(switched)
    assert seen["here"] == ["north", "public", "south"]
    assert seen["sender and sent"] == ["east", "east"]
    assert seen["failed"] == "west"
    assert seen["after the failure"] == "public"
    assert seen["kinds"][0] == "TenantTaskRegistry"


@pytest.fixture(scope="module")
def celery_batches(tmp_path_factory):
    """celery-batches with the newest Celery that it allows, in a folder of their own."""
    folder = tmp_path_factory.mktemp("celery-batches")
    packages = ["celery-batches==0.11", "celery==5.6.3"]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--target", str(folder), *packages], capture_output=True, text=True, timeout=300)
    if done.returncode:
        if "No matching distribution" in done.stderr and os.environ.get("CI") != "true":
            pytest.skip(f"the package index cannot be reached: {packages} are not tested")
        pytest.fail(done.stderr)
    return {"PYTHONPATH": f"{folder}{os.pathsep}{APPS}"}


def test_celery_batches_collects_runs_and_acknowledges(alike, celery_batches):
    def batched(stage):
        worker = stage.worker(
            app="batches_app", env=celery_batches, concurrency=2, conf={"worker_prefetch_multiplier": 0}
        )
        version = stage.send("versions").get(timeout=30)
        four = [stage.send("total", number, 1) for number in range(4)]
        sums = [result.get(timeout=30) for result in four]
        # Fewer than a batch: its timer flushes them.
        two = [stage.send("total", number, 1) for number in (8, 9)]
        sums += [result.get(timeout=30) for result in two]
        held = [stage.send("late", number) for number in range(3)]
        stage.wait_journal("batch", count=3)
        unacked = len(stage.unacked())
        late = [result.get(timeout=30) for result in held]
        failing = [stage.send("late", number, kwargs={"fail": number == 11}) for number in (10, 11, 12)]
        worker.wait_log("in a batch")
        stage.wait_empty()
        # One alone waits for its batch: it is the broker's again when the worker stops.
        stage.send("late", 20)
        until(stage.unacked, stage.logs)
        status = worker.stop()
        return {
            "version": version,
            "sums": sums,
            "late": late,
            "unacked while it ran": unacked,
            "states": [result.state for result in failing],
            "batches": [[line["numbers"], len(line["ids"]), line["about"]] for line in stage.journal("batch")],
            "in children": {line["pid"] != worker.pid for line in stage.journal("batch")},
            "left": [status, stage.depth(), len(stage.unacked())],
        }

    seen = alike(batched)
    assert seen["version"].startswith("5.6.")
    assert [numbers for numbers, *_ in seen["batches"]] == [[0, 1, 2, 3], [8, 9], [0, 1, 2], [10, 11, 12]]
    assert seen["unacked while it ran"] == 3
    assert seen["in children"] == {True}
    assert seen["left"] == [0, 1, 0]
