"""The neighbours, as the app's own code sees them: `consumer.gossip`. Hearing of them is the core's."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery.events.state import Worker as Node
from celery.utils.objects import Bunch
from celery.worker.consumer.gossip import Gossip as Original
from celery.worker.consumer.mingle import Mingle
from kombu import Queue
from kombu.utils.json import dumps

if TYPE_CHECKING:
    from celeriac._core import Desk
    from celeriac.worker import ConsumerStandIn, Worker

__all__ = ["Gossip", "mingles", "queue"]

logger = logging.getLogger("celery.worker.consumer.gossip")


def queue(worker: Worker) -> Queue | None:
    """The queue by which the core hears of others, as Celery declares it, its name without the part that is made anew
    for each connection; none where there is no gossip."""
    conf = worker.app.conf
    if not worker.consumer.gossip.enabled:
        return None
    durable = bool(conf.get("event_queue_durable", False))
    ttl = worker.options.get("heartbeat_interval")
    return Queue(
        conf.event_queue_prefix,
        exchange=worker.consumer.event_dispatcher.exchange,
        routing_key="worker.#",
        auto_delete=not durable,
        durable=durable,
        exclusive=bool(conf.get("event_queue_exclusive", False)),
        message_ttl=conf.event_queue_ttl if ttl is None else ttl,
        expires=conf.event_queue_expires,
        no_ack=True,
    )


def mingles(worker: Worker) -> bool:
    """Whether the core asks others for what they know: not where Celery does not."""
    return not worker.options.get("without_mingle") and _transport(worker) in Mingle.compatible_transports


def _transport(worker: Worker) -> str:
    kind: str = worker.app.connection_for_read().transport.driver_type
    return kind


class Neighbour(Node):  # type: ignore[misc]
    """A node that is there: the core takes out those that are missed."""

    @property
    def alive(self) -> bool:
        """Always."""
        return True


class Gossip:
    """`consumer.gossip`: handlers of joining, leaving and missed nodes, who is there, and elections."""

    def __init__(self, consumer: ConsumerStandIn, worker: Worker, desk: Desk) -> None:
        self.app = consumer.app
        self.hostname = consumer.hostname
        self.full_hostname = f"{consumer.hostname}.{os.getpid()}"
        self.enabled = not worker.options.get("without_gossip") and _transport(worker) in Original.compatible_transports
        self.on = Bunch(node_join=set(), node_leave=set(), node_lost=set())
        self.election_handlers: dict[str, Callable[[Any], None]] = {"task": self.call_task}
        self.state = self.app.events.State(
            on_node_join=self.on_node_join, on_node_leave=self.on_node_leave, max_tasks_in_memory=1
        )
        self.state.Worker = Neighbour
        self._desk = desk

    def election(self, id: str, topic: str, action: Any = None) -> None:
        """Votes with the others who is to do something; whoever wins calls the topic's handler."""
        self._desk.elect(id, topic, dumps(action))

    def call_task(self, task: Any) -> None:
        """Sends the task of an election that this worker has won."""
        try:
            self.app.signature(task).apply_async()
        except Exception as exc:
            logger.exception("Could not call task: %r", exc)

    def on_node_join(self, worker: Any) -> None:
        """A node is there."""
        self._call(self.on.node_join, worker)

    def on_node_leave(self, worker: Any) -> None:
        """A node has said that it leaves."""
        self._call(self.on.node_leave, worker)

    def on_node_lost(self, worker: Any) -> None:
        """A node has fallen silent."""
        self._call(self.on.node_lost, worker)

    def _call(self, handlers: set[Callable[[Any], None]], worker: Any) -> None:
        for handler in list(handlers):
            try:
                handler(worker)
            except Exception as exc:
                logger.exception("Ignored error from handler %r: %r", handler, exc)

    # --- what the core tells ------------------------------------------------------------------------

    def heard(self, event: dict[str, Any], missed: bool) -> None:
        """A node has joined or left with this event, or is missed since."""
        if not missed:
            self.state.event({**event, "local_received": time.time()})
            return
        worker = self.state.workers.pop(event["hostname"], None)
        if worker is not None:
            self.on_node_lost(worker)

    def won(self, topic: str, action: Any) -> None:
        """This worker has won an election."""
        handler = self.election_handlers.get(topic)
        if handler is None:
            logger.error("Unknown election topic %r", topic)
        else:
            handler(action)


def elected(gossip: Gossip, arguments: dict[str, Any]) -> str:
    """What remote control's table calls when this worker has won."""
    try:
        gossip.won(arguments["topic"], arguments["action"])
    except Exception:
        logger.exception("The handler of the election topic %r failed", arguments["topic"])
    return json.dumps(None)
