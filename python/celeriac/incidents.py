"""The failures that the parent process reports, through Celery's own objects: stores, errbacks, signals, log lines."""

from __future__ import annotations

import logging
import signal
import sys
from typing import TYPE_CHECKING, Any, TypedDict

from billiard.einfo import ExceptionInfo
from celery import signals, states
from celery.app.trace import task_has_custom
from celery.backends.redis import RedisBackend
from celery.exceptions import NotRegistered, Reject, Retry, TimeLimitExceeded, WorkerLostError
from celery.utils.saferepr import saferepr
from celery.utils.serialization import get_pickled_exception
from celery.worker.request import Request
from kombu.exceptions import OperationalError
from kombu.message import Message
from kombu.serialization import prepare_accept_content
from kombu.utils import json as kombu_json
from kombu.utils.encoding import safe_repr, safe_str

from celeriac.properties import repeat_headers

if TYPE_CHECKING:
    from celeriac.worker import Worker

__all__ = ["Incidents"]

logger = logging.getLogger("celery.worker.request")
consumer_logger = logging.getLogger("celery.worker.consumer.consumer")


class Settled(Message):  # type: ignore[misc]
    """A kombu message whose settling is Rust's business."""

    def __init__(self, envelope: dict[str, Any], body: bytes, accept: set[str]) -> None:
        headers, properties = envelope["headers"] or {}, envelope["properties"] or {}
        repeat_headers(properties, headers)
        super().__init__(
            body=body,
            delivery_tag=None,
            content_type=envelope["content_type"],
            content_encoding=envelope["content_encoding"],
            delivery_info=envelope["delivery_info"],
            headers=headers,
            properties=properties,
            accept=accept,
            channel=None,
        )

    def ack(self, multiple: bool = False) -> None:
        """Do nothing."""

    def reject(self, requeue: bool = False) -> None:
        """Do nothing."""


class Account(TypedDict, total=False):
    """What became of a reported message; `src/worker/told.rs` makes events of it."""

    #: Overrides how the message is settled: `ack`, `reject` or `requeue`.
    settlement: str
    #: `failed`, `retried` or `succeeded`, with what its event shows.
    became: dict[str, dict[str, str]]


