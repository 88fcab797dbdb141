"""The native rung of execution: plain tasks are traced by what Celery's tracer would do for them, and no more.

A task is plain where nothing of its app stands between Celery's tracer and its function. The way of success is here;
whatever else happens is left to Celery's own tracer, which then runs on the outcome that is there already
(`_core.replay`), so that failures, retries and the rest are Celery's own to the last line of their tracebacks.

What a task costs is mostly what is made for it and never looked at: its request is made when somebody asks for it.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import partial
from json.encoder import encode_basestring_ascii
from json.scanner import make_scanner
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from celery import signals, states
from celery._state import _task_stack
from celery.app import task as app_task
from celery.app import trace
from celery.app.task import Context
from celery.backends.base import Backend
from celery.loaders.base import BaseLoader
from celery.result import ResultBase
from celery.utils.saferepr import saferepr
from celery.utils.threads import Local, _LocalStack
from kombu import serialization
from kombu.utils import json as kombu_json
from kombu.utils.encoding import bytes_to_str

from celeriac import aio, backends
from celeriac._core import remember, replay

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Task

    from celeriac.zygote import Plan

#: Answers of a tracer: return value, Celery's account of what went wrong, seconds, text of the value.
Answer = tuple[Any, Any, Any, Any]
Tracer = Callable[[str, Any, Any, Any], Answer]
#: The C half of `json.loads`: what begins at a place of the text, and where it ends.
Scan = Callable[[str, int], tuple[Any, int]]

#: ``python`` has Celery's tracer run every task.
SWITCH = "CELERIAC_EXECUTION"

#: Bits of a job's hints, as src/pool/mod.rs sets them.
IGNORE, KEEP, RELATED, COMPRESSED = 1, 2, 4, 8

#: What a request says of what follows its task.
FOLLOWING = ("callbacks", "chain", "chord")

#: Of values of these types, and of short integers, `saferepr` makes what `repr` makes.
QUICK = (type(None), bool, float)
SHORT = 1 << 62


class Rung(NamedTuple):
    """Whose tracer runs tasks, and why."""

    native: bool
    reasons: list[str]


def decide(app: Celery, *, results_native: bool) -> Rung:
    """Whether plain tasks of this app can do without Celery's tracer."""
    reasons = list(_obstacles(app, results_native=results_native))
    return Rung(not reasons, reasons or ["plain tasks; Celery's tracer for what is not plain, and for all that fails"])


def _obstacles(app: Celery, *, results_native: bool) -> Iterator[str]:
    if os.environ.get(SWITCH) == "python":
        yield f"{SWITCH}=python"
    tracer = importlib.import_module("celery.app.trace").build_tracer
    name = f"{getattr(tracer, '__module__', '?')}:{getattr(tracer, '__qualname__', repr(tracer))}"
    if name != "celery.app.trace:build_tracer" or hasattr(tracer, "__wrapped__"):
        yield f"build_tracer is replaced by {name}"
    if trace.Context is not Context or Context is not app_task.Context:
        yield "Context is replaced"
    if not results_native:
        yield "results are written in the children"
    for hook in ("__call__", "before_start", "on_success", "after_return"):
        # Celery itself wraps `__call__` while a worker runs.
        if getattr(app_task.Task, hook).__module__ not in ("celery.app.task", "celery.app.trace"):
            yield f"Task.{hook} is replaced"
    loader = type(app.loader)
    for method in ("on_task_init", "on_process_cleanup"):
        if getattr(loader, method) is not getattr(BaseLoader, method):
            yield f"the loader has an {method} of its own"
    if app.backend.process_cleanup.__func__ is not Backend.process_cleanup:
        yield "the result backend has a process_cleanup of its own"


def of_task(task: Task) -> Iterator[str]:
    """What about a task asks for Celery's tracer."""
    for hook in ("__call__", "before_start", "on_success", "after_return"):
        if hook in vars(task) or getattr(type(task), hook) is not getattr(app_task.Task, hook):
            yield f"{hook} is its own"
    if task.track_started:
        yield "track_started"
    conf = task.app.conf
    if conf.get("worker_deduplicate_successful_tasks") and (conf.task_acks_late or task.acks_late):
        yield "worker_deduplicate_successful_tasks"
    if aio.is_async(task):
        yield "async def"
    if type(task.backend) is not type(task.app.backend):
        yield "a result backend of its own"


class Deferred(Context):  # type: ignore[misc]
    """A request that nobody has looked at: whoever does finds Celery's own in its place."""

    def __init__(self, hints: int, make: Callable[..., dict[str, Any]], *about: Any) -> None:
        object.__getattribute__(self, "__dict__").update(hints=hints, made_of=(make, about))

    def __getattribute__(self, name: str) -> Any:
        _fill(self)
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _fill(self)
        setattr(self, name, value)

    def __delattr__(self, name: str) -> None:
        _fill(self)
        delattr(self, name)


