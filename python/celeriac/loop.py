"""A child with an event loop: many coroutine tasks at a time, each through Celery's own tracer.

Each runs in an asyncio task with a context (`contextvars`) of its own. There its coroutine runs, and a greenlet of
the same context runs the tracer: it gives the coroutine to the asyncio task, and so it does with whatever else would
block the loop, as a result that is to be written. Celery's stacks of tasks and requests are told apart by that context.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Generator
from concurrent import futures
from typing import TYPE_CHECKING, Any, cast

from celery import _state
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.log import get_logger
from greenlet import getcurrent, greenlet

from celeriac import aio, backends
from celeriac.child import EX_FAILURE, Lane, Started

if TYPE_CHECKING:
    from celeriac._core import ChildPipe
    from celeriac.zygote import Plan

logger = get_logger("celery.pool")

#: What the tasks have left running has so long to end when the child leaves, seconds.
LEFTOVERS = 2.0


class SoftLimit(SoftTimeLimitExceeded, asyncio.CancelledError):  # type: ignore[misc]
    """The soft limit as a coroutine meets it at its `await`: what the task expects, and to everything between it and
    the loop (groups, timeouts) a cancellation."""

    def __reduce__(self) -> Any:
        return SoftTimeLimitExceeded, self.args


# To users it is nothing else.
SoftLimit.__name__ = SoftLimit.__qualname__ = SoftTimeLimitExceeded.__name__


class Killed(BaseException):
    """A tracer meets it when its task was cancelled for good: the parent process accounts for the task."""


class Running:
    """One job."""

    def __init__(self) -> None:
        self.job = Job()
        self.task: asyncio.Task[None] | None = None
        #: Its asyncio task has begun, and may be cancelled.
        self.begun = False
        #: Its coroutine runs.
        self.inside = False
        #: The soft limit is to be raised in it.
        self.soft = False
        #: It was cancelled for good.
        self.killed = False


class Job:
    """As `backends.Job`, of one running task."""

    def __init__(self) -> None:
        self.number = 0
        self.task: Any = None
        self.uuid: str | None = None
        self.final = False
        self.redelivered = False


_running: contextvars.ContextVar[Running | None] = contextvars.ContextVar("celeriac_running", default=None)


class Current(backends.Job):
    """The job of whoever asks. Background tasks that outlive theirs have its number no more."""

    def __getattribute__(self, name: str) -> Any:
        running = _running.get()
        return getattr(backends.Job, name) if running is None else getattr(running.job, name)

    def __setattr__(self, name: str, value: Any) -> None:
        running = _running.get()
        if running is not None:
            setattr(running.job, name, value)


class Traced(greenlet):  # type: ignore[misc]
    """Runs one call of a tracer, and waits for coroutines and futures by giving them to its parent."""


def _ident(otherwise: Any) -> Any:
    """What Celery tells stacks apart by."""

    def ident() -> Any:
        return _running.get() or otherwise()

    return ident


def waiter() -> Any:
    """How a tracer waits for a coroutine; anybody else can await it."""
    here = getcurrent()
    return here.parent.switch if isinstance(here, Traced) else None


class Steps:
    """A coroutine, step by step, so that the soft limit can be raised at its `await`."""

    def __init__(self, coroutine: Any) -> None:
        self.coroutine = coroutine

    def __await__(self) -> Generator[Any, None, Any]:
        coroutine, running = self.coroutine, _running.get()
        assert running is not None, "set by whoever starts a job"
        failure: BaseException | None = None
        running.inside = True
        try:
            while True:
                try:
                    awaited = coroutine.send(None) if failure is None else coroutine.throw(failure)
                except StopIteration as stop:
                    return stop.value
                failure = None
                try:
                    yield awaited
                except asyncio.CancelledError as exc:
                    failure = exc
                    if running.soft and not running.killed:
                        running.soft = False
                        failure = SoftLimit()
                        if sys.version_info >= (3, 11) and running.task is not None:
                            running.task.uncancel()
                except BaseException as exc:
                    failure = exc
        finally:
            running.inside = False


class Pipe:
    """The supervisor, as writers and continuations see it; where an answer is waited for the loop goes on."""

    def __init__(self, pipe: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.pipe = pipe
        self.pid = pipe.pid
        self.loop = loop
        self.thread = threading.get_ident()
        self.waiting: dict[int, asyncio.Future[Any]] = {}
        self._flushing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def flush_soon(self) -> None:
        """One write for all that is said in this turn of the loop."""
        if threading.get_ident() != self.thread:
            self.loop.call_soon_threadsafe(self.flush_soon)
        elif not self._flushing:
            self._flushing = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        self.pipe.flush_kept()

    def store(self, *args: Any, wait: bool) -> str | None:
        # A coroutine cannot wait here: what it stores is written in its turn.
        reply = self.pipe.store(*args, wait=wait and isinstance(getcurrent(), Traced))
        self.flush_soon()
        error: str | None = self._answer(reply) if isinstance(reply, int) else reply
        return error

    def go_on(self, *args: Any, wait: bool, **kwargs: Any) -> str | None:
        if wait and not isinstance(getcurrent(), Traced):
            raise ValueError("a coroutine cannot wait for it")
        reply = self.pipe.go_on(*args, wait=wait, **kwargs)
        self.flush_soon()
        error: str | None = self._answer(reply) if isinstance(reply, int) else reply
        return error

    def count(self, *args: Any) -> Any:
        reply = self.pipe.count(*args)
        self.flush_soon()
        counted = self._answer(reply) if isinstance(reply, int) else reply
        if not isinstance(counted, tuple):
            raise RuntimeError(counted or "the member was not counted")
        return counted

    def _answer(self, serial: int) -> Any:
        answer = self.waiting[serial] = self.loop.create_future()
        return getcurrent().parent.switch(answer)

    def answered(self, serial: int, answer: Any) -> None:
        """The supervisor has answered; nobody waits any more where the task was cancelled."""
        waiting = self.waiting.pop(serial, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)


def _pause(seconds: float) -> None:
    here = getcurrent()
    if isinstance(here, Traced):
        here.parent.switch(asyncio.ensure_future(asyncio.sleep(seconds)))
    else:
        time.sleep(seconds)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Of uvloop where it is installed."""
    if aio.event_loop() == "uvloop":
        import uvloop

        made: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        return made
    return asyncio.new_event_loop()