class Incidents:
    """Reports; :meth:`report` says what became of the message."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.app = worker.app
        self.accept: set[str] = prepare_accept_content(worker.app.conf.accept_content)
        #: The request classes of tasks that have one of their own.
        self.classes: dict[str, Any] = {}

    # --- what Rust calls ---------------------------------------------------------------------------

    def received(self, envelope: dict[str, Any], body: bytes) -> None:
        """Send ``task_received``; a body that does not decode is the child's to complain about."""
        try:
            request = self._request(envelope, body)
        except Exception:
            return
        signals.task_received.send(sender=self.worker.consumer, request=request)

    def report(self, incident: dict[str, Any], envelope: dict[str, Any], body: bytes, pid: int | None) -> Account:
        """Account for a message that no child accounts for."""
        handler = getattr(self, "_" + incident.pop("what"))
        account: Account | None = handler(envelope, body, pid, **incident)
        return account or {}

    # --- refused messages --------------------------------------------------------------------------

    def _unknown(self, envelope: dict[str, Any], body: bytes, pid: int | None, task: str) -> None:
        message = self._message(envelope, body)
        exc = KeyError(task)
        consumer_logger.error(
            "Received unregistered task of type %s.\nNo module that this worker imports defines it "
            "(check imports, include and autodiscovery); the message is dropped.\n"
            "body: %s\nheaders: %r\ndelivery info: %r",
            exc,
            saferepr(body),
            envelope["headers"],
            envelope["delivery_info"],
            exc_info=_raised(exc),
        )
        task_id = message.headers.get("id")
        request = _Anonymous(message, self.worker.hostname)
        self.app.backend.mark_as_failure(task_id, NotRegistered(task), request=request)
        signals.task_unknown.send(sender=self.worker.consumer, message=message, exc=exc, name=task, id=task_id)

    def _rejected(self, envelope: dict[str, Any], body: bytes, pid: int | None, reason: str | None) -> None:
        message = self._message(envelope, body)
        text = (
            f"body: {saferepr(body)} {{content_type:{message.content_type!r} "
            f"content_encoding:{message.content_encoding!r}\n"
            f"  delivery_info:{envelope['delivery_info']!r} headers={envelope['headers']!r}}}"
        )
        exc: Exception | None = None
        if reason is None:
            consumer_logger.warning(
                "Received and deleted unknown message.  Wrong destination?!?\n%s",
                text,
            )
        else:
            exc = ValueError(reason)
            consumer_logger.error(
                "Received invalid task message: %s\nThe message is dropped.\n%s",
                reason,
                text,
            )
        signals.task_rejected.send(sender=self.worker.consumer, message=message, exc=exc)

    def _undecodable(self, envelope: dict[str, Any], body: bytes, pid: int | None, reason: str) -> None:
        consumer_logger.critical(
            "Can't decode message body: %s [type:%r encoding:%r headers:%s]\nbody: %s",
            reason,
            envelope["content_type"],
            envelope["content_encoding"],
            saferepr(envelope["headers"]),
            saferepr(body),
        )

    def _bad_eta(self, envelope: dict[str, Any], body: bytes, pid: int | None, reason: str) -> None:
        message = self._message(envelope, body)
        exc = OverflowError(reason)
        eta = message.headers.get("eta")
        logger.error("Couldn't convert ETA %r to timestamp: %r. Task: %r", eta, exc, message.headers.get("id"))
        message.headers["eta"] = None
        request = self._request(envelope, body)
        request.task.backend.mark_as_failure(
            request.id, exc, request=request._context, store_result=request.store_errors
        )

    # --- requests ----------------------------------------------------------------------------------

    def _revoked(
        self,
        envelope: dict[str, Any],
        body: bytes,
        pid: int | None,
        reason: str,
        terminated: bool,
        signal: int | None,
        expired: bool,
    ) -> None:
        request = self._request(envelope, body)
        signum = signal_of(signal)
        if request.task.name in self.classes:
            request._announce_revoked(reason, terminated, signum, expired)
            return
        request.task.backend.mark_as_revoked(
            request.id, reason, request=request._context, store_result=request.store_errors
        )
        signals.task_revoked.send(
            sender=request.task,
            request=request._context,
            terminated=terminated,
            signum=signum,
            expired=expired,
        )

    def _worker_lost(
        self, envelope: dict[str, Any], body: bytes, pid: int | None, status: str, requeued: bool
    ) -> Account:
        request = self._request(envelope, body, pid)
        exc = WorkerLostError(f"Worker exited prematurely: {status}.")
        einfo = einfo_of(exc)
        task = request.task
        stored: Any = getattr(request, "_success_was_stored", lambda: False)()
        # Only a chord's part is returned after the result is stored. Where returning it twice counts once the task
        # runs again or, if it must not, the part is returned here: Celery leaves the chord waiting for it.
        part = request._context.chord and isinstance(task.backend, RedisBackend)
        if stored and not (part and requeued):
            logger.warning("Task %s[%s] succeeded before the worker was lost: %r", request.name, request.id, exc)
            if part:
                task.backend.on_chord_part_return(request._context, states.SUCCESS, stored.get("result"))
            shown = saferepr(stored.get("result"), task.resultrepr_maxsize)
            return {"settlement": "ack", "became": {"succeeded": {"result": shown}}}
        if getattr(task, "retry_on_worker_lost", False):
            limit = task.max_retries
            exhausted = limit is not None and request._context.retries >= limit
            if not exhausted:
                if request._retry_worker_lost(exc, einfo):
                    return {"settlement": "ack", "became": {"retried": shown_of(exc, einfo)}}
                if task.acks_late and task.reject_on_worker_lost:
                    self._handler_error(exc, einfo)
                    return {"settlement": "requeue"}
        account = {} if requeued else self._fail(request, exc, einfo)
        self._handler_error(exc, einfo)
        return account

    def _timed_out(
        self, envelope: dict[str, Any], body: bytes, pid: int | None, limit: float, requeued: bool
    ) -> Account:
        request = self._request(envelope, body, pid)
        # As it was given: the command line has 2.0 where a message has 2.
        given = (request.time_limits[0], request.task.time_limit, self.worker.time_limit)
        seconds = next((value for value in given if value == limit), limit)
        logger.error("Hard time limit (%ss) exceeded for %s[%s]", seconds, request.name, request.id)
        if requeued:
            return {}
        exc = TimeLimitExceeded(seconds)
        einfo = einfo_of(exc)
        task = request.task
        # Once: as in 5.7 every hook of a failure runs, and unlike it none runs twice.
        account = self._fail(request, exc, einfo)
        task.on_failure(exc, request.id, request.args, request.kwargs, einfo)
        if task_has_custom(task, "after_return"):
            task.after_return(states.FAILURE, exc, request.id, request.args, request.kwargs, None)
        self._handler_error(exc, einfo)
        return account

    def _task_rejected(
        self, envelope: dict[str, Any], body: bytes, pid: int | None, exception: str, traceback: str
    ) -> Account:
        request = self._request(envelope, body, pid)
        try:
            reason = kombu_json.loads(exception)
        except ValueError:
            reason = exception
        exc = Reject(reason, requeue=False)
        account = self._fail(request, exc, einfo_of(exc))
        account["became"]["failed"]["traceback"] = traceback
        return account

    def _unsent(self, envelope: dict[str, Any], body: bytes, pid: int | None, reason: str) -> Account:
        request = self._request(envelope, body, pid)
        exc = OperationalError(reason)
        einfo = einfo_of(exc)
        account = self._fail(request, exc, einfo)
        self._handler_error(exc, einfo)
        return account

    def _cancelled(self, envelope: dict[str, Any], body: bytes, pid: int | None) -> None:
        request = self._request(envelope, body, pid)
        exc = Retry(message="cancelled by Celery")
        request.task.backend.mark_as_retry(request.id, exc, request=request._context)
        request.task.on_retry(exc, request.id, request.args, request.kwargs, None)
        signals.task_retry.send(sender=request.task, request=request._context, einfo=None)

    # --- parts -------------------------------------------------------------------------------------

    def _fail(self, request: Any, exc: BaseException, einfo: Any) -> Account:
        task = request.task
        task.backend.mark_as_failure(request.id, exc, request=request._context, store_result=request.store_errors)
        task.request_stack.push(request._context)
        try:
            signals.task_failure.send(
                sender=task,
                task_id=request.id,
                exception=exc,
                args=request.args,
                kwargs=request.kwargs,
                traceback=einfo.traceback,
                einfo=einfo,
            )
        finally:
            task.request_stack.pop()
        return {"became": {"failed": shown_of(exc, einfo)}}

    def _handler_error(self, exc: BaseException, einfo: Any) -> None:
        logger.error("Task handler raised error: %r", exc, exc_info=einfo.exc_info)

    def _message(self, envelope: dict[str, Any], body: bytes) -> Settled:
        return Settled(envelope, body, self.accept)

    def _request(self, envelope: dict[str, Any], body: bytes, pid: int | None = None) -> Any:
        message = self._message(envelope, body)
        task = self.app.tasks[message.headers["task"]]
        request = self.classes.get(task.name, Request)(
            message,
            app=self.app,
            hostname=self.worker.hostname,
            task=task,
            eventer=None,
            connection_errors=(),
        )
        request.worker_pid = pid
        return request


