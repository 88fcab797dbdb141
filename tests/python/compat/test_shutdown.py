"""Stopping: what each signal does to the running, the waiting and the exit status."""

import os
import signal

import pytest
from support.lines import lines
from support.waiting import until

LONG = 2.0  # a task that is still running when the signal arrives


def restored(stage):
    """Messages that are back in the queue."""
    return stage.depth()


@pytest.mark.parametrize("broker", ["redis", "amqp"])
@pytest.mark.parametrize("task", ["sleep", "sleep_late"])
def test_a_warm_stop_finishes_the_running_and_gives_back_the_waiting(alike, broker, task):
    def warm(stage):
        worker = stage.worker()
        results = [stage.send(task, LONG, number) for number in range(4)]
        stage.wait_journal("started")
        until(lambda: worker.log.count("received") >= 4, worker.describe)
        status = worker.stop(signal.SIGTERM)
        return {
            "status": status,
            "ran": [line["number"] for line in stage.journal("ran")],
            "states": [result.state for result in results],
            "waiting": restored(stage),
            "said": "worker: Warm shutdown (MainProcess)" in worker.log,
        }

    seen = alike(warm, broker)
    assert seen["status"] == 0
    assert seen["ran"] == [0]
    assert seen["waiting"] == 3
    assert seen["said"]


def test_what_a_warm_stop_gave_back_runs_next(stage_on, kind):
    stage = stage_on(kind)
    first = stage.worker()
    for number in range(5):
        stage.send("sleep", 1.0 if number == 0 else 0, number)
    stage.wait_journal("started")
    until(lambda: first.log.count("received") >= 4, first.describe)
    first.stop()
    stage.worker()
    stage.wait_journal("ran", count=5)
    order = [line["number"] for line in stage.journal("ran")]
    # The original gives them back in reverse.
    assert order == {"celery": [0, 4, 3, 2, 1], "celeriac": [0, 1, 2, 3, 4]}[kind]


@pytest.mark.parametrize(
    ("signals", "status"),
    [
        ([signal.SIGTERM], 0),
        ([signal.SIGINT], 1),
        ([signal.SIGTERM, signal.SIGTERM], 0),
    ],
    ids=lambda value: "+".join(s.name for s in value) if isinstance(value, list) else str(value),
)
def test_warm_signals_let_the_running_task_finish(alike, signals, status):
    def stopped(stage):
        worker = stage.worker()
        result = stage.send("sleep_late", LONG, 1)
        stage.wait_journal("started")
        for count, signum in enumerate(signals, 1):
            worker.kill(signum)
            until(lambda n=count: worker.log.count("worker: Warm shutdown") >= n, worker.describe)
        ended = worker.wait()
        return {
            "status": ended,
            "state": result.state,
            "hint": "Hitting Ctrl+C again will initiate cold shutdown" in worker.log,
            "waiting": stage.depth(),
        }

    seen = alike(stopped)
    assert seen["status"] == status
    assert seen["state"] == "SUCCESS"
    assert seen["waiting"] == 0
    assert seen["hint"] == (signals[0] == signal.SIGINT)


@pytest.mark.parametrize(
    ("signals", "remap", "status"),
    [
        ([signal.SIGQUIT], "", {0}),
        # The original's depends on whether it had noticed the first one when the second came.
        ([signal.SIGINT, signal.SIGINT], "", {0, 1}),
        ([signal.SIGTERM, signal.SIGQUIT], "", {0}),
        ([signal.SIGTERM], "SIGQUIT", {0}),
    ],
    ids=["QUIT", "INT+INT", "TERM+QUIT", "TERM-remapped"],
)
def test_cold_signals_end_the_running_task(alike, signals, remap, status):
    statuses = {}

    def stopped(stage):
        worker = stage.worker(env={"REMAP_SIGTERM": remap} if remap else {}, concurrency=2)
        late = stage.send("sleep_late", 60, "late")
        early = stage.send("sleep", 60, "early")
        stage.wait_journal("started", count=2)
        for count, signum in enumerate(signals):
            worker.kill(signum)
            if count + 1 < len(signals):
                worker.wait_log("worker: Warm shutdown")
        statuses[stage.kind] = worker.wait()
        return {
            "ran": stage.journal("ran"),
            "waiting": stage.depth(),
            "late": late.state,
            "early": early.state,
        }

    seen = alike(stopped)
    assert set(statuses.values()) <= status
    assert seen["ran"] == []
    assert seen["waiting"] == 1, "the late one is back in the queue"
    assert seen["late"] == "PENDING"


def test_a_soft_shutdown_gives_the_running_task_its_time(alike):
    def soft(stage):
        worker = stage.worker(conf={"worker_soft_shutdown_timeout": 3.0})
        result = stage.send("sleep_late", 1.0, 1)
        stage.wait_journal("started")
        worker.kill(signal.SIGQUIT)
        worker.wait_log("Initiating Soft Shutdown, terminating in 3")
        status = worker.wait()
        return {"status": status, "state": result.state, "waiting": stage.depth()}

    assert alike(soft) == {"status": 0, "state": "SUCCESS", "waiting": 0}


def test_hup_restarts_the_worker_under_its_pid(alike):
    def restarted(stage):
        worker = stage.worker()
        worker.kill(signal.SIGHUP)
        worker.wait_log(" ready.", count=2)
        answer = stage.send("add", 2, 2).get(timeout=30)
        return {"answer": answer, "status": worker.stop()}

    assert alike(restarted) == {"answer": 4, "status": 0}


@pytest.mark.parametrize("broker", ["redis", "amqp"])
def test_killed_outright_it_leaves_no_process_behind(stage_on, kind, broker):
    stage = stage_on(kind, broker)
    worker = stage.worker(concurrency=2)
    stage.send("sleep_late", 60, 1)
    stage.wait_journal("started")
    assert worker.descendants()
    worker.kill(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL


def test_a_pidfile_is_written_locked_and_removed(alike):
    def pidfile(stage):
        path = stage.folder / "worker.pid"
        first = stage.worker(f"--pidfile={path}")
        written = path.read_text() == f"{first.pid}\n"
        second = stage.worker(f"--pidfile={path}", ready=False)
        refused = second.wait()
        message = "Seems we're already running?" in second.log
        still = path.exists()
        first.stop()
        path.write_text("999999999\n")  # nobody's: stale
        third = stage.worker(f"--pidfile={path}")
        took_over = path.read_text() == f"{third.pid}\n"
        third.stop()
        return [written, refused, message, still, took_over, path.exists()]

    assert alike(pidfile) == [True, 73, True, True, True, False]


def test_node_names_and_log_files_are_formatted(alike):
    def formats(stage):
        worker = stage.worker(
            "--hostname=one@%h",
            f"--logfile={stage.folder}/%n-%%.log",
            f"--pidfile={stage.folder}/%n.pid",
            ready=False,
        )
        path = stage.folder / "one-%.log"
        until(lambda: path.exists() and " ready." in path.read_text(), worker.describe)
        name = f"one@{os.uname().nodename}"
        stage.send("add", 1, 1).get(timeout=30)
        names_itself = f"{name} ready." in path.read_text()
        worker.stop()
        written = [(level, process) for level, process, text in lines(path.read_text()) if "add[" in text]
        return [names_itself, sorted(p.name for p in stage.folder.glob("one*")), written]

    seen = alike(formats)
    assert seen[0]
    assert seen[1] == ["one-%.log"]
    assert seen[2] == [("INFO", "MainProcess"), ("INFO", "ForkPoolWorker-<n>")]
