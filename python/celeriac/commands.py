"""Remote control commands that need Python: the app's own, its configuration, and what a revoke stores."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from celery import states
from celery.utils.objects import Bunch
from celery.worker.control import Panel

if TYPE_CHECKING:
    from celeriac.worker import Worker

__all__ = ["Commands"]

logger = logging.getLogger("celery.worker.control")

#: A revoked task in one of these states will not reach another by itself.
OPEN = frozenset({states.PENDING, states.RECEIVED, states.RETRY, states.REJECTED})


class Commands:
    """Answers by name; an answer is the JSON text of the reply, `None` where there is no such command."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.app = worker.app

    def run(self, method: str, arguments: dict[str, Any]) -> str | None:
        """Runs a command; its exception is its reply, as in Celery."""
        command = Panel.data.get(method)
        if command is None:
            return None
        state = Bunch(
            app=self.app,
            hostname=self.worker.hostname,
            consumer=self.worker.consumer,
            tset=set,
        )
        try:
            reply = command(state, **arguments)
        except Exception as exc:
            logger.exception("Control command %s failed", method)
            reply = {"error": repr(exc)}
        return json.dumps(reply, default=repr)

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
