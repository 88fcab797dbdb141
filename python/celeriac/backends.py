"""The native rung of result backends: results of children are written by the supervisor, in batches.

The meta document is made and encoded by Celery's own backend object; only the write itself goes to the
supervisor. Everything that reads, and everything of chords and groups, stays Celery's own.
"""

from __future__ import annotations

import inspect
import os
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple

from celery import signals, states
from celery.app import backends as registry
from celery.app.trace import task_has_custom
from celery.exceptions import BackendStoreError
from kombu.serialization import dumps
from kombu.utils.encoding import bytes_to_str, ensure_bytes

from celeriac import chords
from celeriac._core import CHORD_SCRIPT

if TYPE_CHECKING:
    from celeriac._core import ChildPipe

#: How often a part that came again asks whether the claim on its chord's body is gone: claims end after seconds.
CLAIM_POLL = 0.2

#: Redis holds values of up to this many bytes.
REDIS_LIMIT = 512 * 1024 * 1024

#: The backends that the supervisor writes for, and the methods that must be Celery's own for it.
NATIVE = {
    ("celery.backends.redis", "RedisBackend"): (
        "_store_result",
        "store_result",
        "_set_with_state",
        "set",
        "_set",
        "encode",
        "get_key_for_task",
        "mark_as_done",
        "mark_as_failure",
        "mark_as_retry",
        "on_chord_part_return",
        "get_key_for_group",
    ),
    ("celery.backends.filesystem", "FilesystemBackend"): (
        "_store_result",
        "store_result",
        "_set_with_state",
        "set",
        "encode",
        "get_key_for_task",
        "mark_as_done",
        "mark_as_failure",
        "mark_as_retry",
    ),
    ("celery.backends.rpc", "RPCBackend"): (
        "store_result",
        "destination_for",
        "_to_result",
        "on_reply_declare",
        "mark_as_done",
        "mark_as_failure",
        "mark_as_retry",
    ),
}


class Rung(NamedTuple):
    """Who writes results, and why."""

    native: bool
    reason: str


#: Set to ``python``, it has the children write results whatever the backend is.
SWITCH = "CELERIAC_RESULTS"


def decide(app: Any, *, broker_native: bool = True) -> Rung:
    """Whether the supervisor can write this app's results exactly as Celery would.

    `broker_native`: the broker is spoken natively too; rpc results travel through it.
    """
    if os.environ.get(SWITCH) == "python":
        return Rung(False, f"{SWITCH}=python")
    given = app.backend_cls or app.conf.result_backend
    try:
        cls, url = registry.by_url(given, loader=app.loader)
    except Exception as error:
        return Rung(False, f"the result backend {given!r} cannot be loaded: {error}")
    name = (cls.__module__, cls.__qualname__)
    if name == ("celery.backends.base", "DisabledBackend"):
        return Rung(True, "no results are stored")
    if name not in NATIVE:
        return Rung(False, f"{'.'.join(name)} is called in the children, as Celery does")
    for method in NATIVE[name]:
        if not _is_celerys(cls, method):
            return Rung(False, f"{name[1]}.{method} was replaced")
    if name[1] == "RPCBackend":
        conf = app.conf
        if not broker_native:
            return Rung(False, "rpc results travel through the broker, which is not spoken natively")
        if conf.broker_write_url != conf.broker_read_url:
            return Rung(False, "rpc results go to broker_write_url, the supervisor consumes broker_read_url")
        return Rung(True, "written by the supervisor through its broker connection")
    if app.conf.get("result_compression"):
        return Rung(False, "result_compression hides whether a stored result is a success")
    if not isinstance(url, str) or "://" not in url:
        return Rung(False, f"the address of the result backend ({url!r}) is no URL")
    if name[1] == "RedisBackend":
        if app.conf.get("redis_backend_credential_provider") or "credential_provider=" in url:
            return Rung(False, "a credential provider is Python code")
        if not url.startswith(("redis://", "rediss://", "redis+socket://", "socket://")):
            return Rung(False, f"the scheme of {app.backend.as_uri()} is not one of ours")
    return Rung(True, "written by the supervisor in batches")


