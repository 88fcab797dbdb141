"""A worker of Rust handlers, no Python in it, called by producers that do not know."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from celery import Celery, chain, group
from celery.exceptions import NotRegistered, TaskRevokedError, TimeLimitExceeded
from support.waiting import until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def binary():
    """The example, as its own command builds it."""
    cargo = shutil.which("cargo")
    if cargo is None:
        pytest.skip("cargo is not installed")
    command = [cargo, "build", "--locked", "--example", "native_worker", "--message-format=json"]
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    lines = [json.loads(line) for line in built.stdout.splitlines()]
    return next(line["executable"] for line in lines if line.get("target", {}).get("name") == "native_worker"
                and line.get("executable"))  # fmt: skip


class NativeWorker:
    def __init__(self, binary, stage):
        self.log = stage.folder / "native.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [binary, stage.conf["broker_url"], stage.conf["result_backend"], stage.queue],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def destroy(self):
        self.process.kill()
        self.process.wait(10)


@pytest.fixture(params=[("redis", "redis"), ("amqp", "rpc://")], ids=["redis", "rabbitmq"])
def stage(request, stage_on):
    broker, backend = request.param
    return stage_on("native", broker, backend)


@pytest.fixture
def worker(binary, stage):
    worker = NativeWorker(binary, stage)
    yield worker
    worker.destroy()


def failure(result):
    """The exception of a failed task, as its caller meets it."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - its type is what the tests look at
        result.get(timeout=30)
    assert result.state in ("FAILURE", "REVOKED")
    return caught.value


def test_results_reach_the_caller_as_those_of_a_python_task_would(stage, worker):
    assert stage.send("tasks.add", 4, 6).get(timeout=30) == 10
    resized = stage.send("tasks.resize", "ü.png", kwargs={"width": 3}).get(timeout=30)
    assert resized == {"path": "3/ü.png", "resized_so_far": 1}
    assert stage.send("tasks.resize", kwargs={"path": "b"}).get(timeout=30)["path"] == "80/b"
    sent = stage.send("tasks.whoami")
    assert sent.get(timeout=30).startswith(f"{sent.id} on celery@")
    # 5.7 waits for a group as a whole; the rpc backend knows no groups of its own.
    sums = [stage.send("tasks.add", number, 1) for number in range(100)]
    assert [result.get(timeout=30) for result in sums] == list(range(1, 101))


def test_failures_reach_the_caller_as_exceptions(stage, worker):
    refused = stage.send("tasks.resize", "a", 0)
    error = failure(refused)
    assert (type(error), error.args) == (ValueError, ("cannot resize a to 0 pixels",))
    assert refused.traceback == "ValueError: cannot resize a to 0 pixels\n"

    for sent, kind, text in [
        (stage.send("tasks.add", 1), "TypeError", "tasks.add() takes 2 positional arguments but 1 was given"),
        (stage.send("tasks.add", 1, "x"), "TypeError", 'tasks.add() invalid type: string "x", expected i64'),
        (stage.send("tasks.add", 1, 2, kwargs={"z": 3}), "TypeError",
         "tasks.add() got an unexpected keyword argument 'z'"),
        (stage.send("tasks.resize"), "TypeError",
         "tasks.resize() missing 1 required positional argument: 'path'"),
        (stage.send("tasks.parse", "x"), "ParseIntError", "invalid digit found in string"),
        (stage.send("tasks.panic"), "Panic", "this handler has a bug"),
    ]:  # fmt: skip
        error = failure(sent)
        assert (type(error).__name__, str(error)) == (kind, text)

    assert isinstance(failure(stage.send("tasks.unknown")), NotRegistered)
    assert isinstance(failure(stage.send("tasks.sleep", 60)), TimeLimitExceeded)
    assert isinstance(failure(stage.send("tasks.sleep", 60, expires=-1)), TaskRevokedError)
    # Nothing of that hurt the worker.
    assert stage.send("tasks.add", 1, 2).get(timeout=30) == 3


def test_what_a_native_task_cannot_continue_is_refused_and_not_dropped(stage, worker):
    sent = chain(stage.s("tasks.add", 1, 1), stage.s("tasks.add", 2)).apply_async()
    error = failure(sent.parent)
    assert isinstance(error, NotImplementedError)
    assert "chain" in str(error)


def test_messages_of_all_kinds_are_read(stage, worker):
    assert stage.send("tasks.add", 1, 1, countdown=1).get(timeout=30) == 2
    assert stage.send("tasks.add", 1, 2, serializer="pickle").get(timeout=30) == 3
    with Celery("old", set_as_current=False) as old:
        old.conf.update(stage.conf, task_protocol=1)
        assert old.send_task("tasks.add", (1, 3)).get(timeout=30) == 4
    ignored = stage.send("tasks.add", 1, 1, ignore_result=True)
    assert stage.send("tasks.add", 2, 2).get(timeout=30) == 4
    assert ignored.state == "PENDING"


def test_a_group_is_answered_in_its_order(stage_on, binary):
    stage = stage_on("native", "redis", "redis")
    worker = NativeWorker(binary, stage)
    try:
        results = group(stage.s("tasks.add", number, number) for number in range(20)).apply_async()
        assert results.get(timeout=30) == [2 * number for number in range(20)]
    finally:
        worker.destroy()


def test_a_revoked_task_is_recorded_as_such_also_before_it_is_sent(stage_on, binary):
    stage = stage_on("native", "redis", "redis")
    worker = NativeWorker(binary, stage)
    try:
        until(lambda: stage.app.control.ping(timeout=0.5), "an answer to ping")
        done = stage.send("tasks.add", 1, 1)
        assert done.get(timeout=30) == 2
        stage.app.control.revoke(["later", done.id], reply=True, timeout=2)
        until(lambda: stage.app.AsyncResult("later").state == "REVOKED", "the revoked state")
        assert done.state == "SUCCESS"
        running = stage.send("tasks.sleep", 0.9, task_id="later")
        assert isinstance(failure(running), TaskRevokedError)
    finally:
        worker.destroy()


def test_the_worker_is_asked_and_told_like_any_other_and_stops_cleanly(stage, worker):
    control = stage.app.control
    until(lambda: control.ping(timeout=0.5), "an answer to ping")
    running = stage.send("tasks.sleep", 0.9)
    names = next(iter(control.inspect(timeout=2).registered().values()))
    assert "tasks.add" in names
    assert running.get(timeout=30) is None
    stats = next(iter(control.inspect(timeout=2).stats().values()))
    assert stats["pool"]["implementation"] == "native"
    assert stats["total"]["tasks.sleep"] == 1
    assert worker.stop() == 0
    # What is sent now waits for the next worker.
    waiting = stage.send("tasks.add", 1, 1)
    assert not waiting.ready()
