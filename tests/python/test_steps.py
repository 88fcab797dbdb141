"""What boot steps and signal handlers of the app see of the worker, and when."""

import signal

import pytest
from support.waiting import until
from support.worker import WorkerProcess


@pytest.fixture
def start(tmp_path):
    """Starts the worker of `apps/steps.py`; what a failed test has left is killed."""
    started = []

    def go(app="steps", ready=True, **env):
        worker = WorkerProcess("celeriac", app, ["-c", "2", "-l", "INFO", "-n", "node@h"], tmp_path, env=env)
        started.append(worker)
        return worker.start(ready)

    yield go
    for worker in started:
        worker.destroy()


def said(worker):
    return [line.removeprefix("STEP ") for line in worker.log.splitlines() if line.startswith("STEP ")]


def test_steps_and_signals_come_in_the_original_s_order(start):
    worker = start()
    worker.wait_log("STEP alive")
    assert worker.stop(signal.SIGTERM) == 0
    lines = said(worker)
    lines.remove("alive node")  # comes from the timer's own thread
    pool = lines.index("start AfterPool 2 implementation")
    lines.pop(pool)  # in no order with steps that it does not know
    assert lines == [
        "worker_init",
        "celeryd_after_setup",
        "fork with 1 thread",
        "start Liveness",
        "start OfConsumer steps Connection None",
        "worker_ready node@h 2 Worker",
        "worker_shutting_down SIGTERM Warm 0",
        "stop OfConsumer",
        "stop Liveness",
        "worker_shutdown",
    ]


def test_a_queue_added_after_setup_is_consumed(start, tmp_path):
    worker = start()
    assert "added" in worker.log
    worker.stop()


def test_a_signal_that_comes_before_the_core_runs_ends_the_worker(start):
    worker = start(ready=False, STOP_EARLY="1")
    assert worker.wait() == 0
    assert " ready." not in worker.log
    assert "worker_shutting_down SIGTERM Warm 0" in said(worker)
    assert said(worker)[-1] == "worker_shutdown"


def test_a_timer_class_of_the_app_runs_what_steps_put_into_it(start):
    worker = start(OWN_TIMER="1")
    worker.wait_log("STEP alive")
    assert worker.stop(signal.SIGTERM) == 0
    lines = said(worker)
    assert lines.index("fork with 1 thread") < lines.index("own timer starts")


def test_a_step_that_stops_the_worker_stops_it(start):
    worker = start(ready=False, STOP_FROM_TIMER="1")
    assert worker.wait() == 4
    assert said(worker)[-1] == "worker_shutdown"


def test_hangup_restarts_the_worker_in_the_same_process(start):
    worker = start("living")
    worker.kill(signal.SIGHUP)
    until(lambda: worker.log.count(" ready.") == 2, worker.describe)
    assert "Restarting celery worker" in worker.log
    assert worker.stop(signal.SIGTERM) == 0
