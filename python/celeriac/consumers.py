"""The app's boot steps that consume messages of their own (`bootsteps.ConsumerStep`).

Celery runs their consumers in its main loop, on its connection. Here they have a thread with a kombu connection of its
own: the thread calls `start`, `stop` and `shutdown` of the steps, drains the connection, and so calls the consumers'
callbacks. When the connection is lost it makes another and starts the steps anew, as Celery does.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from celery import bootsteps
from kombu.common import ignore_errors

if TYPE_CHECKING:
    from celeriac.worker import ConsumerStandIn

__all__ = ["Aside", "Consumers"]

logger = logging.getLogger("celery.worker.consumer")

#: Seconds between looks at whether the worker is to stop.
TICK = 0.5

#: How long a callback that still runs when everything else has ended may keep the worker.
PATIENCE = 15.0

#: Back-off between attempts to connect: first, step, most.
BACK_OFF = (1.0, 2.0, 30.0)


class Ending(BaseException):
    """The worker stops: leave off connecting."""


class Aside(bootsteps.StartStopStep):  # type: ignore[misc]
    """Stands in the blueprint's list for a step that lives in the thread."""

    def __init__(self, step: Any, consumers: Consumers) -> None:
        self.step = step
        self._consumers = consumers
        self._started = False

    @property
    def alias(self) -> str:
        """As the log calls the step."""
        name: str = self.step.alias
        return name

    def start(self, c: ConsumerStandIn) -> None:
        """Has the thread start the step, the first time: what becomes of its connection is the thread's business."""
        if not self._started:
            self._started = True
            self._consumers.start(self.step)

    def close(self, c: ConsumerStandIn) -> None:
        """Passed on: a step may want to know."""
        self.step.close(c)


class Consumers:
    """The thread, seen from the main one."""

    def __init__(self, consumer: ConsumerStandIn) -> None:
        self.consumer = consumer
        #: Started, in order; only the thread touches it.
        self.steps: list[Any] = []
        self._inbox: queue.SimpleQueue[tuple[Any, Future[None]] | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._connection: Any = None
        self._thread: threading.Thread | None = None

    # --- the main thread -----------------------------------------------------------------------------

    def start(self, step: Any) -> None:
        """Starts a step, raises what it raises; without a connection it is started when there is one."""
        if self._ending.is_set():
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="consumer-steps", daemon=True)
            self._thread.start()
        done: Future[None] = Future()
        self._inbox.put((step, done))
        done.result()

    def go(self) -> None:
        """All are started: messages may come."""
        self._inbox.put(None)

    def tell(self) -> None:
        """Tells the thread to stop consuming; does not wait for the callback that it may be in."""
        self._ending.set()
        self._inbox.put(None)

    def join(self) -> None:
        """Waits until the thread has stopped its steps and closed its connection."""
        if self._thread is None:
            return
        self.tell()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            logger.warning(
                "A consumer of a boot step is still busy with a message after %d seconds: it is left to the broker.",
                PATIENCE,
            )

    # --- the thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            connected = self._start_one_by_one()
            while not self._ending.is_set():
                try:
                    if not connected:
                        self._connect()
                        for step in self.steps:
                            step.start(self.consumer)
                        connected = True
                    self._drain()
                except self._recoverable() as exc:
                    connected = False
                    if not self._ending.is_set():
                        logger.warning("Consumers of boot steps lost the broker (%r). Connecting again...", exc)
                        logger.debug("Connection error: %r", exc, exc_info=True)
                    self._stop_steps()
                    self._disconnect()
        except Ending:
            pass
        except BaseException as exc:
            self.consumer.controller.fail(exc)
        finally:
            self._stop_steps()
            for step in reversed(self.steps):
                self._quietly(step, "shutdown")
            self._disconnect()

    def _start_one_by_one(self) -> bool:
        """As the blueprint comes to them. A lost connection is no reason to wait: false, they start with the next."""
        connected = True
        while (item := self._inbox.get()) is not None:
            step, done = item
            self.steps.append(step)
            try:
                if connected:
                    if self._connection is None:
                        self._connect(patient=False)
                    step.start(self.consumer)
            except self._recoverable() as exc:
                logger.warning("Consumers of boot steps have no connection yet: %r", exc)
                connected = False
                self._disconnect()
            except BaseException as exc:
                self.steps.remove(step)
                done.set_exception(exc)
                continue
            done.set_result(None)
        return connected

    def _recoverable(self) -> tuple[type[BaseException], ...]:
        consumer = self.consumer
        errors: tuple[type[BaseException], ...] = consumer.connection_errors
        # A setting of 5.3 and later.
        if consumer.app.conf.get("broker_channel_error_retry"):
            errors += consumer.channel_errors
        return errors

    def _connect(self, *, patient: bool = True) -> None:
        app = self.consumer.app
        connection = app.connection_for_read(heartbeat=app.conf.broker_heartbeat)
        if patient:
            first, step, most = BACK_OFF
            connection.ensure_connection(
                self._failed,
                None,
                interval_start=first,
                interval_step=step,
                interval_max=most,
                callback=self._leave_off,
            )
        else:
            connection.connect()
        self._connection = connection
        self.consumer.connection_of_thread(connection)

    def _failed(self, exc: Exception, interval: float) -> None:
        logger.error("Consumers of boot steps cannot connect: %s. Trying again in %.2f seconds...", exc, interval)

    def _leave_off(self) -> None:
        if self._ending.is_set():
            raise Ending

    def _drain(self) -> None:
        """Until the worker stops; what the broker or a callback raises gets out of here."""
        connection = self._connection
        rate = float(self.consumer.app.conf.broker_heartbeat_checkrate or 2.0)
        interval = connection.get_heartbeat_interval() if connection.supports_heartbeats else 0
        checked = time.monotonic()
        while not self._ending.is_set():
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=min(TICK, interval / rate) if interval else TICK)
            if interval and time.monotonic() - checked >= interval / rate:
                checked = time.monotonic()
                connection.heartbeat_check(rate)

    def _stop_steps(self) -> None:
        if self._connection is not None:
            for step in reversed(self.steps):
                self._quietly(step, "stop")

    def _quietly(self, step: Any, method: str) -> None:
        try:
            getattr(step, method)(self.consumer)
        except Exception as exc:
            logger.exception("Error on %s %s: %r", method, step.alias, exc)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        self.consumer.connection_of_thread(None)
        if connection is not None:
            ignore_errors(connection, connection.release)
