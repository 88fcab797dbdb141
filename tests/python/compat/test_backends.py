"""Result backends: those that are spoken natively and those that only Celery's own Python reaches."""

import sys

import pytest
from support.lines import plain
from support.waiting import until
from support.worker import APPS


def answers(stage):
    """Success, failure, retry, progress and a lost child, as a client of this backend sees them."""
    stage.worker(concurrency=2)
    sent = {
        "add": stage.send("add", 4, 6),
        "fail": stage.send("fail", "no"),
        "retry": stage.send("retry_twice"),
        "progress": stage.send("progress"),
        "lost": stage.send("kill_self"),
        "limited": stage.send("hard_limited"),
        "unknown": stage.send("not_there"),
    }
    found = {}
    for name, result in sent.items():
        until(result.ready, lambda n=name: f"{n}\n{stage.logs()}")
        value = plain(f"{type(result.result).__name__}: {result.result}")
        if name == "lost":  # without an event loop the original cannot say what the child died of
            value = type(result.result).__name__
        found[name] = [result.state, value, bool(result.traceback)]
    return found


def check(seen):
    assert seen["add"] == ["SUCCESS", "int: 10", False]
    assert seen["fail"] == ["FAILURE", "ValueError: no", True]
    assert seen["retry"][:2] == ["SUCCESS", "int: 2"]
    assert seen["lost"][0] == "FAILURE"
    assert "TimeLimitExceeded" in seen["limited"][1]
    assert "NotRegistered" in seen["unknown"][1]


@pytest.mark.parametrize("backend", ["redis", "file", "sqlite", "memcached"])
def test_results_of_every_end_are_read_back(alike, backend):
    check(alike(answers, backend=backend))


def test_results_of_every_end_are_read_back_over_rpc(alike):
    check(alike(answers, broker="amqp", backend="rpc://"))


def test_the_filesystem_and_no_server_at_all(alike):
    check(alike(answers, broker="filesystem", backend="file"))


def test_a_custom_backend_class_is_called_as_ever(alike, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(APPS))
    monkeypatch.setenv("NOTEBOOK", str(tmp_path))
    check(alike(answers, backend="custom_backend:NotebookBackend"))
    sys.modules.pop("custom_backend", None)


def test_with_no_backend_tasks_run_all_the_same(alike):
    def ran(stage):
        worker = stage.worker()
        stage.send("mark", 1)
        stage.send("fail")
        stage.send("retry_twice")
        stage.wait_journal("ran")
        stage.wait_journal("try", retries=2)
        worker.wait_log("raised unexpected")
        return worker.stop()

    assert alike(ran, backend="disabled://") == 0


def test_started_is_stored_when_asked_for(alike):
    def started(stage):
        stage.worker()
        result = stage.send("sleep", 1.5)
        until(lambda: result.state == "STARTED", stage.logs)
        info = result.info
        result.get(timeout=30)
        return [sorted(info), info["hostname"]]

    assert alike(started, task_track_started=True) == [["hostname", "pid"], "w0@here"]


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_success_is_kept_when_the_task_fails_later(alike, compression):
    def scenario(stage):
        worker = stage.worker()
        first = stage.send("add", 1, 2)
        assert first.get(timeout=30) == 3
        stage.send("fail", task_id=first.id)
        worker.wait_log("raised unexpected")
        worker.stop()
        return plain(repr(first.backend.get_task_meta(first.id, cache=False)["result"]))

    assert alike(scenario, "redis", "file", result_compression=compression) == "3"


def test_a_bridge_transport_carries_tasks(alike, tmp_path):
    """SQLAlchemy stands for every transport that is not spoken natively."""

    def carried(stage):
        stage.conf["broker_url"] = f"sqla+sqlite:///{stage.folder}/broker.db"
        stage.app.conf.broker_url = stage.conf["broker_url"]
        worker = stage.worker()
        results = [stage.send("add", number, number) for number in range(5)]
        late = stage.send("late_mark", 7)
        retried = stage.send("retry_twice")
        found = [result.get(timeout=60) for result in [*results, late, retried]]
        return [found, worker.stop()]

    assert alike(carried) == [[0, 2, 4, 6, 8, 7, 2], 0]