def _is_celerys(cls: type, name: str) -> bool:
    """A plain function of Celery's own modules: not wrapped by an integration, not patched by the app."""
    method = inspect.getattr_static(cls, name, None)
    if not inspect.isfunction(method) or hasattr(method, "__wrapped__"):
        return method is None
    home = os.path.dirname(os.path.abspath(inspect.getfile(registry)))
    return os.path.abspath(method.__code__.co_filename).startswith(os.path.dirname(home))


class Job(threading.local):
    """What runs in this thread: set by the lane, read when its result is stored."""

    number = 0
    task: Any = None
    uuid: str | None = None
    #: The tracer itself stores the final state.
    final = False
    #: The broker delivered its message before.
    redelivered = False


class Writer:
    """Sends what is to be stored to the supervisor."""

    def __init__(self, app: Any, pipe: ChildPipe) -> None:
        self.pipe = pipe
        self.job = Job()
        #: How time passes where something is asked for again and again.
        self.pause: Callable[[float], None] = time.sleep
        self.custom: dict[tuple[type, str], bool] = {}
        #: The supervisor counts members of chords, each after its result.
        self.counts = False
        # A loader of the app's own is called after each task and may look at anything.
        self.foreign_loader = not type(app.loader).__module__.startswith("celery.")

    def mine(self) -> bool:
        """Not so in a process that the task forked: frames of two writers would mix."""
        return os.getpid() == self.pipe.pid

    def store(
        self,
        task_id: str,
        state: str,
        document: bytes,
        key: str,
        expires: float | None,
        request: Any,
        content_type: str = "application/json",
        content_encoding: str = "utf-8",
    ) -> None:
        """Has a document written; raises what Celery would when that fails and somebody waits for it."""
        # `update_state(meta=...)` stores no state.
        waits = self.observable(task_id, state, request)
        self._write(task_id, str(state), document, key, expires, content_type, content_encoding, waits)

    def put(self, task_id: str, document: bytes, key: str, expires: float | None, task: Any) -> None:
        """Has the document of a plain task's success written (`celeriac.tracer`)."""
        waits = self.foreign_loader or watched(signals.task_postrun, task) or watched(signals.task_success, task)
        self._write(task_id, states.SUCCESS, document, key, expires, "application/json", "utf-8", waits)

    def _write(self, task_id: str, state: str, *what: Any) -> None:
        *document, waits = what
        error = self.pipe.store(self.job.number, task_id, state, *document, wait=waits)
        if error is not None:
            raise BackendStoreError(error, state=state, task_id=task_id)

    def observable(self, task_id: str, state: str, request: Any) -> bool:
        """Whether anybody could see that the result is not written yet.

        Only the last thing that the tracer does for a task is not seen, and only when no handler follows it.
        """
        job = self.job
        if not job.final or request is None or task_id != job.uuid or request.id != job.uuid:
            return True
        # A chord's part is returned after its result is stored, and the body may look that up.
        if (getattr(request, "chord", None) and not self.counts) or self.foreign_loader:
            return True
        task = job.task
        if watched(signals.task_postrun, task):
            return True
        if state == states.SUCCESS:
            return (
                self.overrides(task, "on_success")
                or self.overrides(task, "after_return")
                or watched(signals.task_success, task)
            )
        if state == states.FAILURE:
            return bool(
                getattr(request, "errbacks", None)
                or getattr(request, "chain", None)
                or self.overrides(task, "on_failure")
                or self.overrides(task, "after_return")
                or watched(signals.task_failure, task)
            )
        if state == states.RETRY:
            return self.overrides(task, "on_retry") or watched(signals.task_retry, task)
        return True

    def overrides(self, task: Any, name: str) -> bool:
        """Whether the task's class has a hook of its own."""
        key = (type(task), name)
        known = self.custom.get(key)
        if known is None:
            known = self.custom[key] = bool(task_has_custom(task, name))
        return known or name in vars(task)


