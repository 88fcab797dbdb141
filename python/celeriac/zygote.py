"""The zygote: a single-threaded process with the app imported, which forks the children.

It exists so that no process ever forks while it has threads, and so that the children share the memory of
the imported app. It is itself forked before the worker starts any thread. It serves the control socket whose
records `src/pool/zygote.rs` describes, signals and reaps its children, and never touches the broker.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from celery import platforms, signals
from celery.concurrency.asynpool import AsynPool
from celery.utils.log import get_logger
from celery.utils.objects import Bunch
from celery.worker import WorkController

from celeriac import child, green, ladder

logger = get_logger("celery.pool")

RECORD = struct.Struct("<BIIi")
FORK, SIGNAL, RELOAD = 1, 2, 3
FORKED, FAILED, SIGNALLED, EXITED = 1, 2, 3, 4

#: Signals that a terminal or a service manager sends to every process of the worker: the supervisor alone
#: decides what they mean. Children have their own rules.
IGNORED = {
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGQUIT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
}


class Zygote(NamedTuple):
    """What the supervisor keeps of the zygote. `socket` is a descriptor that its owner has to close."""

    pid: int
    socket: int


@dataclass(frozen=True)
class Plan:
    """What every child of this pool is like."""

    app: Any
    hostname: str
    #: ``prefork``, ``threads``, ``solo``, ``gevent`` or ``eventlet``.
    kind: str = "prefork"
    #: Tasks that run at a time in one child; more than one only with threads and greenlets.
    lanes: int = 1
    #: Tasks that run at a time on one event loop.
    async_concurrency: int = 0
    #: Whether results go through the supervisor (`celeriac.backends.decide`).
    native_results: bool = False
    #: Whether callbacks and chain steps go through the supervisor (`celeriac.continuations.decide`).
    native_continuations: bool = False

    @property
    def alone(self) -> bool:
        """Whether a task has its child for itself, and may end it."""
        return self.lanes == 1 and self.kind not in green.KINDS

    @classmethod
    def of(cls, app: Any, hostname: str, config: dict[str, Any]) -> Plan:
        """The plan for a configuration of the core (`celeriac.config.build`)."""
        pool = config["pool"]
        kind = pool["kind"]
        return cls(
            app=app,
            hostname=hostname,
            kind=kind,
            lanes=pool["concurrency"] if kind in ("threads", *green.KINDS) else 1,
            async_concurrency=pool["async_concurrency"],
            native_results=config["backend"]["native"],
            native_continuations=ladder.continuations(app).rung == "native",
        )


def start(plan: Plan) -> Zygote:
    """Forks the zygote. To be called before the process has threads, and after the app is fully set up."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    gc.collect()
    # The app may have frozen its heap itself, and thaws it when it sees fit.
    frozen = gc.get_freeze_count()
    gc.freeze()
    _flush()
    supervisor = os.getpid()
    # The supervisor's handlers must not run in the zygote before it has its own.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, IGNORED)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if not frozen:
            gc.unfreeze()
        theirs.close()
        return Zygote(pid, ours.detach())
    _run(plan, supervisor, mask, ours, theirs)