class _Anonymous:
    """The request of a task that nobody knows: what a backend reads of it."""

    def __init__(self, message: Settled, hostname: str) -> None:
        headers, properties = message.headers, message.properties
        self.id = headers.get("id")
        self.task = headers.get("task")
        self.hostname = hostname
        self.chord = None
        self.root_id = headers.get("root_id")
        self.parent_id = headers.get("parent_id")
        self.group = headers.get("group")
        self.group_index = headers.get("group_index")
        self.errbacks = None
        self.chain = None
        self.delivery_info = message.delivery_info
        self.args = headers.get("argsrepr")
        self.kwargs = headers.get("kwargsrepr")
        self.retries = headers.get("retries", 0)
        self.reply_to = properties.get("reply_to")
        self.correlation_id = properties.get("correlation_id")
        self.ignore_result = headers.get("ignore_result")
        self.stamped_headers = headers.get("stamped_headers")
        self.stamps = headers.get("stamps")
        self.children: list[Any] = []


def shown_of(exc: BaseException, einfo: Any) -> dict[str, str]:
    """An exception as events show it."""
    return {"exception": safe_repr(get_pickled_exception(exc)), "traceback": safe_str(einfo.traceback)}


def signal_of(number: int | None) -> int | None:
    """As receivers of Celery's signals know it: with a name."""
    try:
        return signal.Signals(number) if number is not None else None
    except ValueError:
        return number


def _raised(exc: BaseException) -> Any:
    try:
        raise exc
    except BaseException:
        return sys.exc_info()


def einfo_of(exc: BaseException) -> Any:
    try:
        raise exc
    except BaseException:
        return ExceptionInfo()
