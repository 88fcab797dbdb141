"""Packages that hook into a worker, and recipes that people paste, run unchanged."""

import json
import os
import sqlite3
import subprocess
import sys
from datetime import datetime

import pytest
from support.lines import plain
from support.waiting import until
from support.worker import APPS


def without(line, *keys):
    return {key: value for key, value in line.items() if key not in ("pid", "time", *keys)}


def test_sentry_gets_transactions_and_errors(alike):
    def watched(stage):
        worker = stage.worker(app="sentry_app")
        stage.send("add", 1, 2).get(timeout=30)
        failed = stage.send("fail")
        until(failed.ready, stage.logs)
        stage.send("parent_of").get(timeout=30)
        stage.wait_journal("sentry.transaction", count=4)
        worker.stop()
        transactions = sorted(
            (
                line["transaction"],
                line["op"],
                line["status"],
                # Results that go through the supervisor need no Redis client in the child.
                tuple(span for span in line["spans"] if span != "db.redis"),
            )
            for line in stage.journal("sentry.transaction")
        )
        traces = {line["trace"] for line in stage.journal("sentry.transaction") if line["transaction"] != "fail"}
        return {
            "transactions": transactions,
            "errors": [(line["errors"], line["task"]) for line in stage.journal("sentry.event")],
            "traces": len(traces),
        }

    seen = alike(watched)
    assert [name for name, *_ in seen["transactions"]] == ["add", "add", "fail", "parent_of"]
    assert {op for _, op, *_ in seen["transactions"]} == {"queue.task.celery"}
    assert seen["errors"] == [(["ValueError"], "fail")]
    assert seen["traces"] == 2, "a task and what it called share a trace"


@pytest.mark.ours
@pytest.mark.parametrize("most", [1, 2, 5, 1000])
def test_opentelemetry_loses_no_span_at_any_number_of_tasks_per_child(stage_on, kind, most):
    """Children of the original leave without running exit handlers, and what was batched is lost."""
    stage = stage_on(kind)
    worker = stage.worker(f"--max-tasks-per-child={most}", app="otel_app", concurrency=2)
    sent = [stage.send("add", number, number) for number in range(18)]
    failed = stage.send("fail")
    parent = stage.send("parent_of")
    for result in [*sent, failed, parent]:
        until(result.ready, stage.logs)
    stage.wait_empty()
    assert worker.stop() == 0
    spans = stage.journal("span", kind="CONSUMER")
    assert {span["id"] for span in spans} >= {result.id for result in [*sent, failed, parent]}
    assert len(spans) == 21
    assert [span["status"] for span in spans if span["task"] == "fail"] == ["ERROR"]
    assert len(stage.journal("span", kind="PRODUCER")) == 1
    (of_parent,) = [span["trace"] for span in spans if span["task"] == "parent_of"]
    assert of_parent in [span["trace"] for span in spans if span["task"] == "add"]


@pytest.mark.ours
def test_sentry_tells_interleaved_coroutines_apart(stage_on, kind):
    stage = stage_on(kind)
    worker = stage.worker(app="sentry_app")
    # The later they begin the sooner they end.
    sent = [stage.send("interleaved", number, (20 - number) / 20) for number in range(20)]
    for result in sent:
        until(result.ready, stage.logs)
    stage.wait_journal("sentry.transaction", count=20)
    stage.wait_journal("sentry.event", count=10)
    assert worker.stop() == 0
    transactions = {line["tags"]["number"]: line for line in stage.journal("sentry.transaction")}
    assert len(transactions) == 20
    assert len({line["trace"] for line in transactions.values()}) == 20
    for number, result in enumerate(sent):
        line = transactions[str(number)]
        assert line["status"] == ("internal_error" if number % 2 else "ok")
        assert line["inner"] == [{"name": result.id, "trace": line["trace"], "parent": line["process"][0]}]
        assert seconds_between(line["began"], line["ended"]) >= (20 - number) / 20
    assert {line["task"] for line in stage.journal("sentry.event")} == {"interleaved"}
    assert sorted(int(line["tags"]["number"]) for line in stage.journal("sentry.event")) == list(range(1, 20, 2))