class Loop:
    """The loop of a child. To be made before tracers are built."""

    def __init__(self, plan: Plan, pipe: ChildPipe) -> None:
        app = plan.app
        # One of its tasks cannot end the process: others run there.
        self.plan = dataclasses.replace(plan, lanes=max(plan.async_concurrency, 2))
        self.loop = new_event_loop()
        # For `worker_process_init` and `worker_process_shutdown`, which run beside the loop and not on it.
        asyncio.set_event_loop(self.loop)
        self.pipe = Pipe(pipe, self.loop)
        self.current = Current()
        self.writer = backends.install(app, cast("ChildPipe", self.pipe)) if plan.native_results else None
        if self.writer is not None:
            self.writer.job = self.current
            self.writer.pause = _pause
        self.running: dict[int, Running] = {}
        self.status: int | None = None
        self.broken = False
        self.lane: Lane | None = None
        stacks = [_state._task_stack, *(task.request_stack for task in app.tasks.values())]
        for stack in stacks:
            stack.__ident_func__ = _ident(stack.__ident_func__)
        aio.install(app)
        aio.waiter = waiter

    def run(self) -> int:
        """Until it is told to leave; gives the exit status."""
        self.lane = Lane(self.plan, cast("ChildPipe", self.pipe), self.writer, self.current)
        self.pipe.flush_kept()
        self.loop.add_reader(self.pipe.fileno(), self.on_readable)
        try:
            self.loop.run_forever()
        finally:
            self.loop.remove_reader(self.pipe.fileno())
            # `asyncio.run` of somebody's handler leaves none.
            asyncio.set_event_loop(self.loop)
        self.pipe.flush_kept()
        if self.broken or self.status is None:
            return EX_FAILURE
        self.loop.run_until_complete(self.clear())
        return self.status

    async def clear(self) -> None:
        """Ends what the tasks have left behind."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=LEFTOVERS)
        await self.loop.shutdown_asyncgens()

    def on_readable(self) -> None:
        """Something came from the supervisor."""
        try:
            self.take()
        except Exception:
            self.give_up("what came from the worker could not be begun")

    def give_up(self, why: str) -> None:
        """Ends the process, and with it what can no more be accounted for."""
        logger.critical("Process %r error: %s", os.getpid(), why, exc_info=True)
        self.broken = True
        self.loop.stop()

    def take(self) -> None:
        """Begins, ends and answers what has come."""
        taken = self.pipe.collect()
        if taken is None:
            # It is gone.
            self.loop.stop()
            return
        assert self.lane is not None, "made before the loop runs"
        jobs, stored, counted, interrupts, leave = taken
        for serial, answer in (*stored, *counted):
            self.pipe.answered(serial, answer)
        begun = [started for started in map(self.lane.begin, jobs) if started is not None]
        for started in begun:
            if started.acks_early:
                self.pipe.accepted(started.number)
        # Before any of them runs: one that was not accepted may be given to another child.
        self.pipe.flush_kept()
        for started in begun:
            self.start(started)
        for number, soft in interrupts:
            self.interrupt(number, soft)
        if leave is not None:
            self.status = leave
            self.leave()

    def start(self, started: Started) -> None:
        """Makes the asyncio task of a job."""
        running = self.running[started.number] = Running()
        context = contextvars.copy_context()
        context.run(_running.set, running)
        # The task takes a copy of the context that it is made in.
        running.task = context.run(self.loop.create_task, self.serve(running, started))
        running.task.add_done_callback(self.served)

    def served(self, task: asyncio.Task[None]) -> None:
        """Whatever a task does, its job has an outcome; without one it is as lost as if the process had died."""
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or isinstance(error, Exception):
            try:
                task.result()
            except BaseException:
                self.give_up("the outcome of a task could not be told")

    def interrupt(self, number: int, soft: bool) -> None:
        """Ends a job before its time. It may just have ended."""
        running = self.running.get(number)
        if running is None or running.task is None:
            return
        if not running.begun:
            self.loop.call_soon(self.interrupt, number, soft)
            return
        if soft:
            # What follows the coroutine is short.
            if not running.inside or running.killed:
                return
            running.soft = True
        else:
            running.killed = True
        running.task.cancel()

    async def serve(self, running: Running, started: Started) -> None:
        """Runs one job."""
        lane, number = self.lane, started.number
        assert lane is not None, "made before the loop runs"
        running.begun = True
        tracer = Traced(lane.trace)
        tracer.gr_context = getcurrent().gr_context
        try:
            answer = tracer.switch(started)
            while not tracer.dead:
                failure: BaseException | None = None
                value = None
                try:
                    value = await (Steps(answer) if asyncio.iscoroutine(answer) else answer)
                except BaseException as exc:
                    failure = exc
                if running.killed:
                    failure = Killed()
                answer = tracer.switch(value) if failure is None else _throw(tracer, failure)
            if not running.killed:
                lane.ended(number, answer)
        except BaseException as exc:
            if not running.killed:
                lane.escaped(number, started.task, started.request, exc)
        finally:
            if running.killed:
                self.pipe.terminated(number)
            running.job.number = 0
            del self.running[number]
            self.pipe.flush_soon()
            self.leave()

    def leave(self) -> None:
        """Stops the loop when the child has been told to leave and nothing runs."""
        if self.status is not None and not self.running:
            self.loop.stop()


def _throw(tracer: Traced, failure: BaseException) -> Any:
    """Raises in a tracer what its coroutine has raised, without the frames of this module."""
    traceback = failure.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    if isinstance(failure, SoftLimit):
        failure = SoftTimeLimitExceeded(*failure.args)
    elif isinstance(failure, asyncio.CancelledError):
        # What it awaited was cancelled, by no order of ours: a failure like others, and one that may be raised again
        # where somebody waits for the result without cancelling whoever does.
        failure = futures.CancelledError(*failure.args)
    return tracer.throw(type(failure), failure, traceback)
