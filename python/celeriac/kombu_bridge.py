"""Any kombu transport as a broker: kombu's own objects, driven by one thread a session.

`src/python/broker.rs` starts the thread and holds the other end. What comes from the broker goes to the
core as it is, undecoded; what the core wants done is done here, in its order. Transports with an event loop
run in kombu's own; the others are polled as kombu polls them, and the wait between two polls ends at once
when the core has something to say.
"""

from __future__ import annotations

import itertools
import json
import logging
import select
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from kombu import Consumer, Exchange, Queue
from kombu.asynchronous import Hub, set_event_loop
from kombu.entity import binding
from kombu.transport import virtual
from kombu.utils.encoding import ensure_bytes
from kombu.utils.json import dumps

if TYPE_CHECKING:
    from celery import Celery

    from celeriac._core import KombuPort

logger = logging.getLogger("celery.worker.consumer")

#: Messages handed to the core at once, at most.
BATCH = 32

#: How long a transport without event loop that waits by itself may keep commands waiting, seconds.
PATIENCE = 0.1

#: Heartbeats are looked after so often in their interval, as Celery does.
HEARTBEAT_RATE = 2.0

#: A message as the core takes it.
Given = tuple[bytes, str, str, "str | None", "str | None", str, str, bool]


class Bridge:
    """One address of the app's broker."""

    def __init__(self, app: Celery, url: str | None = None) -> None:
        self.app = app
        self.url = url
        with app.connection_for_read(url) as connection:
            self.address: str = connection.as_uri()
            self.fanout: bool = bool(connection.supports_exchange_type("fanout"))

    def serve(self, plan: str, port: KombuPort) -> None:
        """Runs one session; returns when it is over. Called on a thread of its own."""
        Link(self.app, self.url, json.loads(plan), port).run()


def bridges(app: Celery) -> list[Bridge]:
    """The brokers of the app, the failover list in order."""
    urls = app.conf.broker_read_url or app.conf.broker_url
    if isinstance(urls, str):
        urls = [part.strip() for part in urls.split(";")]
    # A custom transport class may do without any address.
    return [Bridge(app, url) for url in urls or [None]]


