"""Results that children hand to the supervisor: what is written, and when the child waits for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery
import pool_app
import pytest
from celeriac import backends, zygote
from celery.app.task import Context
from celery.backends.redis import RedisBackend
from pool_driver import Supervisor

REDIS = "redis://127.0.0.1:1/0"


def plan(**settings: Any) -> zygote.Plan:
    app = pool_app.make(**{"result_backend": REDIS, **settings})
    app.finalize()
    assert backends.decide(app).native
    return zygote.Plan(app, "celery@test", native_results=True)


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    with Supervisor(plan()) as supervisor:
        yield supervisor


@pytest.mark.parametrize(
    ("url", "native"),
    [
        (REDIS, True),
        ("rediss://host/0?ssl_cert_reqs=required", True),
        ("rpc://", True),
        (None, True),
        ("sentinel://a;sentinel://b", False),
        ("cache+memory://", False),
        ("redis", False),
        ("nonsense://", False),
        (REDIS + "?credential_provider=module.Provider", False),
    ],
)
def test_the_supervisor_writes_for_known_backends_only(url: str | None, native: bool) -> None:
    rung = backends.decide(pool_app.make(result_backend=url))
    assert rung.native is native
    assert rung.reason


def test_the_filesystem_is_written_by_the_supervisor(tmp_path: Path) -> None:
    assert backends.decide(pool_app.make(result_backend=f"file://{tmp_path}")).native


def test_a_patched_backend_stays_with_celery(monkeypatch: pytest.MonkeyPatch) -> None:
    original = RedisBackend.set
    monkeypatch.setattr(RedisBackend, "set", lambda *args, **kwargs: original(*args, **kwargs))
    rung = backends.decide(pool_app.make(result_backend=REDIS))
    assert rung == (False, "RedisBackend.set was replaced")


def test_a_subclass_stays_with_celery() -> None:
    rung = backends.decide(pool_app.make(result_backend=f"{__name__}:Mine+{REDIS}"))
    assert not rung.native


class Mine(RedisBackend):
    """Somebody's own."""


def test_rpc_needs_the_brokers_own_connection() -> None:
    app = pool_app.make(result_backend="rpc://")
    assert not backends.decide(app, broker_native=False).native
    app = pool_app.make(result_backend="rpc://", broker_write_url="memory://other")
    assert not backends.decide(app).native