def _fill(request: Any) -> None:
    fields = object.__getattribute__(request, "__dict__")
    make, about = fields.pop("made_of")
    del fields["hints"]
    object.__setattr__(request, "__class__", Context)
    values = make(*about)
    Context.__init__(request, values, args=values["args"], called_directly=False, kwargs=values["kwargs"])
    # The task is being called: a call of it by itself gets a request of its own.
    request._protected = 1


class Tracers:
    """Those of an app's plain tasks, each made when its task first comes."""

    def __init__(self, plan: Plan, writer: backends.Writer | None) -> None:
        self.plan = plan
        self.writer = writer
        native = writer is not None or not _stores(plan.app.backend)
        self.native = decide(plan.app, results_native=native).native
        self.known: dict[str, Tracer | None] = {}
        #: Unless somebody has put something of theirs around it, JSON is read without kombu's hook on every object.
        self.scan: Scan | None = None
        if reads_plain_json(plan.app):
            self.scan = make_scanner(json.JSONDecoder())  # type: ignore[arg-type]

    def of(self, name: str) -> Tracer | None:
        """The tracer of a task; none where it is not plain."""
        try:
            return self.known[name]
        except KeyError:
            task = self.plan.app.tasks.get(name)
            plain = self.native and task is not None and _is_celerys(task.__trace__) and not any(of_task(task))
            made = self.known[name] = build(task, self.plan, self.writer) if plain else None
            return made

    def payload(self, body: bytes, content_type: str, content_encoding: str, hints: int) -> Any:
        """Arguments and options of a plain message; None where kombu or Celery may make more of it than JSON says, or
        where something follows the task."""
        if (
            self.scan is None
            or content_type != "application/json"
            or content_encoding != "utf-8"
            or hints & COMPRESSED
            or not is_plain(body)
        ):
            return None
        try:
            text = body.decode()
            payload, end = self.scan(text, 0)
            args, kwargs, embed = payload
        except (ValueError, TypeError, StopIteration):
            return None
        if end != len(text) or type(args) is not list or type(kwargs) is not dict or type(embed) is not dict:
            return None
        if any(map(embed.get, FOLLOWING)):
            return None
        return args, kwargs, embed


def reads_plain_json(app: Celery) -> bool:
    """Whether the app's JSON is decoded by kombu's own code, and may be."""
    registry = serialization.registry
    return bool(
        serialization.loads == registry.loads
        and registry._decoders.get("application/json") is kombu_json.loads
        and "application/json" not in registry._disabled_content_types
        and "application/json" in serialization.prepare_accept_content(app.conf.accept_content)
    )


def is_plain(text: bytes) -> bool:
    """No `__type__`, not even in disguise."""
    return b"__type__" not in text and b"\\u" not in text


def _stores(backend: Any) -> bool:
    return f"{type(backend).__module__}.{type(backend).__qualname__}" != "celery.backends.base.DisabledBackend"


def _is_celerys(tracer: Any) -> bool:
    return tracer is None or getattr(tracer, "__qualname__", "") == "build_tracer.<locals>.trace_task"


def build(task: Task, plan: Plan, writer: backends.Writer | None) -> Tracer:
    """The tracer of a plain task."""
    fun = task.run
    push_task, pop_task = _stack(_task_stack)
    push_request, pop_request = _stack(task.request_stack)
    send_prerun, prerun_receivers = signals.task_prerun.send, signals.task_prerun.receivers
    send_postrun, postrun_receivers = signals.task_postrun.send, signals.task_postrun.receivers
    send_success, success_receivers = signals.task_success.send, signals.task_success.receivers
    logs = trace.logger.isEnabledFor(logging.INFO)
    longest = task.resultrepr_maxsize
    store = _Results(task, writer).store if writer is not None and _stores(task.backend) else None
    again = _replayer(task, plan)

    def trace_plain(uuid: str, args: Any, kwargs: Any, request: Any) -> Answer:
        started = monotonic()
        retval = error = text = state = None
        # Celery's tracer is to see to the rest.
        left = ran = False
        runtime = 0.0
        push_task(task)
        push_request(request)
        try:
            if prerun_receivers:
                send_prerun(sender=task, task_id=uuid, task=task, args=args, kwargs=kwargs)
            try:
                retval = fun(*args, **kwargs)
                ran = True
                fields = object.__getattribute__(request, "__dict__")
                # Whoever looks at the request may have said there what follows.
                left = "hints" not in fields and any(map(fields.get, FOLLOWING))
                if store is not None and not left:
                    store(uuid, retval, request)
            except Exception as exc:
                error, left = exc, True
            else:
                if not left:
                    state = states.SUCCESS
                    text = _text(retval, longest)
                    runtime = monotonic() - started
                    if success_receivers:
                        send_success(sender=task, result=retval, runtime=runtime)
                    if logs:
                        _log(task, uuid, args, kwargs, request, text, runtime)
        finally:
            try:
                if postrun_receivers and not left:
                    send_postrun(
                        sender=task, task_id=uuid, task=task, args=args, kwargs=kwargs, retval=retval, state=state
                    )
            finally:
                pop_task()
                pop_request()
        if left:
            return again(uuid, args, kwargs, request, None if ran else error, retval)
        return retval, None, runtime, text

    return trace_plain