class Link:
    """A connection with its channel and consumers, and what it has delivered."""

    def __init__(self, app: Celery, url: str | None, plan: dict[str, Any], port: KombuPort) -> None:
        self.app = app
        self.plan = plan
        self.port = port
        self.connection = app.connection_for_read(url)
        self.tags = itertools.count(plan["first_tag"])
        self.held: dict[int, Any] = {}
        self.arrived: list[tuple[int, str, Given]] = []
        self.exchanges: set[str] = set()
        self.over = False
        self.paused = False
        self.channel: Any = None
        self.consumers: dict[str, Consumer] = {}
        self.commands: dict[str, Callable[[Any], None]] = {
            "settle": self.settle,
            "publish": self.publish,
            "prefetch": self.prefetch,
            "consume": self.consume,
            "cancel": self.cancel,
            "pause": self.pause,
            "pass": lambda _: None,
            "close": self.close,
            "stop": self.close,
        }

    def run(self) -> None:
        """Connects, drains until told to stop, and says how it ended."""
        errors = (*self.connection.connection_errors, *self.connection.channel_errors, OSError)
        try:
            try:
                self.connection.ensure_connection(max_retries=0)
                self.set_up()
            except self.connection.recoverable_connection_errors as error:
                return self.port.lost(text_of(error), True)
            except Exception as error:
                # kombu wraps what can be tried again.
                again = isinstance(error, self.connection.connection_errors) or is_operational(error)
                return self.port.lost(text_of(error), again)
            self.port.started()
            try:
                if self.connection.transport.implements.asynchronous:
                    self.run_loop()
                else:
                    self.poll()
            except errors as error:
                self.port.lost(text_of(error), True)
            except Exception as error:
                logger.exception("The transport failed")
                self.port.lost(text_of(error), True)
        finally:
            self.tear_down()

    def set_up(self) -> None:
        self.channel = self.connection.default_channel
        self.prefetch(self.plan["prefetch"])
        if self.plan["control"]:
            mailbox = self.app.control.mailbox
            Consumer(
                self.connection.channel(),
                [mailbox.get_queue(self.plan["node"])],
                no_ack=True,
                on_message=lambda message: self.port.control(given(message)),
                on_decode_error=lambda message, _error: self.port.control(given(message)),
            ).consume()
        for queue in self.plan["queues"]:
            self.add(self.queue(queue))

    def add(self, queue: Any) -> None:
        """Consumes a queue. Each has a consumer of its own: not every transport says where a message was."""
        arrived = partial(self.on_message, queue.name)
        consumer = Consumer(
            self.channel,
            [queue],
            on_message=arrived,
            on_decode_error=lambda message, _error: arrived(message),
        )
        self.consumers[queue.name] = consumer
        if not self.paused:
            consumer.consume()

    def tear_down(self) -> None:
        """Closes the connection, which makes kombu put back what was not settled."""
        self.held.clear()
        try:
            self.connection.release()
        except Exception as error:
            logger.debug("Closing the connection failed: %r", error)

    # --- what the broker says ---

    def on_message(self, queue: str, message: Any) -> None:
        tag = next(self.tags)
        self.held[tag] = message
        self.arrived.append((tag, queue, given(message)))
        if len(self.arrived) >= BATCH:
            self.hand_over()

    def hand_over(self) -> None:
        if self.arrived:
            arrived, self.arrived = self.arrived, []
            if not self.port.deliver(arrived):
                self.over = True

    def poll(self) -> None:
        """Drains a transport that has no event loop."""
        transport = self.connection.transport
        interval = getattr(transport, "polling_interval", None)
        polls = isinstance(transport, virtual.Transport) and bool(interval)
        while not self.over:
            try:
                # A poll that finds nothing returns at once; other transports wait in it.
                self.connection.drain_events(timeout=0 if polls else PATIENCE)
                nothing = False
            except TimeoutError:
                nothing = True
            if nothing or len(self.arrived) >= BATCH:
                self.hand_over()
            if nothing and polls and not self.over:
                select.select([self.port], [], [], interval)
            self.obey()

    def run_loop(self) -> None:
        """Drains a transport in kombu's event loop."""
        hub = Hub()
        set_event_loop(hub)
        hub.propagate_errors = (*self.connection.connection_errors, *self.connection.channel_errors)
        try:
            self.connection.transport.register_with_event_loop(self.connection.connection, hub)
            hub.add_reader(self.port.fileno(), self.obey)
            interval = self.connection.get_heartbeat_interval()
            if interval and self.connection.supports_heartbeats:
                hub.timer.call_repeatedly(interval / HEARTBEAT_RATE, self.connection.heartbeat_check, (HEARTBEAT_RATE,))
            # What came with the answers to our declarations is not announced again.
            hub.call_soon(self.drain_once)
            loop = hub.create_loop()
            while not self.over:
                try:
                    next(loop)
                except StopIteration:
                    loop = hub.create_loop()
                self.hand_over()
        finally:
            hub.close()

    def drain_once(self) -> None:
        with suppress(TimeoutError):
            self.connection.drain_events(timeout=0.01)

    # --- what the core says ---

    def obey(self) -> None:
        for name, argument in self.port.take():
            self.commands[name](argument)
            if self.over:
                return

    def settle(self, settlements: list[tuple[int, str]]) -> None:
        for tag, how in settlements:
            message = self.held.pop(tag, None)
            if message is None:
                continue
            match how:
                case "ack":
                    message.ack()
                case "reject":
                    message.reject()
                case _:
                    message.requeue()

    def publish(self, arguments: tuple[Any, ...]) -> None:
        number, exchange, kind, key, body, headers, properties, content_type, content_encoding = arguments
        try:
            if exchange and kind and exchange not in self.exchanges:
                # As Celery declares them: mailboxes do not survive a restart.
                durable = not exchange.endswith(".pidbox")
                Exchange(exchange, kind, durable=durable)(self.channel).declare()
                self.exchanges.add(exchange)
            sent = json.loads(properties)
            for ours in ("delivery_info", "delivery_tag", "body_encoding"):
                sent.pop(ours, None)
            message = self.channel.prepare_message(
                body,
                priority=sent.pop("priority", None),
                content_type=content_type,
                content_encoding=content_encoding,
                headers=json.loads(headers),
                properties=sent,
            )
            self.channel.basic_publish(message, exchange=exchange, routing_key=key)
        except Exception as error:
            self.port.answer(number, text_of(error))
            if isinstance(error, self.connection.connection_errors):
                raise
        else:
            self.port.answer(number, None)

    def prefetch(self, count: int) -> None:
        # One bound for all queues, wherever the broker can be told so.
        self.channel.basic_qos(0, count, not self.connection.qos_semantics_matches_spec)

    def consume(self, arguments: tuple[int, str]) -> None:
        number, queue = arguments
        try:
            known = self.queue(json.loads(queue))
            if known.name not in self.consumers:
                # A refusal closes the channel that it comes on.
                with self.connection.channel() as scratch:
                    known.bind(scratch).declare()
                self.add(known)
        except Exception as error:
            self.port.answer(number, text_of(error))
            if isinstance(error, self.connection.connection_errors):
                raise
        else:
            self.port.answer(number, None)

    def cancel(self, name: str) -> None:
        consumer = self.consumers.pop(name, None)
        if consumer is not None:
            consumer.cancel()

    def pause(self, _: None) -> None:
        self.paused = True
        for consumer in self.consumers.values():
            consumer.cancel()

    def close(self, _: None) -> None:
        self.over = True

    def queue(self, plan: dict[str, Any]) -> Any:
        """The app's own queue of this name, or one made from the core's description."""
        known = self.app.amqp.queues.get(plan["name"])
        if known is not None:
            return known
        bindings = [
            binding(self.exchange(part["exchange"]), part["routing_key"], part["arguments"] or None)
            for part in plan["bindings"]
        ]
        first = bindings[0] if bindings else None
        return Queue(
            plan["name"],
            exchange=first.exchange if first else None,
            routing_key=first.routing_key if first else "",
            bindings=bindings[1:],
            durable=plan["durable"],
            exclusive=plan["exclusive"],
            auto_delete=plan["auto_delete"],
            no_declare=plan["no_declare"],
            queue_arguments=plan["arguments"] or None,
            consumer_arguments=plan["consumer_arguments"] or None,
        )

    def exchange(self, plan: dict[str, Any]) -> Any:
        return Exchange(
            plan["name"],
            plan["type"],
            durable=plan["durable"],
            auto_delete=plan["auto_delete"],
            passive=plan["passive"],
            no_declare=plan["no_declare"],
            arguments=plan["arguments"] or None,
        )


def given(message: Any) -> Given:
    """A message as the core takes it."""
    headers = dict(message.headers or {})
    if not message.errors:
        # kombu has decompressed the body already.
        headers.pop("compression", None)
    info = message.delivery_info or {}
    body = message.body
    return (
        ensure_bytes(body) if body is not None else b"",
        dumps(headers),
        dumps({name: value for name, value in (message.properties or {}).items() if name != "delivery_tag"}),
        message.content_type,
        message.content_encoding,
        str(info.get("exchange") or ""),
        str(info.get("routing_key") or ""),
        bool(info.get("redelivered")),
    )


def is_operational(error: Exception) -> bool:
    """Whether kombu means by it that connecting again may help."""
    from kombu.exceptions import OperationalError

    return isinstance(error, OperationalError)


def text_of(error: BaseException) -> str:
    """What is said of an error in a line of the log."""
    return str(error) or repr(error)
