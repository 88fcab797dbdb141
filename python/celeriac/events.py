"""Events from the parent's Python: `consumer.event_dispatcher`, and what the core is told about events."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from celery.events import EventDispatcher
from celery.events.event import group_from
from celery.worker.state import SOFTWARE_INFO
from kombu.utils.json import dumps

if TYPE_CHECKING:
    from celery import Celery

    from celeriac._core import Desk
    from celeriac.worker import Worker

__all__ = ["Dispatcher", "config"]

#: Options of `send` that say how the dispatcher sends, not what.
HOW = ("blind", "utcoffset", "retry", "retry_policy", "Event")


def config(worker: Worker) -> dict[str, Any]:
    """`EventsConfig`: where events go is Celery's decision, asked of Celery."""
    dispatcher = worker.consumer.event_dispatcher
    return {
        "enabled": dispatcher.enabled,
        "task_events": bool(worker.task_events),
        "exchange": dispatcher.exchange.name,
        "exchange_type": dispatcher.exchange.type,
        "serializer": dispatcher.serializer,
        "software": SOFTWARE_INFO,
    }


class Dispatcher(EventDispatcher):  # type: ignore[misc]
    """Celery's dispatcher, whose events are sent by the core: in order with those of the core, under its clock."""

    def __init__(self, app: Celery, desk: Desk, hostname: str, *, enabled: bool, task_events: bool) -> None:
        # Made switched off: it has no connection to publish on.
        super().__init__(
            hostname=hostname, enabled=False, app=app, groups=None if task_events else ["worker"], buffer_group=["task"]
        )
        self.enabled = enabled and app.connection_for_write().transport.driver_type not in self.DISABLED_TRANSPORTS
        self._desk = desk

    def send(self, type: str, **fields: Any) -> None:
        """Sends an event, if its group is sent; raises where its fields are nothing that JSON can hold."""
        group = group_from(type)
        if self.enabled and (not self.groups or group in self.groups):
            own = {name: value for name, value in fields.items() if name not in HOW}
            self._desk.event(type, dumps(own))

    def flush(self, errors: bool = True, groups: bool = True) -> None:
        """Nothing waits here."""

    def enable(self) -> None:
        """Lets events through again."""
        self.enabled = True
        for callback in list(self.on_enabled):
            callback()

    def close(self) -> None:
        """There is no connection to close."""

    def switch(self, *, tasks: bool) -> None:
        """Remote control has switched the events of tasks."""
        if tasks:
            self.groups.add("task")
        else:
            self.groups.discard("task")
