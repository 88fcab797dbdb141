"""Remote control commands that need Python: the app's own, its configuration, and what a revoke stores."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import states
from celery.utils.collections import AttributeDict
from celery.utils.objects import Bunch
from celery.worker.consumer import Consumer
from celery.worker.control import Panel
from kombu import serialization
from kombu.utils import json as kombu_json
from kombu.utils.encoding import ensure_bytes

from celeriac import config, gossip

if TYPE_CHECKING:
    from celeriac.worker import Worker

__all__ = ["Commands"]

logger = logging.getLogger("celery.worker.control")
pidbox_logger = logging.getLogger("kombu.pidbox")

#: A revoked task in one of these states will not reach another by itself.
OPEN = frozenset({states.PENDING, states.RECEIVED, states.RETRY, states.REJECTED})


class Commands:
    """Answers by name; an answer is the JSON text of the reply, `None` where there is no such command."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.app = worker.app
        #: What Rust asks on its own behalf; remote control cannot name these.
        self.own: dict[str, Callable[[dict[str, Any]], str | None]] = {
            "celeriac.declare": self._declare,
            "celeriac.deselect": self._deselect,
            "celeriac.elected": lambda arguments: gossip.elected(self.worker.consumer.gossip, arguments),
            "celeriac.open": self._open,
            "celeriac.overhear": self._overhear,
            "celeriac.seal": self._seal,
            "celeriac.stats": self._stats,
        }

    def run(self, method: str, arguments: dict[str, Any]) -> str | None:
        """Runs a command; its exception is its reply, as in Celery."""
        own = self.own.get(method)
        if own is not None:
            return own(arguments)
        command = Panel.data.get(method)
        if command is None:
            return None
        consumer = self.worker.consumer
        state = AttributeDict(app=self.app, hostname=self.worker.hostname, consumer=consumer, tset=set)
        consumer.qos.meant = True
        try:
            reply = command(state, **arguments)
        except Exception as exc:
            logger.exception("Control command %s failed", method)
            reply = {"error": repr(exc)}
        finally:
            consumer.qos.meant = False
        # As text: what Python writes, `Infinity` above all, is not JSON to everybody.
        return json.dumps(_as_json(reply))

    def _stats(self, figures: dict[str, Any]) -> str:
        """The figures of the core, with what the app's boot steps say of themselves."""
        try:
            for step, parent in self.worker.informative_steps():
                figures.update(step.info(parent) or {})
        except Exception as exc:
            logger.exception("A boot step cannot say what to show")
            return json.dumps({"error": repr(exc)})
        return json.dumps(figures, default=repr)

    def store_revoked(self, tasks: list[dict[str, str | None]]) -> None:
        """Stores REVOKED for tasks that no child runs and that have not ended elsewhere."""
        for revoked in tasks:
            task_id, task = revoked["id"], self.app.tasks.get(revoked["task"])
            try:
                # A task may have a backend of its own.
                backend = self.app.backend if task is None else task.backend
                if backend.get_state(task_id) in OPEN:
                    backend.mark_as_revoked(task_id, reason="revoked", store_result=True)
            except Exception as exc:
                logger.warning("Failed to mark task %s as revoked in backend: %s", task_id, exc)

    # --- queues ---

    def _declare(self, arguments: dict[str, Any]) -> str:
        """The queue that `add_consumer` means, as the core reads it: `Ok` with the queue, `Err` with an
        exception."""
        # Celery's own code finds or makes the queue and notes that it is consumed; it is told that there is
        # nothing left to do, because consuming is Rust's.
        stand_in = Bunch(app=self.app, task_consumer=Bunch(consuming_from=lambda _: True))
        name = arguments.pop("queue")
        exchange, kind, key = (arguments.pop(part, None) for part in ("exchange", "exchange_type", "routing_key"))
        try:
            Consumer.add_task_queue(stand_in, name, exchange, kind or "direct", key, **arguments)
            return json.dumps({"Ok": config.queue(self.app.amqp.queues[name])})
        except Exception as exc:
            return json.dumps({"Err": repr(exc)})

    def _deselect(self, arguments: dict[str, Any]) -> None:
        self.app.amqp.queues.deselect(arguments["queue"])

    # --- messages that are not JSON: signed ones, above all ---

    def _open(self, sealed: dict[str, Any], more: tuple[str, ...] = ()) -> str:
        """The body of a control message as `Ok`, or as `Err` why it may not or cannot be decoded."""
        try:
            body = serialization.loads(
                base64.b64decode(sealed["body"]),
                sealed["content_type"],
                sealed["content_encoding"],
                accept=serialization.prepare_accept_content([*(self.app.conf.accept_content or ()), *more]),
            )
        except Exception as exc:
            return json.dumps({"Err": repr(exc)})
        return json.dumps({"Ok": body}, default=repr)

    def _overhear(self, sealed: dict[str, Any]) -> str:
        """The same for what other workers say, who write events in a serializer of their own."""
        return self._open(sealed, (self.app.conf.event_serializer,))

    def _seal(self, reply: dict[str, Any]) -> str | None:
        """The reply as the app's serializer writes it."""
        try:
            content_type, content_encoding, body = serialization.dumps(
                kombu_json.loads(reply["body"]), serializer=reply["serializer"]
            )
        except Exception as exc:
            pidbox_logger.error("A reply could not be encoded: %r", exc)
            return None
        return json.dumps(
            {
                "content_type": content_type,
                "content_encoding": content_encoding,
                "body": base64.b64encode(ensure_bytes(body)).decode(),
            }
        )


def _as_json(reply: Any) -> str:
    """A reply as kombu's JSON has it; what that cannot express as its `repr`."""
    try:
        return str(kombu_json.dumps(reply))
    except Exception:
        return json.dumps(reply, default=repr)