def test_a_result_is_written_before_the_outcome_and_nobody_waits(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    child.run(1, "add", 1, 2)
    child.expect("accepted")
    _, job, serial, record = child.expect("store")
    assert (job, serial) == (1, None)
    document = json.loads(record.pop("document"))
    assert document.pop("date_done").endswith("+00:00")
    assert document == {
        "status": "SUCCESS",
        "result": 3,
        "traceback": None,
        "children": [],
        "task_id": "id-1",
    }
    assert record == {
        "task_id": "id-1",
        "state": "SUCCESS",
        "key": "celery-task-meta-id-1",
        "expires": 86400.0,
        "content_type": "application/json",
        "content_encoding": "utf-8",
    }
    assert child.expect("ended")[2] == "success"


def test_a_failure_is_written_with_its_traceback(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    child.run(1, "fail", "x")
    child.expect("accepted")
    _, _, serial, record = child.expect("store")
    document = json.loads(record["document"])
    assert serial is None
    assert document["result"] == {
        "exc_type": "KeyError",
        "exc_message": ["x"],
        "exc_module": "builtins",
    }
    assert document["traceback"].endswith("KeyError: 'x'\n")


@pytest.mark.skipif(celery.VERSION < (5, 7), reason="result_failure_expires came with 5.7")
def test_failures_have_a_lifetime_of_their_own() -> None:
    with Supervisor(plan(result_failure_expires=60, result_expires=None)) as supervisor:
        child = supervisor.fork()
        child.run(1, "fail", "x", acks_early=False)
        assert child.expect("store")[3]["expires"] == 60.0
        child.expect("ended")
        child.run(2, "add", 1, 1, acks_early=False)
        assert child.expect("store")[3]["expires"] is None


@pytest.mark.parametrize(
    ("watched", "task", "arguments"),
    [
        ("task_success", "add", (1, 2)),
        ("task_postrun", "add", (1, 2)),
        ("task_failure", "fail", ("x",)),
        ("task_retry", "retry", ()),
    ],
)
def test_a_child_waits_where_a_receiver_could_look(watched: str, task: str, arguments: tuple[Any, ...]) -> None:
    with pool_app.watching(watched), Supervisor(plan()) as supervisor:
        child = supervisor.fork()
        child.run(1, task, *arguments, acks_early=False)
        serial = child.expect("store")[2]
        assert serial is not None
        child.stored(serial)
        child.expect("ended")


@pytest.mark.parametrize(
    ("task", "watched"), [("add", "task_failure"), ("fail", "task_success"), ("add", "task_prerun")]
)
def test_a_child_does_not_wait_for_receivers_of_something_else(task: str, watched: str) -> None:
    with pool_app.watching(watched), Supervisor(plan()) as supervisor:
        child = supervisor.fork()
        child.run(1, task, *((1, 2) if task == "add" else ("x",)), acks_early=False)
        assert child.expect("store")[2] is None


def test_a_child_waits_where_the_task_has_a_hook(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    child.run(1, "hooked", acks_early=False)
    serial = child.expect("store")[2]
    assert serial is not None
    child.stored(serial)
    assert child.expect("ended")[2] == "success"


def test_a_child_waits_where_errbacks_follow(supervisor: Supervisor) -> None:
    errback = {
        "task": "add",
        "args": [1],
        "kwargs": {},
        "options": {},
        "subtask_type": None,
        "immutable": False,
    }
    child = supervisor.fork()
    body = json.dumps([["x"], {}, {"errbacks": [errback]}]).encode()
    child.run(1, "fail", body=body, acks_early=False)
    serial = child.expect("store")[2]
    assert serial is not None
    child.stored(serial)


def test_states_that_the_task_goes_on_after_are_waited_for(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    child.run(1, "tracked", acks_early=False)
    _, _, serial, record = child.expect("store")
    assert record["state"] == "STARTED"
    child.stored(serial)
    assert child.expect("store")[2:][1]["state"] == "SUCCESS"
    child.expect("ended")
    child.run(2, "update", acks_early=False)
    _, _, serial, record = child.expect("store")
    assert (record["state"], json.loads(record["document"])["result"]) == ("PROGRESS", {"done": 1})
    child.stored(serial)


def test_a_store_that_fails_raises_what_celery_raises(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    child.run(1, "update", acks_early=False)
    child.stored(child.expect("store")[2], "out of memory")
    assert child.outcome()[1:3] == ("success", "'out of memory'")


def test_ignored_results_are_not_written(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    child.run(1, "forget", acks_early=False)
    assert child.frame()[0] == "ended"
    child.run(2, "add", 1, 1, acks_early=False, headers={"ignore_result": True})
    assert child.frame()[0] == "ended"


def test_rpc_results_go_to_the_queue_of_the_caller() -> None:
    with Supervisor(plan(result_backend="rpc://")) as supervisor:
        child = supervisor.fork()
        child.run(1, "add", 1, 2, acks_early=False)
        record = child.expect("store")[3]
        assert (record["key"], record["content_type"], record["expires"]) == (
            "replies",
            "application/json",
            None,
        )
        assert json.loads(record["document"])["result"] == 3
        child.expect("ended")
        child.run(2, "add", 1, 2, acks_early=False, properties={"reply_to": ""})
        assert child.frame()[0] == "ended"


def test_a_process_that_a_task_forks_writes_by_itself(tmp_path: Path) -> None:
    with Supervisor(plan(result_backend=f"file://{tmp_path}")) as supervisor:
        child = supervisor.fork()
        child.run(1, "fork_and_store", acks_early=False)
        assert child.expect("store")[3]["state"] == "SUCCESS"
    document = json.loads((tmp_path / "celery-task-meta-id-1").read_text())
    assert document["status"] == "FROM_A_FORK"


def test_results_can_be_pickled(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    child.run(1, "pickle_result")
    assert child.outcome()[1:3] == ("success", "'RedisBackend BaseKeyValueStoreBackend'")


@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "RETRY", "STARTED", "PROGRESS"])
@pytest.mark.parametrize(
    "extra", [{}, {"group": "g", "parent_id": "p"}, {"group": None, "children": None}, {"stamps": {"a": 1}}]
)
def test_the_short_way_to_a_meta_document_is_celerys(state: str, extra: dict[str, Any]) -> None:
    app = pool_app.make(result_backend=REDIS)
    request = Context({"id": "1", "task": "add", "args": (1,), **extra})
    expected = app.backend._get_result_meta(result=3, state=state, traceback="tb", request=request)
    meta = backends._plain_meta(app.backend, 3, state, "tb", request)
    assert list(meta) == list(expected)
    if expected["date_done"] is not None:
        assert meta["date_done"][-6:] == expected["date_done"][-6:] == "+00:00"
        meta["date_done"] = expected["date_done"]
    assert meta == expected


@pytest.mark.parametrize(
    ("settings", "plain"),
    [({}, True), ({"timezone": "Europe/Berlin"}, False), ({"result_extended": True}, False)],
)
def test_the_short_way_is_taken_for_plain_results_in_utc_only(settings: dict[str, Any], plain: bool) -> None:
    app = pool_app.make(result_backend=REDIS, **settings)
    assert backends._has_plain_meta(app, RedisBackend) is plain


def test_threads_that_wait_for_their_stores_get_each_its_own_answer() -> None:
    app = pool_app.make(result_backend=REDIS)
    app.finalize()
    threads = zygote.Plan(app, "celery@test", kind="threads", lanes=4, native_results=True)
    with Supervisor(threads) as supervisor:
        child = supervisor.fork()
        for number in range(1, 5):
            child.run(number, "update", acks_early=False)
        serials: dict[int, int] = {}
        for _ in range(4):
            _, job, serial, _ = child.expect("store")
            serials[job] = serial
        assert sorted(serials) == [1, 2, 3, 4]
        for job in (4, 2, 3, 1):
            child.stored(serials[job], f"error {job}")
            assert child.expect("store")[1] == job
            number, kind, text, *_ = child.expect("ended")[1:]
            assert (number, kind, text) == (job, "success", f"'error {job}'")
        child.run(5, "add", 1, 1, acks_early=False)
        child.expect("store")
        assert child.expect("ended")[1] == 5
