"""A child: takes jobs from the supervisor, runs them through Celery's own tracer, says how they ended."""

from __future__ import annotations

import atexit
import faulthandler
import json
import logging
import os
import pickle
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import billiard
from billiard import common as billiard_common
from billiard import util as billiard_util
from billiard.common import human_status, reset_signals
from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from billiard.pool import MaybeEncodingError
from celery import platforms, signals
from celery._state import _set_task_join_will_block
from celery.app import trace
from celery.app.task import Context
from celery.apps.worker import install_rdb_handler
from celery.concurrency import prefork
from celery.exceptions import Ignore, InvalidTaskError, Reject, Retry, SoftTimeLimitExceeded
from celery.utils.log import get_logger
from celery.utils.serialization import get_pickled_exception
from kombu import compression, serialization
from kombu.exceptions import ContentDisallowed
from kombu.utils import json as kombu_json
from kombu.utils.encoding import safe_repr, safe_str

from celeriac import backends, continuations, protocol1, tracer
from celeriac._core import ChildPipe
from celeriac.properties import repeat_headers

if TYPE_CHECKING:
    from celeriac._core import Job
    from celeriac.zygote import Plan

logger = get_logger("celery.pool")

EX_OK, EX_FAILURE, EX_RECYCLE = 0, 1, 0x9B

#: Exit hooks (exporters that flush, mostly) have this long; then the stack of what hung is written to stderr.
EXIT_LIMIT = 5.0


class Started(NamedTuple):
    """A job that was decoded and may run."""

    number: int
    task: Any
    uuid: str
    args: Any
    kwargs: Any
    request: dict[str, Any] | tracer.Deferred
    acks_early: bool
    trace: tracer.Tracer


def main(plan: Plan, number: int, index: int, descriptor: int, *, looped: bool = False) -> int:
    """The whole life of a child, from the fork on. Gives its exit status. `looped`: it runs an event loop."""
    _leave_finalizers_to_their_owner()
    if plan.kind == "prefork":
        return _prefork(plan, number, index, descriptor, looped)
    return _in_main_process(plan, descriptor)


def _leave_finalizers_to_their_owner() -> None:
    """What an import has made lives on in the other processes: no child removes a module's temporary folder."""
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False


def _prefork(plan: Plan, number: int, index: int, descriptor: int, looped: bool) -> int:
    # Billiard's own process object does what it does in Celery: name and index that logs and user code read,
    # stdin from /dev/null, fresh logging locks, after-fork hooks of the app and its pools.
    process = billiard.get_context("fork").Process(
        target=_prefork_body, args=(plan, descriptor, looped), name=f"ForkPoolWorker-{number}"
    )
    process.daemon = True
    process.index = index
    status: int = process._bootstrap()
    return status


