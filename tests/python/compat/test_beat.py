"""Beat embedded in the worker: `-B`, `-s`, `--scheduler`."""

import signal

import psutil
import pytest
from support.lines import lines
from support.waiting import until

APP = "beating"


def beat_of(stage):
    """The process that beats, by what it signalled."""
    stage.wait_journal("beat_embedded_init")
    return psutil.Process(stage.journal("beat_embedded_init")[-1]["pid"])


def stop(stage, worker):
    """Stops the worker. In the original the word that beat is to stop may get lost, and the worker waits for ever."""
    worker.kill(signal.SIGTERM)
    try:
        return worker.wait(20)
    except AssertionError:
        if stage.kind != "celery":
            raise
        for child in psutil.Process(worker.pid).children():
            child.kill()
        return worker.wait()


def test_a_worker_with_beat_sends_what_is_due_and_saves_the_schedule(alike):
    def beat(stage):
        worker = stage.worker("-B", "-s", f"{stage.folder}/due", app=APP)
        stage.wait_journal("tick", count=3)
        process = beat_of(stage)
        parent = process.ppid() == worker.pid
        assert stop(stage, worker) == 0
        files = sorted(path.name.split(".")[0] for path in stage.folder.glob("due*"))
        said = lines(worker.log)
        return {
            "child of the worker": parent,
            "said by beat": sorted({text for _, process, text in said if process == "Beat"}),
            "said of beat": [text for _, process, text in said if process == "MainProcess" and "beat:" in text],
            "signals": [(line["event"], line["sender"]) for line in stage.journal() if "beat" in line["event"]],
            "saved": bool(files),
        }

    seen = alike(beat)
    assert seen["child of the worker"]
    assert seen["said by beat"] == ["Scheduler: Sending due task tick (tick)", "beat: Starting..."]
    assert seen["said of beat"] == ["beat: Shutting down..."]
    assert seen["signals"] == [("beat_init", "Service"), ("beat_embedded_init", "Service")]
    assert seen["saved"]


@pytest.mark.parametrize("how", ["option", "setting"])
def test_the_scheduler_and_its_file_come_from_options_or_settings(alike, how):
    def scheduler(stage):
        file = f"{stage.folder}/own"
        if how == "option":
            stage.worker("-B", "--schedule", file, "--scheduler", "beating:Stubborn", app=APP)
        else:
            stage.worker("--beat", app=APP, conf={"beat_scheduler": "beating:Stubborn", "beat_schedule_filename": file})
        stage.wait_journal("tick")
        return [(line["name"], line["file"] == file) for line in stage.journal("scheduler")]

    assert alike(scheduler) == [("Stubborn", True)]


def test_no_interval_is_lost_or_sent_twice_over_a_restart(alike):
    def restart(stage):
        conf = {"beat_schedule": {"rare": {"task": "tick", "schedule": 3600.0, "args": [2]}}}
        options = ("-B", "-s", f"{stage.folder}/due")
        worker = stage.worker(*options, app="zoo", conf=conf | {"beat_max_loop_interval": 1})
        worker.wait_log("beat: Starting...")
        assert stop(stage, worker) == 0
        worker = stage.worker(*options, app="zoo", conf=conf | {"beat_max_loop_interval": 1})
        worker.wait_log("beat: Starting...")
        assert stop(stage, worker) == 0
        return sum("Sending due task" in text for one in stage.workers for *_, text in lines(one.log))

    assert alike(restart) == 0


def is_gone(process):
    """Whether it has ended, waited for or not."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.ours
def test_beat_stops_while_the_running_tasks_still_finish(stage_on, kind):
    """As in the original, where the word that it is to stop may get lost."""
    stage = stage_on(kind)
    worker = stage.worker("-B", "-s", f"{stage.folder}/due", app=APP)
    stage.wait_journal("tick")
    running = stage.send("sleep", 4)
    stage.wait_journal("started")
    beat = beat_of(stage)
    worker.kill(signal.SIGTERM)
    until(lambda: is_gone(beat), worker.describe)
    assert not stage.journal("ran")
    assert worker.wait() == 0
    assert running.state == "SUCCESS"


def test_a_restart_on_hangup_leaves_one_beat(alike):
    def restart(stage):
        worker = stage.worker("-B", "-s", f"{stage.folder}/due", app=APP)
        first = beat_of(stage)
        worker.kill(signal.SIGHUP)
        stage.wait_journal("beat_embedded_init", count=2)
        second = beat_of(stage)
        until(lambda: worker.log.count(" ready.") == 2, worker.describe)
        until(lambda: is_gone(first), worker.describe)
        child = second.ppid() == worker.pid
        assert stop(stage, worker) == 0
        return child

    assert alike(restart)


@pytest.mark.ours
def test_beat_does_not_outlive_a_killed_worker(stage_on, kind):
    stage = stage_on(kind)
    worker = stage.worker("-B", "-s", f"{stage.folder}/due", app=APP)
    beat_of(stage)
    worker.kill(signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL


@pytest.mark.ours
def test_a_beat_that_ends_by_itself_is_missed(stage_on, kind):
    stage = stage_on(kind)
    worker = stage.worker("-B", "-s", f"{stage.folder}/due", app=APP)
    beat = beat_of(stage)
    beat.kill()
    worker.wait_log(f"beat (pid {beat.pid}) ended with signal 9 (SIGKILL): nothing is scheduled until")
    assert worker.stop() == 0
    assert "Traceback" not in worker.log


@pytest.mark.ours
def test_a_schedule_is_saved_although_every_process_is_told_to_stop(stage_on, kind):
    stage = stage_on(kind)
    worker = stage.worker("-B", "-s", f"{stage.folder}/due", "--scheduler", "beating:Slow", app=APP)
    beat_of(stage).terminate()
    stage.wait_journal("saving")
    assert worker.stop() == 0
    assert len(stage.journal("saved")) == 1
    assert "nothing is scheduled" not in worker.log


@pytest.mark.ours
def test_a_beat_that_does_not_stop_is_killed(stage_on, kind):
    stage = stage_on(kind)
    worker = stage.worker("-B", "-s", f"{stage.folder}/due", app=APP)
    beat = beat_of(stage)
    beat.suspend()
    assert worker.stop() == 0
    assert f"beat (pid {beat.pid}) did not stop within 10 seconds and is killed." in worker.log


@pytest.mark.ours
def test_beat_ends_with_a_worker_that_a_step_keeps_from_starting(stage_on, kind):
    stage = stage_on(kind)
    worker = stage.worker(
        "-B", "-s", f"{stage.folder}/due", app="own_consumers", env={"BROKEN_STEP": "OfWorker"}, ready=False
    )
    assert worker.wait() == 1
