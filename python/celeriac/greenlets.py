"""The child of a pool of greenlets. Python is patched, Celery and the app were imported after that (`celeriac.green`).

It goes through the start-up of `celery worker` for everything that user code can see of it (settings, logging,
`celeryd_init`, `worker_init`, `celeryd_after_setup`), and in the place of boot steps serves the supervisor: a greenlet
reads the frames, every job has a greenlet of its own.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn

from celery import platforms, signals
from celery._state import _set_task_join_will_block
from celery.app import trace
from celery.apps import worker as apps_worker
from celery.exceptions import WorkerShutdown
from celery.utils.log import get_logger
from greenlet import GreenletExit

from celeriac import backends, child, cli, json_lines, seam
from celeriac._core import ChildPipe
from celeriac.worker import OWN_VARIABLES
from celeriac.zygote import Plan

logger = get_logger("celery.pool")

#: How often it is asked whether the connection for results is there, seconds.
CONNECTING = 0.05


def main(spec: dict[str, Any]) -> NoReturn:
    """Until the supervisor lets it go."""
    status = child.EX_FAILURE
    ChildWorker.spec = spec
    try:
        seam.install("celeriac.greenlets:ChildWorker")
        status = cli.as_child()
    finally:
        child._run_exit_hooks()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)


class ChildWorker(apps_worker.Worker):  # type: ignore[misc]
    """Celery's worker program without boot steps: all that is left is its start-up, and then the pool."""

    spec: ClassVar[dict[str, Any]]

    class Blueprint(apps_worker.Worker.Blueprint):  # type: ignore[misc]
        """No steps: those of the app are the supervisor's."""

        def _finalize_steps(self, steps: dict[str, Any]) -> list[Any]:
            return []

    def should_use_eventloop(self) -> bool:
        """There is no kombu event loop."""
        return False

    def on_before_init(self, log_format: str | None = None, **kwargs: Any) -> None:
        """Lines are written as the supervisor writes them."""
        self.log_format = log_format or os.environ.get(OWN_VARIABLES["log_format"])
        super().on_before_init(**kwargs)

    def setup_logging(self, colorize: bool | None = None) -> Any:
        """Celery's own, with a formatter of ours where that is asked for."""
        if self.log_format != "json":
            return super().setup_logging(colorize)
        json_lines.install(self.app.log)
        return super().setup_logging(False)

    def on_start(self) -> None:
        """Celery's start-up, then the work."""
        # The supervisor has said it.
        self._pending_concurrency_log = None
        super().on_start()
        raise WorkerShutdown(serve(self.app, self.spec))

    def on_stopped(self) -> None:
        """There is no timer, no consumer and no pidfile to let go of."""

    def emit_banner(self) -> None:
        """The supervisor has shown it."""

    def purge_messages(self) -> None:
        """The supervisor has done it."""

    def set_process_status(self, info: str) -> None:
        """As the other pools whose tasks run in the main process."""
        platforms.set_mp_process_title("celeryd", hostname=self.hostname)

    def install_platform_tweaks(self, worker: apps_worker.Worker) -> None:
        """Only the supervisor answers signals, all but the one for Celery's debugger."""
        apps_worker.install_rdb_handler()


def serve(app: Any, spec: dict[str, Any]) -> int:
    """Runs what the supervisor sends; gives the exit status."""
    plan = Plan(
        app=app,
        hostname=spec["hostname"],
        kind=spec["kind"],
        lanes=spec["lanes"],
        native_results=spec["native_results"],
        native_continuations=spec["native_continuations"],
    )
    pool = Pool(plan, spec["descriptor"])
    share_backend(app)
    _set_task_join_will_block(False)
    for name, task in app.tasks.items():
        task.__trace__ = trace.build_tracer(name, task, app.loader, plan.hostname, app=app)
    return pool.run()


def share_backend(app: Any) -> None:
    """One backend object, with one connection that results are waited for on, for all greenlets.

    Celery keeps both for each thread, here for each greenlet: every task that sends another one connects anew.
    """
    app._local, app._backend_cache = SimpleNamespace(), None
    make = app._get_backend

    def guarded() -> Any:
        backend = make()
        consumer = getattr(backend, "result_consumer", None)
        if consumer is not None:
            first = FirstAlone(consumer)
            consumer.consume_from, consumer.drain_events = first.consume_from, first.drain_events
        return backend

    app._get_backend = guarded