def _run(
    plan: Plan, supervisor: int, mask: set[int | signal.Signals], ours: socket.socket, theirs: socket.socket
) -> NoReturn:
    """The zygote's life. Nothing may get out of here: above it is the supervisor's own code."""
    status = 1
    try:
        for signum in IGNORED:
            signal.signal(signum, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        # The supervisor's death ends this process at once, and with it the children.
        platforms.set_pdeathsig("SIGKILL")
        if os.getppid() == supervisor:
            ours.close()
            platforms.set_process_title(f"celeryd: {plan.hostname}:zygote")
            if plan.kind not in green.KINDS:
                warm(plan.app, plan.hostname)
            gc.collect()
            gc.freeze()
            _Server(plan, theirs).serve()
        status = 0
    except BaseException:
        logger.critical("The process that forks the children ends with an error", exc_info=True)
    finally:
        os._exit(status)


def _flush() -> None:
    """What is buffered must not be written by both sides of a fork."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()


def warm(app: Any, hostname: str) -> None:
    """Imports and touches what a first task would, so that children share it. Opens no connection."""
    for name in (
        "celery.app.trace",
        "celery.canvas",
        "celery.concurrency.prefork",
        "celery.result",
        "celery.worker.state",
        "kombu.compression",
        "kombu.pools",
        "kombu.serialization",
        "multiprocessing.util",
    ):
        importlib.import_module(name)
    steps: list[Callable[[], object]] = [
        app.finalize,
        lambda: app.amqp.router,
        lambda: app.amqp.queues,
        lambda: app.connection_for_write().get_transport_cls(),
        lambda: _touch_backend(app),
        lambda: _touch_tracer(app, hostname),
    ]
    for step in steps:
        # A child will meet the same error where the user can see it.
        with contextlib.suppress(Exception):
            step()


def _touch_backend(app: Any) -> None:
    from celery.app import backends

    cls, _ = backends.by_url(app.backend_cls or app.conf.result_backend, loader=app.loader)
    # Celery's own connect when they are first used; somebody else's might at once.
    if cls.__module__.startswith("celery.backends."):
        _ = app.backend


def _touch_tracer(app: Any, hostname: str) -> None:
    from celery.app import trace

    name, task = next(iter(app.tasks.items()))
    trace.build_tracer(name, task, app.loader, hostname, app=app)


class _Server:
    """Forks, signals and reaps, as the control socket says."""

    def __init__(self, plan: Plan, control: socket.socket) -> None:
        self.plan = plan
        self.control = control
        #: The living, by pid.
        self.numbers: dict[int, int] = {}
        self.wakeup, self.alarm = socket.socketpair()
        for end in (self.wakeup, self.alarm):
            end.setblocking(False)

    def serve(self) -> None:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self.alarm.fileno(), warn_on_full_buffer=False)
        while True:
            readable, _, _ = select.select([self.control, self.wakeup], [], [])
            if self.wakeup in readable:
                self.wakeup.recv(4096)
                self.reap()
            if self.control in readable and not self.command():
                break
        # The supervisor is gone or has ended the pool: whoever is left has no one to work for.
        for pid in self.numbers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def command(self) -> bool:
        """Carries one command out. False: the supervisor has hung up."""
        record, sockets, _, _ = socket.recv_fds(self.control, RECORD.size, 1)
        while record and len(record) < RECORD.size:
            record += self.control.recv(RECORD.size - len(record))
        if not record:
            return False
        kind, number, argument, value = RECORD.unpack(record)
        if kind == FORK:
            self.fork(number, argument, sockets[0], looped=bool(value))
        elif kind == SIGNAL:
            self.signal(number, value, group=bool(argument))
        elif kind == RELOAD:
            text = b""
            while len(text) < argument:
                part = self.control.recv(argument - len(text))
                if not part:
                    return False
                text += part
            self.reload(**json.loads(text))
        return True

    def reload(self, modules: list[str], reload: bool) -> None:
        """Loads modules, for the children that are forked from now on; as the supervisor has loaded them."""
        app = self.plan.app
        for module in modules:
            try:
                WorkController._maybe_reload_module(Bunch(app=app), module, force_reload=reload)
            except Exception:
                logger.exception("Module %s could not be loaded for the children", module)
        gc.collect()
        gc.freeze()

    def report(self, kind: int, number: int, value: int = 0, argument: int = 0) -> None:
        self.control.sendall(RECORD.pack(kind, number, argument, value))

    def fork(self, number: int, index: int, descriptor: int, *, looped: bool) -> None:
        signals.worker_before_create_process.send(sender=AsynPool)
        _flush()
        zygote = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            os.close(descriptor)
            self.report(FAILED, number, error.errno or errno.EAGAIN)
            return
        if pid == 0:
            self.become_child(zygote, number, index, descriptor, looped)
        os.close(descriptor)
        self.numbers[pid] = number
        self.report(FORKED, number, pid)

    def become_child(self, zygote: int, number: int, index: int, descriptor: int, looped: bool) -> NoReturn:
        """Never returns: above it is the zygote's own code."""
        status = 1
        try:
            platforms.set_pdeathsig("SIGKILL")
            if os.getppid() != zygote:
                os._exit(status)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self.control, self.wakeup, self.alarm):
                end.close()
            if self.plan.kind in green.KINDS:
                green.become(self.plan, descriptor)
            status = child.main(self.plan, number, index, descriptor, looped=looped)
        except BaseException:
            logger.critical("A child ends with an error outside of any task", exc_info=True)
        finally:
            os._exit(status)

    def signal(self, number: int, signum: int, *, group: bool) -> None:
        for pid, known in self.numbers.items():
            if known == number:
                # It was not reaped yet, so the pid is still its own.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    if group and os.getpgid(pid) == pid:
                        os.killpg(pid, signum)
                    else:
                        os.kill(pid, signum)
        self.report(SIGNALLED, number)

    def reap(self) -> None:
        while self.numbers:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            number = self.numbers.pop(pid, None)
            if number is not None:
                self.report(EXITED, number, os.waitstatus_to_exitcode(status), usage.ru_maxrss)
