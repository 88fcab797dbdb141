"""Tasks whose `Request` or `Strategy` class is the app's own, as the supervisor's Python hosts them.

Celery's own code makes these objects and calls their methods, in Celery's order; `src/worker/hosting.rs` keeps the
books. What they post to the pool is pickled here, as billiard would, and run by a child; the callbacks run on the main
thread, or in the thread of `consumer.timer` what was put into that.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import json
import logging
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from billiard.einfo import ExceptionInfo
from billiard.exceptions import Terminated
from celery import signals
from celery.exceptions import InvalidTaskError, TaskRevokedError, TimeLimitExceeded, WorkerLostError
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.request import Request, create_request_cls
from kombu.exceptions import ContentDisallowed, DecodeError
from kombu.utils.imports import symbol_by_name

from celeriac import config, ladder
from celeriac._core import Desk
from celeriac.child import exit_of
from celeriac.incidents import Incidents, Settled, einfo_of, signal_of

if TYPE_CHECKING:
    from celery import Celery

    from celeriac.pooling import PoolStandIn
    from celeriac.worker import Worker

__all__ = ["Calls", "Hosting", "Limits", "TaskConsumer"]

logger = logging.getLogger("celery.worker.request")
pool_logger = logging.getLogger("multiprocessing")


class Held(Settled):
    """A message that its request or strategy settles."""

    def __init__(self, ticket: int, desk: Desk, envelope: dict[str, Any], body: bytes, accept: set[str]) -> None:
        super().__init__(envelope, body, accept)
        self.delivery_tag = self.ticket = ticket
        self._desk = desk

    def ack(self, multiple: bool = False) -> None:
        """Done with."""
        self._settle("ack", "ACK")

    def reject(self, requeue: bool = False) -> None:
        """Not wanted, or not now."""
        self._settle("requeue" if requeue else "reject", "REQUEUED" if requeue else "REJECTED")

    def requeue(self) -> None:
        """Back to the queue."""
        self.reject(requeue=True)

    def _settle(self, how: str, become: str) -> None:
        if self.acknowledged:
            raise self.MessageStateError("the message is settled already")
        self._desk.settle(self.ticket, how)
        self._state: str = become


class Applied:
    """What posting to the pool returns: what requests and strategies use of billiard's `ApplyResult`."""

    def __init__(self, calls: Calls, number: int, ticket: int | None, options: dict[str, Any]) -> None:
        self.number = number
        self.ticket = ticket
        self.correlation_id = options.get("correlation_id")
        self.worker_pid: int | None = None
        self.options = options
        self._desk = calls.desk
        self._over = False

    def ready(self) -> bool:
        """Whether it is over."""
        return self._over

    def accepted(self) -> bool:
        """Whether a child has begun."""
        return self.worker_pid is not None

    def terminate(self, signum: int) -> None:
        """Kills the child that runs it."""
        self._desk.terminate(self.number, int(signum))

    def callback(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Calls one of the callbacks; as in billiard its error is logged and goes no further."""
        function = self.options.get(name)
        if function is None:
            return
        try:
            function(*args, **kwargs)
        except Exception as exc:
            pool_logger.error("Pool callback raised exception: %r", exc, exc_info=True)

    def over(self, *, success: bool, value: Any) -> None:
        """It returned this, or failed with this `ExceptionInfo`."""
        self._over = True
        self.callback("callback" if success else "error_callback", value)


class Calls:
    """What was posted to the pool and is not over."""

    def __init__(self) -> None:
        self.desk = Desk()
        self.posted: dict[int, Applied] = {}
        self._numbers = itertools.count(1)
        self._current = threading.local()

    def post(self, target: Callable[..., Any], args: Iterable[Any], kwargs: Any, options: dict[str, Any]) -> Applied:
        """Has a child run the target; raises at once where it cannot be pickled."""
        body = pickle.dumps((target, tuple(args or ()), dict(kwargs or {})), pickle.HIGHEST_PROTOCOL)
        ticket = getattr(self._current, "ticket", None)
        applied = Applied(self, next(self._numbers), ticket, options)
        self.posted[applied.number] = applied
        self.desk.call(
            applied.number,
            body,
            ticket=ticket,
            soft_limit=options.get("soft_timeout"),
            hard_limit=options.get("timeout"),
        )
        return applied

    def terminate(self, pid: int, signum: int) -> None:
        """Kills a child if it runs a call."""
        for applied in list(self.posted.values()):
            if applied.worker_pid == pid:
                applied.terminate(signum)

    def during(self, ticket: int, run: Callable[[], object]) -> bool:
        """Runs a request's own way into the pool; whether it posted anything."""
        self._current.ticket = ticket
        try:
            run()
        finally:
            self._current.ticket = None
        return self.of(ticket)

    def of(self, ticket: int) -> bool:
        """Whether anything of this message is not over."""
        # A copy: the thread of a timer may post meanwhile.
        return any(applied.ticket == ticket for applied in list(self.posted.values()))


class Limits:
    """The methods of Celery's consumer that a strategy uses which builds on Celery's own, and those that add and cancel
    queues; Celery's code."""

    pool: Any
    task_buckets: Any
    reset_rate_limits: Callable[[], None]
    _limit_order = 0

    def on_task_request(self, request: Any) -> None:
        """The request's turn has come."""
        with contextlib.suppress(TaskRevokedError):
            request.execute_using_pool(self.pool)


for _name in (
    "apply_eta_task",
    "bucket_for_task",
    "reset_rate_limits",
    "_limit_move_to_pool",
    "_schedule_bucket_request",
    "_limit_task",
    "_limit_post_eta",
    "add_task_queue",
    "cancel_task_queue",
):
    if hasattr(Consumer, _name):
        setattr(Limits, _name, getattr(Consumer, _name))


class Prefetch:
    """`consumer.qos`.

    What a strategy raises and lowers for its requests is nothing: the core counts what it holds. What a command of
    remote control changes (`meant`) is the prefetch.
    """

    def __init__(self, pool: PoolStandIn) -> None:
        self.meant = False
        self._pool = pool

    @property
    def value(self) -> int:
        """Messages that may be unsettled."""
        count: int = self._pool.ask("stats")["prefetch_count"]
        return count

    def increment_eventually(self, n: int = 1) -> None:
        """So many more."""
        if self.meant:
            self._pool.calls.desk.prefetch(max(n, 0))

    def decrement_eventually(self, n: int = 1) -> None:
        """So many less."""
        if self.meant:
            self._pool.calls.desk.prefetch(-n)


class TaskConsumer:
    """What boot steps and control commands of the app see as `consumer.task_consumer`; Celery's own
    `consumer.add_task_queue` and `cancel_task_queue` use it."""

    def __init__(self, app: Celery, desk: Desk) -> None:
        self._app = app
        self._desk = desk

    @property
    def queues(self) -> list[Any]:
        """The queues that are consumed."""
        return list(self._app.amqp.queues.consume_from.values())

    def consuming_from(self, queue: Any) -> bool:
        """Never quite sure: the core knows, and ignores what it consumes already."""
        return False

    def add_queue(self, queue: Any) -> Any:
        """Consumes this queue too."""
        self._desk.consume(json.dumps(config.queue(queue)))
        return queue

    def consume(self, no_ack: bool | None = None) -> None:
        """Added queues are consumed at once."""

    def cancel_by_queue(self, queue: Any) -> None:
        """Stops consuming this queue."""
        self._desk.cancel(getattr(queue, "name", queue))

    def qos(self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False) -> None:
        """Do nothing: the core counts what it holds itself."""


class Hosting:
    """The objects of the app, and what they are told."""

    def __init__(self, worker: Worker, incidents: Incidents) -> None:
        self.app = worker.app
        self.worker = worker
        self.consumer = worker.consumer
        self.calls: Calls = worker.pool.calls
        self.desk = self.calls.desk
        self.incidents = incidents
        #: Requests by ticket, until they are over.
        self.requests: dict[int, Any] = {}
        self.strategies: dict[str, Any] = {}
        self.classes: dict[str, Any] = {}
        incidents.classes = self.classes
        worker.tasks_changed = self.refresh
        self.refresh()

    def refresh(self) -> None:
        """Makes the strategies and the classes of requests, of the tasks that there are now."""
        self.strategies.clear()
        self.classes.clear()
        if any(ladder.hosting(task) == "strategy" for task in self.app.tasks.values()):
            self.consumer.reset_rate_limits()
        for name, task in self.app.tasks.items():
            match ladder.hosting(task):
                case "strategy":
                    self.strategies[name] = self._strategy(task)
                case "request":
                    self.classes[name] = self.request_class(task)
        self.consumer.strategies.update(self.strategies)

    def _strategy(self, task: Any) -> Any:
        try:
            return task.start_strategy(self.app, self.consumer)
        except Exception as error:
            logger.debug("The strategy of task %s failed", task.name, exc_info=True)
            raise ladder.Refused(
                [
                    f"task {task.name}: its Strategy {ladder.name_of(task.Strategy)} cannot be hosted "
                    f"({type(error).__name__}: {error}): {ladder.RUN_CELERY}."
                ]
            ) from error

    def request_class(self, task: Any) -> Any:
        """As Celery's own strategy makes it."""
        return create_request_cls(
            symbol_by_name(task.Request),
            task,
            self.worker.pool,
            self.worker.hostname,
            self.consumer.event_dispatcher,
            app=self.app,
        )

    def event(self, text: str, envelope: str | None, data: bytes | None) -> str | None:
        """What Rust tells; the answer settles a message of which no request can be made."""
        event = json.loads(text)
        what = event.pop("what")
        if envelope is not None:
            event |= {"envelope": json.loads(envelope), "body": data}
        elif data is not None:
            event["value"] = data
        answer: str | None = getattr(self, "_" + what)(**event)
        return answer

    # --- messages ----------------------------------------------------------------------------------

    def _deliver(self, ticket: int, envelope: dict[str, Any], body: bytes) -> None:
        message = self._message(ticket, envelope, body)
        handler = self.strategies[message.headers["task"]]

        def hand_over() -> None:
            callbacks = self.consumer.on_task_message
            handler(message, None, message.ack_log_error, message.reject_log_error, callbacks)

        refused = self._try(hand_over, message, envelope, body)
        if refused is not None and not message.acknowledged:
            self.desk.settle(ticket, refused)

    def _received(self, ticket: int, envelope: dict[str, Any], body: bytes) -> str | None:
        message = self._message(ticket, envelope, body)
        task = self.app.tasks[message.headers["task"]]

        def make() -> None:
            request = self.classes[task.name](
                message,
                on_ack=message.ack_log_error,
                on_reject=message.reject_log_error,
                app=self.app,
                hostname=self.worker.hostname,
                eventer=self.consumer.event_dispatcher,
                task=task,
                connection_errors=self.consumer.connection_errors,
                body=message.body,
                headers=message.headers,
                decoded=False,
                utc=self.app.uses_utc_timezone(),
            )
            self.requests[ticket] = request
            signals.task_received.send(sender=self.consumer, request=request)

        return self._try(make, message, envelope, body)

    def _message(self, ticket: int, envelope: dict[str, Any], body: bytes) -> Held:
        return Held(ticket, self.desk, envelope, body, self.incidents.accept)

    def _try(self, make: Callable[[], None], message: Held, envelope: dict[str, Any], body: bytes) -> str | None:
        """Reports a bad message as Celery's consumer does; how it is settled."""
        try:
            payload = message.payload
            if not isinstance(payload, (list, tuple)) or len(payload) != 3:
                raise InvalidTaskError("the body is not [args, kwargs, options]")
            make()
        except DecodeError as exc:
            self.incidents.report({"what": "undecodable", "reason": repr(exc)}, envelope, body, None)
            return "ack"
        except (InvalidTaskError, ContentDisallowed) as exc:
            self.incidents.report({"what": "rejected", "reason": str(exc)}, envelope, body, None)
            return "reject"
        except Exception:
            # The code of the app is at fault, not the message, which must not be lost for it.
            headers = envelope["headers"]
            logger.exception(
                "%s[%s] met an error of its own Request or Strategy; its message goes back when this worker stops",
                headers["task"],
                headers["id"],
            )
        return None

    # --- requests ----------------------------------------------------------------------------------

    def _execute(self, ticket: int) -> None:
        request = self.requests.get(ticket)
        if request is None:
            return
        state.task_reserved(request)
        for callback in self.consumer.on_task_message:
            callback(request)
        try:
            posted = self.calls.during(ticket, lambda: self.consumer.on_task_request(request))
        except Exception:
            logger.exception(
                "%s[%s] could not be executed; its message goes back when this worker stops", request.name, request.id
            )
            posted = False
        if not posted:
            del self.requests[ticket]

    def _revoked(self, ticket: int, expired: bool) -> None:
        request = self.requests.pop(ticket, None)
        if request is None:
            self.desk.settle(ticket, "ack")
        else:
            request._announce_revoked("expired" if expired else "revoked", False, None, expired)

    def _forget(self, ticket: int) -> None:
        self.requests.pop(ticket, None)

    def _terminate(self, ticket: int, **fields: int) -> None:
        request = self.requests.get(ticket)
        if request is not None:
            request.terminate(self.worker.pool, signal=signal_of(fields["signal"]))

    def _cancelled(self, ticket: int) -> None:
        request = self.requests.pop(ticket, None)
        cancelled = [number for number, applied in self.calls.posted.items() if applied.ticket == ticket]
        calls = [self.calls.posted.pop(number) for number in cancelled]
        if request is None or request.time_start is None:
            return
        # As in 5.7: one that is still the broker's goes back without a word.
        has_choice = "emit_retry" in inspect.signature(request.cancel).parameters
        request.cancel(self.worker.pool, **({"emit_retry": not request.task.acks_late} if has_choice else {}))
        for applied in calls:
            applied.over(success=False, value=einfo_of(Terminated(-signal.SIGTERM)))

    # --- calls -------------------------------------------------------------------------------------

    def _accepted(self, call: int, pid: int) -> None:
        applied = self.calls.posted.get(call)
        if applied is not None:
            applied.worker_pid = pid
            applied.callback("accept_callback", pid, time.monotonic())

    def _timed_out(self, call: int, soft: bool, limit: float) -> None:
        posted = self.calls.posted.get(call)
        given = [posted.options.get("soft_timeout" if soft else "timeout")] if posted else []
        given.append(self.worker.soft_time_limit if soft else self.worker.time_limit)
        # As it was given: the command line has 2.0 where a task has 2.
        seconds: float = next((value for value in given if value == limit), limit)
        # A hard one fails the call first, in billiard's order: every hook of the request hears of it.
        applied = posted if soft else self._failed(call, TimeLimitExceeded(seconds))
        if applied is not None:
            applied.callback("timeout_callback", soft=soft, timeout=seconds)

    def _answered(self, call: int, value: bytes) -> None:
        try:
            success, answer = pickle.loads(value)
        except Exception:
            self._over(call, success=False, value=ExceptionInfo())
        else:
            left = None if success else answer.exception
            left = getattr(left, "exc", left)
            # A task that left its process; Celery knows what to make of that since 5.7.
            if isinstance(left, (SystemExit, KeyboardInterrupt)) and not hasattr(Request, "_worker_lost_info"):
                self._lost(call, exit_of(left)[1])
            else:
                self._over(call, success=success, value=answer)

    def _lost(self, call: int, status: str) -> None:
        self._failed(call, WorkerLostError(f"Worker exited prematurely: {status}."))

    def _terminated(self, call: int, **fields: int) -> None:
        self._failed(call, Terminated(-fields["signal"]))

    def _failed(self, call: int, exc: Exception) -> Applied | None:
        return self._over(call, success=False, value=einfo_of(exc))

    def _over(self, call: int, *, success: bool, value: Any) -> Applied | None:
        applied = self.calls.posted.pop(call, None)
        if applied is None:
            return None
        applied.over(success=success, value=value)
        if applied.ticket is not None and not self.calls.of(applied.ticket):
            self.requests.pop(applied.ticket, None)
        return applied