def _prefork_body(plan: Plan, descriptor: int, looped: bool) -> None:
    # Billiard's mark that its handler of TERM has run; 4.3 has functions for it, 4.2 has not.
    billiard_common._should_have_exited[0] = False
    for name in ("SIGQUIT", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    pipe = ChildPipe(descriptor, looped=looped)
    run = _looped(plan, pipe) if looped else _one_by_one(plan, pipe)
    status: int | None = EX_FAILURE
    try:
        prefork.process_initializer(plan.app, plan.hostname)
        reset_signals()
        signal.signal(signal.SIGUSR1, _on_soft_limit)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        install_rdb_handler()
        pipe.up()
        status = run()
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else EX_FAILURE
        raise
    except Exception:
        logger.exception("Pool process %r error", os.getpid())
        raise
    finally:
        prefork.process_destructor(os.getpid(), status)
        _run_exit_hooks()
    sys.exit(status)


def _one_by_one(plan: Plan, pipe: ChildPipe) -> Callable[[], int]:
    writer = backends.install(plan.app, pipe) if plan.native_results else None
    return lambda: Lane(plan, pipe, writer).run()


def _looped(plan: Plan, pipe: ChildPipe) -> Callable[[], int]:
    # It needs a package that others do not.
    from celeriac.loop import Loop

    return Loop(plan, pipe).run


def _in_main_process(plan: Plan, descriptor: int) -> int:
    """`threads` and `solo`: to user code this is the worker's main process."""
    billiard_util._finalizer_registry.clear()
    billiard_util._run_after_forkers()
    # Only the supervisor answers the terminal and the service manager.
    for name in ("SIGTERM", "SIGQUIT", "SIGHUP", "SIGINT", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    platforms.set_mp_process_title("celeryd", hostname=plan.hostname)
    pipe = ChildPipe(descriptor)
    app = plan.app
    writer = backends.install(app, pipe) if plan.native_results else None
    _set_task_join_will_block(True)
    for name, task in app.tasks.items():
        task.__trace__ = trace.build_tracer(name, task, app.loader, plan.hostname, app=app)
    if plan.kind == "solo":
        signals.worker_process_init.send(sender=plan.hostname)
    try:
        pipe.up()
        if plan.lanes == 1:
            return Lane(plan, pipe, writer).run()
        return _run_threads(plan, pipe, writer)
    finally:
        _run_exit_hooks()


def _run_threads(plan: Plan, pipe: ChildPipe, writer: backends.Writer | None) -> int:
    status = [EX_OK]

    def run() -> None:
        status[0] = max(status[0], Lane(plan, pipe, writer).run())

    threads = [
        threading.Thread(target=run, name=f"ThreadPoolExecutor-0_{lane}", daemon=True) for lane in range(plan.lanes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return status[0]


def _run_exit_hooks() -> None:
    """What the interpreter does when it ends by itself, under a time limit."""
    faulthandler.dump_traceback_later(EXIT_LIMIT, exit=True, file=sys.__stderr__ or 2)
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    finally:
        faulthandler.cancel_dump_traceback_later()


#: The jobs that run in this process and may be interrupted: soft limits exist with `prefork` only.
_interruptible = False


def _on_soft_limit(signum: int, frame: object) -> None:
    # It may arrive when its task has just ended.
    if _interruptible:
        raise SoftTimeLimitExceeded()


class Lane:
    """Runs one job after the other."""

    def __init__(
        self, plan: Plan, pipe: ChildPipe, writer: backends.Writer | None, current: backends.Job | None = None
    ) -> None:
        self.plan = plan
        self.pipe = pipe
        self.writer = writer
        self.tasks = plan.app.tasks
        #: What runs in this lane, for those who speak to the supervisor on its behalf.
        self.current = current or (writer.job if writer else backends.Job())
        self.continuations = _continuations(plan, pipe, writer, self.current)
        self.accept = serialization.prepare_accept_content(plan.app.conf.accept_content)
        self.tracers = tracer.Tracers(plan, writer)
        # JSON without kombu's notation for other types, most of it, is decoded without kombu's hook on every object.
        self.plain_json = tracer.reads_plain_json(plan.app)

    def run(self) -> int:
        """Until it is told to leave; gives the exit status."""
        pipe = self.pipe
        while True:
            job = pipe.recv()
            if job is None:
                return EX_FAILURE
            if isinstance(job, int):
                return job
            leave = self.call(*job) if len(job) == 2 else self.job(job)
            if leave is not None:
                return leave

    def job(self, job: Job) -> int | None:
        """Runs one job; gives an exit status when the process has to go."""
        global _interruptible
        started = self.begin_plain(job) or self.begin(job)
        if started is None:
            return None
        number = started.number
        try:
            # From the acceptance on: that is when the soft limit begins to run.
            _interruptible = True
            if started.acks_early:
                self.pipe.accepted(number)
            answer = self.trace(started)
            _interruptible = False
        except BaseException as exc:
            _interruptible = False
            return self.escaped(number, started.task, started.request, exc)
        return self.ended(number, answer)

    def trace(self, started: Started) -> Any:
        """Runs a task through its tracer."""
        current = self.current
        current.number, current.task, current.uuid = started.number, started.task, started.uuid
        try:
            return started.trace(started.uuid, started.args, started.kwargs, started.request)
        finally:
            current.number = 0

    def ended(self, number: int, answer: Any) -> int | None:
        """Says what a tracer has answered; gives an exit status when the process has to go."""
        retval, info, runtime, retstr = answer
        if info is None and not isinstance(retval, ExceptionInfo):
            self.pipe.succeeded(number, str(retstr), runtime or 0.0)
            return None
        return self.unsuccessful(number, retval, runtime or 0.0)

    def begin_plain(self, job: Job) -> Started | None:
        """Decodes the job of a plain task; None where it takes more than that."""
        number, name, uuid, *_, hints, body, content_type, content_encoding, acks_early = job
        trace = self.tracers.of(name)
        if trace is None:
            return None
        payload = self.tracers.payload(body, content_type, content_encoding, hints)
        if payload is None:
            return None
        args, kwargs, embed = payload
        request = tracer.Deferred(hints, self.whole_request, job, args, kwargs, embed)
        return Started(number, self.tasks[name], uuid, args, kwargs, request, acks_early, trace)

    def begin(self, job: Job) -> Started | None:
        """Decodes a job; None where it can go no further, which the supervisor was told then."""
        number, name, uuid, *_, body, content_type, content_encoding, acks_early = job
        pipe = self.pipe
        try:
            request = self.request(job)
            packed = request.get("compression")
            content = compression.decompress(body, packed) if packed else body
            payload = self.decode(content, content_type, content_encoding)
        except ContentDisallowed as exc:
            pipe.malformed(number, str(exc))
            return None
        except Exception as exc:
            pipe.undecodable(number, safe_repr(exc))
            return None
        if not name or isinstance(payload, dict):
            self.translate(job, payload)
            return None
        try:
            args, kwargs, embed = payload
            embed = dict(embed or {})
            task = self.tasks[name]
        except (TypeError, ValueError) as exc:
            pipe.malformed(number, f"the body is not [args, kwargs, options]: {exc}")
            return None
        except KeyError:
            pipe.malformed(number, f"task {name!r} is not registered in the child")
            return None
        if self.continuations and any(map(embed.get, tracer.FOLLOWING)):
            self.continuations.prepare(embed)
        self.complete(request, args, kwargs, embed)
        return Started(number, task, uuid, args, kwargs, request, acks_early, task.__trace__)

    def call(self, number: int, body: bytes) -> int | None:
        """Runs what the parent process posted to the pool, as billiard does; gives an exit status when the process
        has to go."""
        global _interruptible
        self.pipe.accepted(number)
        try:
            function, args, kwargs = pickle.loads(body)
            _interruptible = True
            answer = (True, function(*args, **kwargs))
            _interruptible = False
        except BaseException as exc:
            _interruptible = False
            if billiard_common._should_have_exited[0]:
                raise
            if self.interrupted(number, exc):
                return None
            answer = (False, ExceptionInfo())
            if isinstance(exc, SystemExit | KeyboardInterrupt) and self.plan.alone:
                code, status = exit_of(exc)
                self.pipe.answered(number, pickle.dumps(answer, pickle.HIGHEST_PROTOCOL), lost=status)
                return code
        try:
            value = pickle.dumps(answer, pickle.HIGHEST_PROTOCOL)
        except Exception as exc:
            try:
                raise MaybeEncodingError(exc, answer[1]) from None
            except MaybeEncodingError:
                value = pickle.dumps((False, ExceptionInfo()), pickle.HIGHEST_PROTOCOL)
        self.pipe.answered(number, value)
        return None

    def decode(self, content: bytes, content_type: str, content_encoding: str) -> Any:
        """What kombu makes of a body; raises what it raises."""
        if self.plain_json and content_type == "application/json" and tracer.is_plain(content):
            try:
                return json.loads(content.decode())
            except ValueError:
                # Kombu words it.
                pass
        return serialization.loads(content, content_type, content_encoding, accept=self.accept)

    def translate(self, job: Job, payload: Any) -> None:
        """Hands a protocol 1 message back as protocol 2, for the supervisor to judge."""
        number, _, _, headers, *_, content_type, _, _ = job
        try:
            made = protocol1.translate(payload, _loads(headers), content_type)
        except protocol1.NotATask:
            self.pipe.malformed(number, None)
        except InvalidTaskError as exc:
            self.pipe.malformed(number, str(exc))
        except Exception as exc:
            self.pipe.undecodable(number, safe_repr(exc))
        else:
            self.pipe.translated(number, *made)

    def whole_request(self, job: Job, args: Any, kwargs: Any, embed: dict[str, Any]) -> dict[str, Any]:
        """The request with what the body says."""
        request = self.request(job)
        self.complete(request, args, kwargs, embed)
        return request

    def complete(self, request: dict[str, Any], args: Any, kwargs: Any, embed: dict[str, Any]) -> None:
        request.update({"args": args, "kwargs": kwargs, "hostname": self.plan.hostname, "is_eager": False}, **embed)

    def request(self, job: Job) -> dict[str, Any]:
        """What Celery's `Request` makes of a message for the tracer."""
        _, _, _, headers, properties, exchange, routing_key, redelivered, *_ = job
        request: dict[str, Any] = _loads(headers)
        props: dict[str, Any] = _loads(properties)
        repeat_headers(props, request)
        request["properties"] = props
        request["reply_to"] = props.get("reply_to")
        request["correlation_id"] = props.get("correlation_id")
        request["hostname"] = self.plan.hostname
        request["delivery_info"] = {
            "exchange": exchange,
            "routing_key": routing_key,
            "priority": props.get("priority"),
            "redelivered": redelivered,
        }
        return request

    def unsuccessful(self, number: int, einfo: Any, runtime: float) -> int | None:
        """Says how a task ended that the tracer has accounted for."""
        exc = einfo.exception
        if isinstance(exc, ExceptionWithTraceback):
            exc = exc.exc
        traceback = safe_str(einfo.traceback)
        pipe = self.pipe
        if isinstance(exc, Reject):
            pipe.rejected(number, bool(exc.requeue), _as_json(exc.reason), traceback)
        elif isinstance(exc, Ignore):
            pipe.ignored(number)
        elif isinstance(exc, Retry):
            pipe.retried(number, safe_repr(exc.exc), traceback)
        else:
            pipe.failed(number, _describe(einfo), traceback, runtime)
            if isinstance(exc, MemoryError) and self.plan.alone:
                # As in Celery the process is not trusted any more.
                return EX_FAILURE
        return None

    def escaped(
        self, number: int, task: Any, request: dict[str, Any] | tracer.Deferred, exc: BaseException
    ) -> int | None:
        """Accounts for what the tracer let through."""
        if billiard_common._should_have_exited[0]:
            # We were told to die and the task did not finish: the supervisor knows why.
            raise exc
        if self.interrupted(number, exc):
            return None
        # Other tasks run in a process of threads or greenlets: one of them cannot end it.
        if isinstance(exc, SystemExit | KeyboardInterrupt) and self.plan.alone:
            return self.exited(number, exc)
        einfo = ExceptionInfo()
        if isinstance(exc, Reject | Ignore | Retry):
            return self.unsuccessful(number, einfo, 0.0)
        context = request if isinstance(request, Context) else Context(request)
        ignored = task.ignore_result if context.ignore_result is None else context.ignore_result
        try:
            task.backend.mark_as_failure(
                context.id,
                exc,
                request=context,
                store_result=not ignored or task.store_errors_even_if_ignored,
            )
        except Exception:
            logger.exception("Task %s[%s]: the failure could not be stored", task.name, context.id)
        signals.task_failure.send(
            sender=task,
            task_id=context.id,
            exception=exc,
            args=context.args,
            kwargs=context.kwargs,
            traceback=einfo.traceback,
            einfo=einfo,
        )
        logger.error("Task handler raised error: %r", exc, exc_info=einfo.exc_info)
        return self.unsuccessful(number, einfo, 0.0)

    def interrupted(self, number: int, exc: BaseException) -> bool:
        """Whether the supervisor had this raised to end the job, and has been told that it did."""
        return False

    def exited(self, number: int, exc: BaseException) -> int:
        """The task asked for the end of its process."""
        code, status = exit_of(exc)
        self.pipe.lost(number, status)
        return code


def exit_of(exc: BaseException) -> tuple[int, str]:
    """Exit status, and how billiard words it."""
    if not isinstance(exc, SystemExit):
        return EX_FAILURE, type(exc).__name__
    code = 0 if exc.code is None else exc.code
    code = code if isinstance(code, int) else EX_FAILURE
    return code, human_status(code)


def _continuations(
    plan: Plan, pipe: ChildPipe, writer: backends.Writer | None, job: backends.Job
) -> continuations.Continuations | None:
    """Asked again, because integrations may have put something of theirs around Celery in this process."""
    if not plan.native_continuations:
        return None
    rung = continuations.decide(plan.app, broker_native=True, results_native=plan.native_results)
    if rung.native:
        if writer:
            writer.counts = True
        return continuations.Continuations(plan.app, pipe, writer, job)
    logger.log(
        logging.WARNING if continuations.forced() else logging.DEBUG,
        "What follows a task is sent by Celery: %s",
        ", ".join(rung.reasons),
    )
    return None


def _loads(text: str) -> Any:
    if "__type__" in text or "\\u" in text:
        return kombu_json.loads(text)
    return json.loads(text)


def _as_json(reason: Any) -> str:
    """What a result document keeps of an exception's argument."""
    try:
        return str(kombu_json.dumps(reason))
    except Exception:
        return json.dumps(safe_repr(reason))


def _describe(einfo: Any) -> str:
    exc = get_pickled_exception(einfo.exception)
    if isinstance(exc, ExceptionWithTraceback):
        exc = exc.exc
    return str(safe_repr(exc))