def _log(task: Task, uuid: str, args: Any, kwargs: Any, request: Any, text: str, runtime: float) -> None:
    trace.info(
        trace.LOG_SUCCESS,
        {
            "id": uuid,
            "name": trace.get_task_name(request, task.name),
            "return_value": text,
            "runtime": runtime,
            "args": request.get("argsrepr") or trace.safe_repr(args),
            "kwargs": request.get("kwargsrepr") or trace.safe_repr(kwargs),
        },
    )


def _stack(stack: Any) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """How to push to one of Celery's stacks and to pop from it: as it does, the short way where it was empty."""
    if type(stack) is not _LocalStack or type(stack._local) is not Local:
        return stack.push, stack.pop
    storage, ident = stack._local.__storage__, stack.__ident_func__
    push_on, pop_off = stack.push, stack.pop

    def push(thing: Any) -> None:
        here = ident()
        if here in storage:
            push_on(thing)
        else:
            storage[here] = {"stack": [thing]}

    def pop() -> None:
        here = ident()
        entry = storage.get(here)
        if entry is not None and len(entry["stack"]) == 1:
            del storage[here]
        else:
            pop_off()

    return push, pop


def _text(value: Any, longest: int) -> str:
    kind = type(value)
    if kind in QUICK or (kind is int and -SHORT < value < SHORT):
        return repr(value)
    return str(saferepr(value, longest))


class _Stand:
    """Stands for a task where Celery calls it, so that tracebacks have the line that Celery's would have."""

    run = staticmethod(replay)

    def __init__(self, task: Task) -> None:
        self.request_stack = task.request_stack


def _replayer(task: Task, plan: Plan) -> Callable[..., Answer]:
    """Celery's tracer for a task that has run: of its beginning nobody is told again."""
    app = plan.app
    begun = signals.task_prerun
    before = begun.receivers, trace.task_has_custom, vars(task).get("run")
    protected = app_task.Task.__call__.__module__ == "celery.app.trace"
    begun.receivers, trace.task_has_custom = [], lambda task, hook: False
    task.run = partial(app_task.Task.__call__, _Stand(task)) if protected else replay
    try:
        tracer = trace.build_tracer(task.name, task, app.loader, plan.hostname, app=app)
    finally:
        begun.receivers, trace.task_has_custom, task.run = before
        if before[-1] is None:
            del task.run

    def again(uuid: str, args: Any, kwargs: Any, request: Any, error: Exception | None, value: Any) -> Answer:
        if error is not None:
            # Without the line of ours.
            own = error.__traceback__
            error.__traceback__ = own and own.tb_next
        remember(value, error)
        # With what the task has left there.
        fields = dict(vars(request))
        fields.pop("_protected", None)
        answer: Answer = tracer(uuid, args, kwargs, fields)
        return answer

    return again


class _Results:
    """Stores what a task has returned, as `mark_as_done` of its backend."""

    def __init__(self, task: Task, writer: backends.Writer) -> None:
        self.task = task
        self.writer = writer
        self.backend: Any = task.backend
        registry = serialization.registry
        #: The document can be written down without asking the backend.
        self.plain = bool(
            isinstance(task.backend, backends.KeyValue)
            and self.backend._native_plain
            and self.backend.serializer == "json"
            and registry._encoders["json"][2] is kombu_json.dumps
            and not task.ignore_result
        )
        if self.plain:
            self.prefix = bytes_to_str(self.backend.get_key_for_task("0"))[:-1]
            self.expires = self.backend._native_expires(states.SUCCESS)

    def store(self, uuid: str, value: Any, request: Any) -> None:
        untouched = object.__getattribute__(request, "__dict__").get("hints")
        # Whoever has looked at the request may have left children there.
        if self.plain and untouched == KEEP and not isinstance(value, ResultBase) and self.writer.mine():
            result = "null" if value is None else kombu_json.dumps(value)
            done = datetime.now(timezone.utc).isoformat()
            document = (
                f'{{"status": "SUCCESS", "result": {result}, "traceback": null, "children": [], '
                f'"date_done": "{done}", "task_id": {encode_basestring_ascii(uuid)}}}'
            )
            if len(document) <= self.backend._native_limit:
                self.writer.put(uuid, document.encode(), self.prefix + uuid, self.expires, self.task)
                return
        ignored = _ignores(self.task, request)
        self.backend.mark_as_done(uuid, value, request, not ignored)


def _ignores(task: Task, request: Any) -> bool:
    """Whether the result is dropped: until 5.6 the task alone says so, here."""
    actual = getattr(app_task, "get_actual_ignore_result", None)
    return bool(actual(task, request) if actual else task.ignore_result)
