"""Real zygotes and children, driven through their sockets; no broker, no worker."""

from __future__ import annotations

import ast
import gzip
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import celery
import pool_app
import pytest
from celeriac import zygote
from pool_driver import DEADLINE, Supervisor

HERE = Path(__file__).parent
#: Who sends the signals of processes.
SENDER = "celery@test" if celery.VERSION >= (5, 7) else None


def plan(kind: str = "prefork", lanes: int = 1, **settings: Any) -> zygote.Plan:
    app = pool_app.make(**settings)
    app.finalize()
    return zygote.Plan(app, "celery@test", kind=kind, lanes=lanes)


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    with Supervisor(plan()) as supervisor:
        yield supervisor


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + DEADLINE
    while not done():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Dead: no process, or a zombie that its new parent has yet to reap."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"


def result(outcome: tuple[Any, ...]) -> Any:
    assert outcome[1] == "success", outcome
    return ast.literal_eval(outcome[2])


def test_a_task_is_accepted_and_its_result_comes_back_as_text(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    child.run(1, "add", 1, 2)
    assert child.frame() == ("accepted", 1)
    assert child.outcome()[:3] == (1, "success", "3")


def test_a_late_ack_task_is_not_announced(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    child.run(1, "add", 1, 2, acks_early=False)
    assert child.frame()[:2] == ("ended", 1)


def test_a_failure_comes_with_its_exception_and_traceback(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    child.run(1, "fail", "missing")
    number, kind, exception, traceback, *_ = child.outcome()
    assert (number, kind, exception) == (1, "failure", "KeyError('missing')")
    assert traceback.endswith("KeyError: 'missing'\n")
    assert "pool_app.py" in traceback
    assert "celeriac/child.py" not in traceback


def test_retry_sends_the_new_message_before_it_is_reported(tmp_path: Path) -> None:
    queue = tmp_path / "queue"
    queue.mkdir()
    options = {"data_folder_in": str(queue), "data_folder_out": str(queue), "control_folder": str(tmp_path)}
    settings = {"broker_url": "filesystem://", "broker_transport_options": options}
    with Supervisor(plan(**settings)) as supervisor:
        child = supervisor.fork()
        child.run(1, "retry", headers={"retries": 1}, exchange="", routing_key="celery")
        assert child.outcome()[:3] == (1, "retry", "ValueError('again')")
        (sent,) = queue.iterdir()
        headers = json.loads(sent.read_text())["headers"]
        assert (headers["id"], headers["retries"]) == ("id-1", 2)


@pytest.mark.parametrize("requeue", [False, True])
def test_reject_says_whether_the_message_goes_back(supervisor: Supervisor, requeue: bool) -> None:
    child = supervisor.fork()
    child.run(1, "reject", requeue)
    assert child.outcome()[1:4] == ("rejected", requeue, '"unwanted"')


def test_ignore_has_an_outcome_of_its_own(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    child.run(1, "ignore")
    assert child.outcome()[:2] == (1, "ignored")


def test_a_body_that_cannot_be_decoded_is_not_accepted(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    child.run(1, "add", body=b"{")
    name, number, kind, reason = child.frame()
    assert (name, number, kind) == ("ended", 1, "undecodable")
    assert "JSONDecodeError" in reason


@pytest.mark.parametrize("body", [b"[1, 2]", b"7", b"null", b'[[], {}, "text"]'])
def test_a_body_of_the_wrong_shape_is_malformed_and_not_accepted(supervisor: Supervisor, body: bytes) -> None:
    child = supervisor.fork()
    child.run(1, "add", body=body)
    assert child.frame()[:3] == ("ended", 1, "malformed")


def test_a_content_type_that_is_not_accepted_is_refused_unread(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    child.run(1, "add", body=pickle.dumps(([], {}, {})), content_type="application/x-python-serialize")
    name, _, kind, reason = child.frame()
    assert (name, kind) == ("ended", "malformed")
    assert "untrusted content" in reason


def test_pickle_is_decoded_where_it_is_accepted() -> None:
    with Supervisor(plan(accept_content=["pickle"])) as supervisor:
        child = supervisor.fork()
        body = pickle.dumps(((1,), {"y": 4}, None))
        child.run(1, "add", body=body, content_type="application/x-python-serialize", content_encoding="binary")
        assert child.outcome()[2] == "5"


def test_a_compressed_body_is_unpacked_first(supervisor: Supervisor) -> None:
    child = supervisor.fork()

    child.run(1, "add", body=zlib.compress(b"[[1, 6], {}, {}]"), headers={"compression": "application/x-gzip"})
    assert child.outcome()[2] == "7"
    child.run(2, "add", body=gzip.compress(b"x")[:5], headers={"compression": "application/x-gzip"})
    assert child.outcome()[1] == "undecodable"


def test_arguments_that_are_no_mapping_end_as_a_failure(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    child.run(1, "add", body=b"[[1, 2], [], {}]")
    kind, exception = child.outcome()[1:3]
    assert (kind, exception) == ("failure", "InvalidTaskError('Task keyword arguments is not a mapping')")


def test_a_child_looks_to_user_code_as_one_of_celerys(supervisor: Supervisor) -> None:
    first, second = supervisor.fork(0), supervisor.fork(1)
    seen = []
    for child in (first, second):
        child.run(1, "who", headers={"traceparent": "00-x"})
        seen.append(result(child.outcome()))
    for number, who in enumerate(seen, 1):
        assert (who["name"], who["class"]) == (f"ForkPoolWorker-{number}", "ForkProcess")
        assert (who["index"], who["daemon"], who["same"]) == (number - 1, True, True)
        assert who["stdin"] == "/dev/null"
        assert (who["reply_to"], who["correlation_id"]) == ("replies", "id-1")
        assert who["hostname"] == "celery@test"
        assert who["headers"] == {"traceparent": "00-x"}
        assert who["delivery_info"] == {
            "exchange": "ex",
            "routing_key": "rk",
            "priority": 3,
            "redelivered": False,
        }
    assert seen[0]["random"] != seen[1]["random"]


def test_values_that_json_lacks_come_back_from_their_notation(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    stamp = {"__type__": "uuid", "__value__": {"hex": "12345678123446788234567812345678", "version": 4}}
    child.run(1, "who", headers={"stamp": stamp})
    outcome = child.outcome()
    assert "UUID('12345678-1234-4678-8234-567812345678')" in outcome[2]


def test_a_soft_limit_is_raised_in_the_task_once(supervisor: Supervisor, tmp_path: Path) -> None:
    child = supervisor.fork()
    started = tmp_path / "started"
    child.run(1, "sleep", 600, str(started))
    until(started.exists)
    supervisor.signal(child, signal.SIGUSR1)
    assert child.outcome()[1:3] == ("success", "'soft limit'")
    # Outside of a task it means nothing.
    supervisor.signal(child, signal.SIGUSR1)
    child.run(2, "add", 1, 1)
    assert child.outcome()[2] == "2"


def test_a_child_that_is_killed_is_reported_with_its_signal(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    child.run(1, "die", signal.SIGKILL)
    child.expect("accepted")
    assert supervisor.exit_code(child) == -signal.SIGKILL
    with pytest.raises(EOFError):
        child.frame()


@pytest.mark.parametrize(("code", "status", "exit_code"), [(3, "exitcode 3", 3), (None, "exitcode 0", 0)])
def test_a_task_that_exits_takes_its_child_along(
    supervisor: Supervisor, code: int | None, status: str, exit_code: int
) -> None:
    child = supervisor.fork()
    child.run(1, "leave", code)
    assert child.outcome()[:3] == (1, "lost", status)
    assert supervisor.exit_code(child) == exit_code


def test_term_ends_a_running_task_through_its_finally_blocks(supervisor: Supervisor, tmp_path: Path) -> None:
    child = supervisor.fork()
    child.run(1, "cleanup", str(tmp_path / "left"))
    child.expect("accepted")
    until((tmp_path / "left").exists)
    supervisor.signal(child, signal.SIGTERM)
    # As billiard: minus 256 plus the signal, of which the kernel keeps a byte.
    assert supervisor.exit_code(child) == 15
    with pytest.raises(EOFError):
        child.frame()
    assert (tmp_path / "left").read_text() == "finally"


def test_exit_hooks_run_in_order_when_a_child_leaves(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with pool_app.journal_signals(journal), Supervisor(plan()) as supervisor:
        child = supervisor.fork()
        assert journal.read_text() == f"create\ninit {SENDER}\n"
        child.run(1, "at_exit", str(journal))
        child.outcome()
        child.stop()
        assert supervisor.exit_code(child) == 0
        child = supervisor.fork()
        child.recycle()
        assert supervisor.exit_code(child) == 155
    lines = journal.read_text().splitlines()
    assert lines == [
        "create",
        f"init {SENDER}",
        "shutdown 0",
        "atexit",
        "create",
        f"init {SENDER}",
        "shutdown 155",
    ]


def test_what_was_made_before_the_fork_outlives_the_child() -> None:
    # As a module's temporary folder: Celery's children leave without a word, and so do not remove it.
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("prefork", "threads"):
            with Supervisor(plan(kind)) as supervisor:
                child = supervisor.fork()
                child.stop()
                assert supervisor.exit_code(child) == 0
        assert Path(folder).exists()


def test_an_exit_hook_that_hangs_does_not_keep_the_child(supervisor: Supervisor, monkeypatch: Any) -> None:
    child = supervisor.fork()
    child.run(1, "hang_at_exit")
    child.outcome()
    child.stop()
    assert supervisor.exit_code(child) == 1


def test_a_stop_waits_for_the_running_task(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    child.run(1, "sleep", 0.3)
    child.stop()
    assert child.outcome()[2] == "'slept'"
    assert supervisor.exit_code(child) == 0


def test_a_child_dies_with_its_error_when_it_cannot_be_initialized(supervisor: Supervisor) -> None:
    with pool_app.failing_initializer(), Supervisor(plan()) as broken:
        number, _ = broken.request_fork()
        broken.report(zygote.FORKED, number)
        assert broken.report(zygote.EXITED, number) == 1


def test_a_worker_process_init_handler_that_raises_is_logged_and_the_child_works(tmp_path: Path) -> None:
    with pool_app.raising_init(), Supervisor(plan()) as supervisor:
        child = supervisor.fork()
        child.run(1, "add", 1, 1)
        assert child.outcome()[2] == "2"


def test_the_heap_that_children_share_is_frozen(supervisor: Supervisor) -> None:
    child = supervisor.fork()
    child.run(1, "frozen")
    assert result(child.outcome()) > 10_000


def test_no_child_holds_the_socket_of_another() -> None:
    # Other tests of this process may have left connections open, and a fork copies them.
    inherited = set(pool_app.open_sockets())
    with Supervisor(plan()) as supervisor:
        for child in (supervisor.fork(0), supervisor.fork(1)):
            child.run(1, "sockets")
            assert len(set(result(child.outcome())) - inherited) == 1


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_no_process_outlives_a_killed_supervisor(pool: str) -> None:
    script = subprocess.Popen([sys.executable, HERE / "pool_supervisor.py", pool], stdout=subprocess.PIPE, text=True)
    assert script.stdout is not None
    pids = [int(pid) for pid in script.stdout.readline().split()]
    assert len(pids) == 3
    script.kill()
    script.wait()
    script.stdout.close()
    until(lambda: all(map(gone, pids)))


def test_a_twin_that_a_task_forked_does_not_speak_for_its_child(supervisor: Supervisor, tmp_path: Path) -> None:
    child = supervisor.fork()
    child.run(1, "twin", str(tmp_path / "left"))
    assert result(child.outcome()) != 0
    assert (tmp_path / "left").exists()
    child.run(2, "add", 1, 1)
    assert child.outcome()[:3] == (2, "success", "2")


def test_children_die_with_their_zygote() -> None:
    supervisor = Supervisor(plan())
    children = [supervisor.fork(index) for index in range(2)]
    os.kill(supervisor.pid, signal.SIGKILL)
    supervisor.__exit__()
    until(lambda: all(gone(child.pid) for child in children))


def test_signals_for_the_whole_process_group_leave_the_zygote_alone(supervisor: Supervisor) -> None:
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"):
        os.kill(supervisor.pid, getattr(signal, name))
    child = supervisor.fork()
    child.run(1, "add", 1, 1)
    assert child.outcome()[2] == "2"


def test_threads_run_side_by_side_in_one_main_process() -> None:
    with Supervisor(plan("threads", lanes=2)) as supervisor:
        child = supervisor.fork()
        child.run(1, "sleep", 600)
        child.expect("accepted")
        child.run(2, "who")
        who = result(child.outcome())
        assert (who["name"], who["index"]) == ("MainProcess", None)
        for number in range(3, 6):
            child.run(number, "add", 1, number)
            assert child.outcome()[:3] == (number, "success", str(1 + number))


def test_solo_keeps_its_stdin_and_says_process_init(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    with pool_app.journal_signals(journal), Supervisor(plan("solo")) as supervisor:
        child = supervisor.fork()
        child.run(1, "who")
        who = result(child.outcome())
        assert who["name"] == "MainProcess"
        assert who["stdin"] == os.readlink("/proc/self/fd/0")
        child.stop()
        assert supervisor.exit_code(child) == 0
    assert journal.read_text().splitlines() == ["create", "init celery@test"]
