"""Signals: which fire, in which process, in which order, with which arguments."""

import pytest
from support.lines import plain
from support.waiting import PATIENCE, until

# Volatile in value, though always there.
VOLATILE = {
    "pid",
    "runtime",
    "loglevel",
    "logfile",
    "body",
    "headers",
    "properties",
    "traceback",
    "declare",
    "delivery_info",
}


OF_THE_WORKER = {
    "import_modules", "celeryd_init", "worker_init", "after_setup_logger", "after_setup_task_logger",
    "celeryd_after_setup", "worker_before_create_process", "worker_ready", "worker_shutting_down",
    "worker_shutdown", "worker_process_init", "worker_process_shutdown",
}  # fmt: skip


# Objects of the parent that celeriac hands to receivers in place of Celery's.
STAND_INS = {"ConsumerStandIn": "Consumer", "Settled": "Message"}

# What sends them is Celery's own machinery, which celeriac has no equal of.
ANY_SENDER = {"worker_before_create_process", "heartbeat_sent"}


def told(lines):
    """What a test compares: the name, the role, the sender and the arguments of each signal."""
    return [
        (
            line["event"],
            line["role"],
            "…" if line["event"] in ANY_SENDER else STAND_INS.get(line["sender"], line["sender"]),
            {
                key: "…" if key in VOLATILE else plain(STAND_INS.get(value, value))
                for key, value in line["fields"].items()
            },
        )
        for line in lines
    ]


def test_the_life_of_a_worker_fires_its_signals_in_order(alike):
    def life(stage):
        worker = stage.worker("--heartbeat-interval=1", app="signals_app")
        stage.send("add", 1, 2).get(timeout=30)
        stage.wait_journal("heartbeat_sent")
        assert worker.stop() == 0
        stage.wait_journal("left")
        lines = [line for line in stage.journal() if line["event"] in OF_THE_WORKER]
        parent = [line for line in lines if line["role"] == "MainProcess"]
        child = [line for line in lines if line["role"] == "child"]
        return {
            "parent": told(parent),
            "child": told(child),
            "heartbeat": told(stage.journal("heartbeat_sent")),
            "left": [(line["matches"], line["exitcode"]) for line in stage.journal("left")],
            # The one before a fork fires in the process that forks.
            "one parent": {line["pid"] for line in parent if line["event"] != "worker_before_create_process"}
            == {worker.pid},
        }

    seen = alike(life)
    assert seen["one parent"]
    assert [name for name, *_ in seen["parent"]] == [
        "import_modules", "celeryd_init", "worker_init", "after_setup_logger", "after_setup_task_logger",
        "celeryd_after_setup", "worker_before_create_process", "worker_ready", "worker_shutting_down",
        "worker_shutdown",
    ]  # fmt: skip
    assert [name for name, *_ in seen["child"]] == ["worker_process_init", "worker_process_shutdown"]
    assert seen["left"] == [(True, 0)]


@pytest.mark.parametrize("name", ["add", "fail", "retry", "parent_of"])
def test_a_task_fires_its_signals_in_order(alike, name):
    def of_task(stage):
        stage.worker(app="signals_app")
        result = stage.send(name, *((1, 2) if name == "add" else ()))
        last = "SUCCESS" if name != "fail" else "FAILURE"

        def ended():
            lines = stage.journal("task_postrun", task=result.id)
            return [line for line in lines if line["fields"]["state"] == repr(last)]

        until(ended, stage.logs)
        return {
            role: told(line for line in stage.journal(role=role) if line["task"] == result.id)
            for role in ("MainProcess", "child")
        }

    seen = alike(of_task)
    assert [event for event, *_ in seen["MainProcess"]] == ["task_received"] * (2 if name == "retry" else 1)
    events = [event for event, *_ in seen["child"]]
    assert events[0] == "task_prerun"
    assert events[-1] == "task_postrun"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kill_self", ["task_received", "task_failure"]),
        ("not_there", ["task_unknown"]),
        ("expired", ["task_revoked"]),
    ],
)
def test_what_the_parent_finds_out_it_signals_itself(alike, name, expected):
    def found_out(stage):
        stage.worker(app="signals_app")
        result = stage.send("add", 1, 1, expires=-1) if name == "expired" else stage.send(name)
        stage.wait_journal(expected[-1], task=result.id)
        return told(line for line in stage.journal(role="MainProcess") if line["task"] == result.id)

    assert [event for event, *_ in alike(found_out)] == expected


def test_a_hard_time_limit_fires_task_failure_once_in_the_parent(stage_on, kind):
    stage = stage_on(kind)
    worker = stage.worker(app="signals_app")
    result = stage.send("hard_limited")
    worker.wait_log("Hard time limit (1s) exceeded")
    assert worker.stop() == 0
    failures = stage.journal("task_failure", task=result.id)
    assert {line["role"] for line in failures} == {"MainProcess"}
    # The original fires it twice; once is what a handler that sends an alert wants.
    assert len(failures) == {"celery": 2, "celeriac": 1}[kind]


def test_remote_control_sees_the_tasks_that_came_before_it(alike):
    def scheduled(stage):
        worker = stage.worker(app="slow_to_notice")
        result = stage.send("add", 1, 1, countdown=30)
        stage.wait_journal("noticing", task=result.id)
        shown = stage.app.control.inspect(timeout=PATIENCE, limit=1).scheduled()
        assert worker.stop() == 0
        return [entry["request"]["id"] == result.id for entry in shown["w0@here"]]

    assert alike(scheduled, "amqp") == [True]