class FirstAlone:
    """Has the first greenlet that waits for a result connect, and the others wait until it has.

    They would connect too and lose what that gets, or read what is meant for the one that connects.
    """

    def __init__(self, consumer: Any) -> None:
        self._consume_from: Callable[[str], Any] = consumer.consume_from
        self._drain_events: Callable[..., Any] = consumer.drain_events
        self._lock = threading.RLock()
        self._connected = False

    def consume_from(self, task_id: str) -> Any:
        """Subscribes to a result."""
        if self._connected:
            # Not under the lock: Celery has locks of its own here.
            return self._consume_from(task_id)
        with self._lock:
            answer = self._consume_from(task_id)
            self._connected = True
            return answer

    def drain_events(self, timeout: float | None = None) -> Any:
        """Reads what has come."""
        if self._connected:
            return self._drain_events(timeout=timeout)
        time.sleep(CONNECTING)
        return None


class Gevent:
    """What the pool needs of gevent."""

    def __init__(self, descriptor: int) -> None:
        import gevent
        from gevent.event import Event

        self.spawn: Callable[..., Any] = gevent.spawn
        self.event: Callable[[], Any] = Event
        self.hard_limit: Callable[[float], BaseException] = gevent.Timeout
        hub = gevent.get_hub()
        self._wait = hub.wait
        self._readable, self._writable = hub.loop.io(descriptor, 1), hub.loop.io(descriptor, 2)

    def readable(self) -> None:
        """Waits until there is something to read."""
        self._wait(self._readable)

    def writable(self) -> None:
        """Waits until something can be written."""
        self._wait(self._writable)

    @staticmethod
    def tell(event: Any) -> None:
        """Wakes who waits for the event, once."""
        event.set()

    @staticmethod
    def throw(greenlet: Any, exc: BaseException) -> None:
        """Raises in a greenlet, where it waits."""
        greenlet.kill(exc, block=False)


class Eventlet:
    """What the pool needs of eventlet."""

    def __init__(self, descriptor: int) -> None:
        import eventlet
        from eventlet import event, hubs

        self.spawn: Callable[..., Any] = eventlet.spawn
        self.event: Callable[[], Any] = event.Event
        # As Celery's: it has none. The supervisor asks for none.
        self.hard_limit: Callable[[float], BaseException] = eventlet.Timeout
        self.throw: Callable[[Any, BaseException], None] = eventlet.kill
        self._descriptor, self._wait = descriptor, hubs.trampoline

    def readable(self) -> None:
        """Waits until there is something to read."""
        self._wait(self._descriptor, read=True)

    def writable(self) -> None:
        """Waits until something can be written."""
        self._wait(self._descriptor, write=True)

    @staticmethod
    def tell(event: Any) -> None:
        """Wakes who waits for the event, once."""
        if not event.ready():
            event.send()


HUBS: dict[str, type[Gevent | Eventlet]] = {"gevent": Gevent, "eventlet": Eventlet}


class Lane(child.Lane):
    """Runs the jobs of all greenlets: what it keeps of the current one is local to each."""

    pool: Pool

    def interrupted(self, number: int, exc: BaseException) -> bool:
        """The supervisor has asked for the end of the job, and this is it."""
        return self.pool.interrupted(number, exc)


class Signals:
    """Those that Celery's pool of this kind sends."""

    def __init__(self, plan: Plan) -> None:
        self.sender: Any = None
        if plan.kind == "eventlet":
            from celery.concurrency.eventlet import TaskPool

            self.sender = TaskPool(plan.lanes, app=plan.app)

    def send(self, what: str) -> None:
        """`started`, `preshutdown`, `postshutdown`."""
        if self.sender is not None:
            getattr(signals, f"eventlet_pool_{what}").send(sender=self.sender)

    def apply(self, job: Any, lane: Lane) -> None:
        """A job is about to get its greenlet."""
        if self.sender is None or not signals.eventlet_pool_apply.receivers or len(job) == 2:
            return
        _, name, uuid, *_, body, content_type, content_encoding, _ = job
        arguments = (name, uuid, lane.request(job), body, content_type, content_encoding)
        signals.eventlet_pool_apply.send(sender=self.sender, target=trace.fast_trace_task, args=arguments, kwargs={})


