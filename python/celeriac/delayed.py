"""Native delayed delivery: RabbitMQ holds messages with an `eta` in queues of its own, so that quorum queues, whose
prefetch count cannot grow, are not blocked by them.

The exchanges and queues are shared with Celery's producers and workers, which declare them too and must agree in
every argument. So they are declared by Celery's own boot step, of whatever version is installed: after each connect
of the core, to each of the app's brokers.
"""

from __future__ import annotations

import importlib
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from celery import Celery

#: Kinds of queue that may hold delayed messages.
QUEUE_TYPES = ("classic", "quorum")


def step_of(consumer: Any) -> Any:
    """Celery's boot step; none where the app has no quorum queue, or Celery (before 5.5) no such step."""
    try:
        module = importlib.import_module("celery.worker.consumer.delayed_delivery")
    except ImportError:
        return None
    step = module.DelayedDelivery(consumer)
    return step if step.include_if(consumer) else None


def refusal(app: Celery) -> str | None:
    """Why delayed delivery cannot be set up, where the app asks for it."""
    from celery.utils.objects import Bunch

    kind = app.conf.get("broker_native_delayed_delivery_queue_type")
    if kind in QUEUE_TYPES or step_of(Bunch(app=app)) is None:
        return None
    return f"broker_native_delayed_delivery_queue_type is {kind!r}: it must be one of {', '.join(QUEUE_TYPES)}."


class DelayedDelivery:
    """Declares at each connect: the first time before the worker is ready, later beside everything else, since a
    broker of the failover list that is down is tried for a while."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self._last: threading.Thread | None = None
        self._is_first = True

    def connected(self) -> None:
        """The core is connected."""
        step = step_of(self._consumer)
        if step is None:
            return
        if self._is_first:
            self._is_first = False
            self._declare(step)
            return
        self._last = threading.Thread(
            target=self._declare, args=(step, self._last), name="delayed-delivery", daemon=True
        )
        self._last.start()

    def _declare(self, step: Any, after: threading.Thread | None = None) -> None:
        if after is not None:
            after.join()
        # The step says in its log what is wrong with the settings; tasks without an `eta` run without it.
        with suppress(ValueError):
            step.start(self._consumer)
