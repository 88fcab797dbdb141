"""Tasks for the tests of the pool."""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import os
import pickle
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import billiard
from celery import Celery, Task, signals
from celery.concurrency import prefork
from celery.exceptions import BackendStoreError, Ignore, Reject, SoftTimeLimitExceeded


def open_sockets() -> list[str]:
    """The sockets of this process, by the names that the kernel has for them."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [name for name in names if name.startswith("socket:")]


def make(**settings: Any) -> Celery:
    app = Celery("pool_app", set_as_current=False)
    app.conf.update({"broker_url": "memory://", **settings})

    @app.task(shared=False, name="add")
    def add(x: int, y: int) -> int:
        return x + y

    @app.task(shared=False, name="fail")
    def fail(text: str) -> None:
        raise KeyError(text)

    @app.task(shared=False, name="retry", bind=True)
    def retry(self: Task) -> None:
        raise self.retry(exc=ValueError("again"), countdown=60)

    @app.task(shared=False, name="ignore")
    def ignore() -> None:
        raise Ignore

    @app.task(shared=False, name="reject")
    def reject(requeue: bool) -> None:
        raise Reject("unwanted", requeue=requeue)

    @app.task(shared=False, name="leave")
    def leave(code: Any) -> None:
        sys.exit(code)

    @app.task(shared=False, name="die")
    def die(signum: int) -> None:
        os.kill(os.getpid(), signum)
        time.sleep(60)

    @app.task(shared=False, name="sleep")
    def sleep(seconds: float, started: str | None = None) -> str:
        try:
            if started:
                Path(started).touch()
            time.sleep(seconds)
        except SoftTimeLimitExceeded:
            return "soft limit"
        return "slept"

    @app.task(shared=False, name="who", bind=True)
    def who(self: Task) -> dict[str, Any]:
        process = billiard.current_process()
        return {
            "name": process.name,
            "index": getattr(process, "index", None),
            "daemon": process.daemon,
            "same": process is multiprocessing.current_process(),
            "class": type(process).__name__,
            "stdin": os.readlink("/proc/self/fd/0"),
            "random": random.random(),
            "delivery_info": self.request.delivery_info,
            "reply_to": self.request.reply_to,
            "correlation_id": self.request.correlation_id,
            "hostname": self.request.hostname,
            "headers": self.request.headers,
        }

    @app.task(shared=False, name="cleanup")
    def cleanup(path: str) -> None:
        try:
            Path(path).touch()
            time.sleep(600)
        finally:
            Path(path).write_text("finally")

    @app.task(shared=False, name="at_exit")
    def at_exit(path: str) -> None:
        atexit.register(note, Path(path), "atexit")

    @app.task(shared=False, name="hang_at_exit")
    def hang_at_exit() -> None:
        from celeriac import child

        child.EXIT_LIMIT = 0.2
        atexit.register(time.sleep, 600)

    @app.task(shared=False, name="frozen")
    def frozen() -> int:
        return gc.get_freeze_count()

    app.task(open_sockets, shared=False, name="sockets")

    class Hooked(Task):
        def on_success(self, *_: Any) -> None:
            pass

    @app.task(shared=False, name="hooked", base=Hooked)
    def hooked() -> int:
        return 1

    @app.task(shared=False, name="tracked", track_started=True)
    def tracked() -> int:
        return 1

    @app.task(shared=False, name="update", bind=True)
    def update(self: Task) -> str:
        try:
            self.update_state(state="PROGRESS", meta={"done": 1})
        except BackendStoreError as exc:
            return str(exc)
        return "updated"

    @app.task(shared=False, name="forget", ignore_result=True)
    def forget() -> int:
        return 1

    @app.task(shared=False, name="fork_and_store", bind=True)
    def fork_and_store(self: Task) -> int:
        pid = os.fork()
        if pid == 0:
            self.update_state(state="FROM_A_FORK")
            os._exit(0)
        return os.waitpid(pid, 0)[1]

    @app.task(shared=False, name="twin")
    def twin(path: str) -> int:
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
        else:
            atexit.register(Path(path).touch)
        return pid

    @app.task(shared=False, name="pickle_result", bind=True)
    def pickle_result(self: Task) -> str:
        cls = type(pickle.loads(pickle.dumps(self.AsyncResult(self.request.id))).backend)
        return f"{cls.__name__} {cls.__mro__[1].__name__}"

    return app


def note(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


@contextlib.contextmanager
def journal_signals(path: Path) -> Iterator[None]:
    """Notes the signals of processes in a file."""

    def create(sender: object, **_: Any) -> None:
        note(path, "create")

    def init(sender: object, **_: Any) -> None:
        note(path, f"init {sender}")

    def shutdown(exitcode: int, **_: Any) -> None:
        note(path, f"shutdown {exitcode}")

    signals.worker_before_create_process.connect(create)
    signals.worker_process_init.connect(init)
    signals.worker_process_shutdown.connect(shutdown)
    try:
        yield
    finally:
        signals.worker_before_create_process.disconnect(create)
        signals.worker_process_init.disconnect(init)
        signals.worker_process_shutdown.disconnect(shutdown)


@contextlib.contextmanager
def watching(name: str) -> Iterator[None]:
    """A receiver of the app's own on a signal."""

    def watch(**_: Any) -> None:
        pass

    signal = getattr(signals, name)
    signal.connect(watch)
    try:
        yield
    finally:
        signal.disconnect(watch)


@contextlib.contextmanager
def raising_init() -> Iterator[None]:
    """A handler of the app's own that fails."""

    def init(**_: Any) -> None:
        raise ValueError("broken handler")

    signals.worker_process_init.connect(init)
    try:
        yield
    finally:
        signals.worker_process_init.disconnect(init)


@contextlib.contextmanager
def failing_initializer() -> Iterator[None]:
    """An initializer that an integration has replaced by one that fails."""
    original = prefork.process_initializer

    def initialize(*_: Any) -> None:
        raise RuntimeError("cannot start")

    prefork.process_initializer = initialize
    try:
        yield
    finally:
        prefork.process_initializer = original