class Pool:
    """The greenlets, and who waits for what. Everything but tasks runs without giving way."""

    def __init__(self, plan: Plan, descriptor: int) -> None:
        self.hub = HUBS[plan.kind](descriptor)
        self.pipe = ChildPipe(descriptor, hub=self)
        self.lane = Lane(plan, self.pipe, backends.install(plan.app, self.pipe) if plan.native_results else None)
        self.lane.pool = self
        self.signals = Signals(plan)
        self.running: dict[int, Any] = {}
        #: Those that have not begun: nothing can be raised in them.
        self.fresh: set[int] = set()
        #: What was raised in a job to end it, and the hard limit that it has passed, if that is why.
        self.ends: dict[int, tuple[BaseException, float | None]] = {}
        #: Greenlets that wait for an answer, by its number.
        self.waiting: dict[int, Any] = {}
        self.status: int | None = None
        self.leaving, self.idle = self.hub.event(), self.hub.event()

    def run(self) -> int:
        """Until it is told to leave and the last task has ended; gives the exit status."""
        self.signals.send("started")
        self.hub.spawn(self.read)
        self.pipe.up()
        self.leaving.wait()
        self.signals.send("preshutdown")
        if self.running:
            self.idle.wait()
        self.signals.send("postshutdown")
        return child.EX_FAILURE if self.status is None else self.status

    # --- what the pipe asks for ---

    def wait(self, serial: int) -> None:
        """Has this greenlet wait until the answer may be there."""
        event = self.waiting[serial] = self.hub.event()
        try:
            event.wait()
        finally:
            self.waiting.pop(serial, None)

    def behind(self) -> None:
        """The supervisor does not read as fast as tasks write: somebody has to see to the rest."""
        self.hub.spawn(self.write)

    def write(self) -> None:
        """Writes what could not be written at once."""
        while True:
            self.hub.writable()
            if not self.pipe.flush():
                return

    # --- what the supervisor asks for ---

    def read(self) -> None:
        """Takes what comes, until nothing can come any more."""
        try:
            while True:
                self.hub.readable()
                jobs, answered, interrupts, leave, closed = self.pipe.take()
                for job in jobs:
                    self.start(job)
                for serial in answered:
                    event = self.waiting.get(serial)
                    if event is not None:
                        self.hub.tell(event)
                for number, limit in interrupts:
                    self.interrupt(number, limit)
                if leave is not None and self.status is None:
                    self.status = leave
                    self.hub.tell(self.leaving)
                if closed:
                    return
        finally:
            # Nobody is left to work for.
            for event in (*self.waiting.values(), self.leaving, self.idle):
                self.hub.tell(event)

    def start(self, job: Any) -> None:
        """Gives a job its greenlet."""
        number = job[0]
        self.signals.apply(job, self.lane)
        self.fresh.add(number)
        self.running[number] = self.hub.spawn(self.job, number, job)

    def job(self, number: int, job: Any) -> None:
        """The life of a greenlet."""
        self.fresh.discard(number)
        try:
            if number in self.ends:
                self.report(number)
            elif len(job) == 2:
                self.lane.call(*job)
            else:
                self.lane.job(job)
        except BaseException as exc:
            logger.critical("A greenlet ends with an error outside of its task", exc_info=True)
            self.pipe.lost(number, repr(exc))
        finally:
            del self.running[number]
            self.ends.pop(number, None)
            if not self.running and self.status is not None:
                self.hub.tell(self.idle)

    def interrupt(self, number: int, limit: float | None) -> None:
        """Ends a job that runs: it has passed its hard limit, or was revoked."""
        greenlet = self.running.get(number)
        if greenlet is None or number in self.ends:
            return
        exc = GreenletExit() if limit is None else self.hub.hard_limit(limit)
        self.ends[number] = exc, limit
        if number not in self.fresh:
            self.hub.throw(greenlet, exc)

    def interrupted(self, number: int, exc: BaseException) -> bool:
        """Reports a job that ended because it was told to."""
        if number not in self.ends or self.ends[number][0] is not exc:
            return False
        self.report(number)
        return True

    def report(self, number: int) -> None:
        """Says that it has ended as it was told to."""
        limit = self.ends[number][1]
        if limit is None:
            self.pipe.terminated(number)
        else:
            self.pipe.timed_out(number, limit)