def watched(signal: Any, sender: Any) -> bool:
    """Whether a signal has receivers other than Celery's own, which read no results."""
    if not signal.receivers:
        return False
    return any(
        not getattr(receiver, "__module__", "").startswith("celery.fixups.")
        for receiver in signal._live_receivers(sender)
    )


class _Native:
    """Mixed in before a backend class of Celery's."""

    writer: Writer

    def __reduce__(self, *args: Any, **kwargs: Any) -> Any:
        made: Any = super().__reduce__(*args, **kwargs)
        rebuild, (cls, *rest) = made
        # Elsewhere it is Celery's own class again.
        return rebuild, (cls.__mro__[cls.__mro__.index(_Native) + 1], *rest)

    def mark_as_done(self, *args: Any, **kwargs: Any) -> Any:
        return self._last(super().mark_as_done, args, kwargs)  # type: ignore[misc]

    def mark_as_failure(self, *args: Any, **kwargs: Any) -> Any:
        return self._last(super().mark_as_failure, args, kwargs)  # type: ignore[misc]

    def mark_as_retry(self, *args: Any, **kwargs: Any) -> Any:
        return self._last(super().mark_as_retry, args, kwargs)  # type: ignore[misc]

    def _last(self, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        job = self.writer.job
        job.final = True
        try:
            return call(*args, **kwargs)
        finally:
            job.final = False


class KeyValue(_Native):
    def _store_result(
        self: Any,
        task_id: Any,
        result: Any,
        state: str,
        traceback: Any = None,
        request: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not self.writer.mine():
            return super()._store_result(task_id, result, state, traceback, request=request, **kwargs)  # type: ignore[misc]
        if self._native_plain:
            meta = _plain_meta(self, result, state, traceback, request)
        else:
            meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        meta["task_id"] = bytes_to_str(task_id)
        document = self.encode(meta)
        if isinstance(document, str) and len(document) > self._native_limit:
            raise BackendStoreError("value too large for Redis backend", state=state, task_id=task_id)
        self.writer.store(
            str(bytes_to_str(task_id)),
            state,
            ensure_bytes(document),
            bytes_to_str(self.get_key_for_task(task_id)),
            self._native_expires(state),
            request,
        )
        return result


def _plain_meta(backend: Any, result: Any, state: str, traceback: Any, request: Any) -> dict[str, Any]:
    """`_get_result_meta` for results that are not extended, in UTC, at a third of its cost."""
    ready = state in backend.READY_STATES
    meta = {
        "status": state,
        "result": result,
        "traceback": traceback,
        "children": backend.current_task_children(request),
        "date_done": datetime.now(timezone.utc).isoformat() if ready else None,
    }
    if request and getattr(request, "group", None):
        meta["group_id"] = request.group
    if request and getattr(request, "parent_id", None):
        meta["parent_id"] = request.parent_id
    return meta


class _Redis(KeyValue):
    _native_limit = REDIS_LIMIT

    def _native_expires(self: Any, state: str) -> float | None:
        expires = getattr(self, "failure_expires", None) if state == states.FAILURE else None
        expires = self.expires if expires is None else expires
        return float(expires) if expires else None

    @property
    def _chord_part_return_script(self: Any) -> Any:
        """Celery's call of its script comes here (5.7)."""
        return self._count_member

    def _count_member(self: Any, keys: list[Any], args: list[Any], client: Any = None) -> tuple[Any, ...]:
        """Counts a member of a chord, once: results, members added, size, whether to send the body."""
        texts = [ensure_bytes(key) for key in keys]
        values = [ensure_bytes(value) if isinstance(value, (str, bytes)) else b"%d" % value for value in args]
        writer = self.writer
        values.append(b"%d" % writer.job.redelivered)
        if writer.counts and writer.job.number and writer.mine():
            ready, added, size, sends = writer.pipe.count(writer.job.number, texts, values)
            return ready, added, None if size is None else b"%d" % size, int(sends)
        answer: list[Any] = (client or self.client).eval(CHORD_SCRIPT, len(texts), *texts, *values)
        return tuple(answer)

    def on_chord_part_return(self: Any, request: Any, state: str, result: Any, **kwargs: Any) -> Any:
        from celery.backends import redis

        redelivered = bool((getattr(request, "delivery_info", None) or {}).get("redelivered"))
        self.writer.job.redelivered = redelivered
        if redelivered and request.group and self._sent_already(request):
            return None
        if hasattr(redis, "CHORD_PART_RETURN_LUA"):
            return super().on_chord_part_return(request, state, result, **kwargs)  # type: ignore[misc]
        return chords.on_part(self, request, state, result)

    def _sent_already(self: Any, request: Any) -> bool:
        """Whether a member that comes again has sent the body in its first run, and died before that was noted.

        The claim that it left has to end first: a part that is returned while one stands sends nothing, so that a body
        that was not sent never would be. One that was sent has run by then, or at least begun to.
        """
        claim, counted = (self.get_key_for_group(request.group, suffix) for suffix in (".c", ".d"))
        while self.client.get(claim) not in (None, b"done", "done"):
            self.writer.pause(CLAIM_POLL)
        index = "+inf" if request.group_index is None else request.group_index
        if not self.client.sismember(counted, f"{request.id}:{index}"):
            return False
        body = dict(request.chord).get("options", {}).get("task_id")
        return bool(body) and self.get_state(body) != states.PENDING


class _Filesystem(KeyValue):
    _native_limit = float("inf")

    def _native_expires(self, state: str) -> float | None:
        return None


class _Rpc(_Native):
    def store_result(
        self: Any,
        task_id: str,
        result: Any,
        state: str,
        traceback: Any = None,
        request: Any = None,
        **kwargs: Any,
    ) -> Any:
        routing_key, correlation_id = self.destination_for(task_id, request)
        if not routing_key:
            return None
        if correlation_id != task_id or not self.writer.mine():
            return super().store_result(task_id, result, state, traceback, request, **kwargs)  # type: ignore[misc]
        message = self._to_result(task_id, state, result, traceback, request)
        content_type, content_encoding, document = dumps(message, serializer=self.serializer)
        self.writer.store(
            task_id,
            state,
            ensure_bytes(document),
            routing_key,
            None,
            request,
            content_type,
            content_encoding,
        )
        return result


def _has_plain_meta(app: Any, cls: type) -> bool:
    utc = app.timezone is timezone.utc or getattr(app.timezone, "key", None) == "UTC"
    return (
        utc
        and not app.conf.find_value_for_key("extended", "result")
        and _is_celerys(cls, "_get_result_meta")
        and _is_celerys(cls, "current_task_children")
        and _is_celerys(type(app), "now")
    )


_MIXINS = {"RedisBackend": _Redis, "FilesystemBackend": _Filesystem, "RPCBackend": _Rpc}


def install(app: Any, pipe: ChildPipe) -> Writer:
    """Makes this app's backend objects in this process send their results to the supervisor."""
    writer = Writer(app, pipe)
    made: dict[type, type] = {}

    def adopt(backend: Any) -> Any:
        cls = type(backend)
        if (cls.__module__, cls.__qualname__) in NATIVE and not issubclass(cls, _Native):
            if cls not in made:
                body = {
                    "writer": writer,
                    "_native_plain": _has_plain_meta(app, cls),
                    "__module__": cls.__module__,
                    "__qualname__": cls.__qualname__,
                }
                made[cls] = type(cls.__name__, (_MIXINS[cls.__name__], cls), body)
            backend.__class__ = made[cls]
        return backend

    make = app._get_backend
    app._get_backend = lambda: adopt(make())
    # The object that came with the fork, if there is one.
    if app._backend is not None:
        adopt(app._backend)
    return writer