def seconds_between(began, ended):
    began, ended = (datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ") for text in (began, ended))
    return (ended - began).total_seconds()


@pytest.mark.ours
def test_opentelemetry_tells_interleaved_coroutines_apart(stage_on, kind):
    stage = stage_on(kind)
    worker = stage.worker(app="otel_app")
    sent = [stage.send("interleaved", number, (20 - number) / 20) for number in range(20)]
    children = [result.get(timeout=60) for result in sent]
    for child in children:
        until(stage.app.AsyncResult(child).ready, stage.logs)
    assert worker.stop() == 0
    runs = {span["id"]: span for span in stage.journal("span", kind="CONSUMER")}
    inner = {span["name"]: span for span in stage.journal("span", kind="INTERNAL")}
    assert len({runs[result.id]["trace"] for result in sent}) == 20
    for number, (result, child) in enumerate(zip(sent, children, strict=True)):
        run = runs[result.id]
        assert run["took"] >= (20 - number) / 20
        assert (inner[result.id]["trace"], inner[result.id]["parent"]) == (run["trace"], run["span"])
        assert runs[child]["trace"] == run["trace"]
    assert "Failed to detach" not in worker.log


def test_a_liveness_probe_beats_while_tasks_run_and_its_files_go_at_the_end(alike):
    def probed(stage):
        worker = stage.worker(app="probe_app", env={"PROBE_FOLDER": str(stage.folder)})
        until(lambda: (stage.folder / "ready").exists(), "ready")
        busy = stage.send("sleep", 1.0)
        seen = len(stage.wait_journal("step.beat"))
        stage.wait_journal("step.beat", count=seen + 3)
        busy.get(timeout=30)
        status = worker.stop()
        return {
            "status": status,
            "start": [without(line) for line in stage.journal("step.start")],
            "in the supervisor": {line["pid"] == worker.pid for line in stage.journal() if "step" in line["event"]},
            "stop": len(stage.journal("step.stop")),
            "left": sorted(path.name for path in stage.folder.iterdir() if path.name in ("ready", "heartbeat")),
        }

    seen = alike(probed)
    assert seen["in the supervisor"] == {True}
    assert seen["left"] == []


def test_an_app_that_sets_up_logging_itself_gets_every_record(alike):
    def logged(stage):
        path = stage.folder / "own.log"
        worker = stage.worker(app="logging_app", env={"OWN_LOG": str(path)}, ready=False)
        until(lambda: path.exists() and " ready." in path.read_text(), worker.describe)
        stage.send("add", 1, 2).get(timeout=30)
        until(lambda: " succeeded in " in path.read_text(), worker.describe)
        until(stage.send("fail").ready, worker.describe)
        until(lambda: " raised " in path.read_text(), worker.describe)
        worker.stop()
        records = [json.loads(line) for line in path.read_text().splitlines()]
        about_tasks = ("celery.worker.strategy", "celery.app.trace", "mine")
        return {
            process: [
                (record["logger"], record["level"], plain(record["text"]), record["data"])
                for record in records
                if record["logger"] in about_tasks and plain(record["process"]) == process
            ]
            for process in ("MainProcess", "ForkPoolWorker-<n>")
        }

    seen = alike(logged)
    assert [name for name, *_ in seen["MainProcess"]] == ["celery.worker.strategy"] * 2
    assert [name for name, *_ in seen["ForkPoolWorker-<n>"]] == ["mine", "celery.app.trace", "celery.app.trace"]


def test_a_django_project_with_results_in_its_database(alike):
    def shop(stage):
        database = stage.folder / "shop.sqlite3"
        env = {
            "SHOP_DATABASE": str(database),
            "DJANGO_SETTINGS_MODULE": "shop.settings",
            "PYTHONPATH": str(APPS),
        }
        subprocess.run(
            [sys.executable, "-m", "django", "migrate", "-v", "0"],
            env=os.environ | env,
            check=True,
            timeout=120,
        )
        worker = stage.worker(app="shop", env=env, concurrency=2)
        sent = [stage.send("shop.tasks.add_group", f"g{number}") for number in range(5)]
        sent += [stage.send("shop.tasks.fail"), stage.send("shop.tasks.kind_of_task")]

        def rows():
            with sqlite3.connect(database) as connection:
                connection.row_factory = sqlite3.Row
                found = {
                    row["task_id"]: dict(row)
                    for row in connection.execute("select * from django_celery_results_taskresult")
                }
            return found if all(found.get(r.id, {}).get("status") in ("SUCCESS", "FAILURE") for r in sent) else None

        found = until(rows, worker.describe)
        status = worker.stop()
        times = ("id", "date_created", "date_done", "date_started", "traceback", "task_id")
        told = [
            {key: plain(str(value)) for key, value in found[result.id].items() if key not in times} for result in sent
        ]
        for row, result in zip(told, sent, strict=True):
            row["traceback"] = bool(found[result.id]["traceback"])
            if row["task_name"] == "shop.tasks.add_group":
                row["result"] = row["result"].isdigit()
        return [told, status]

    rows, status = alike(shop)
    assert status == 0
    assert [row["status"] for row in rows] == ["SUCCESS"] * 5 + ["FAILURE", "SUCCESS"]
    assert "celery.contrib.django.task" in rows[-1]["result"]
