"""The supervisor's Python side: what the Rust worker asks of the app, on the main thread.

Healthy tasks do not come here. The app's signal handlers do, and the few failures that a parent process has to
account for because no child will: Celery's own ``Request`` and backend objects serve those, of whatever version.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from celery import signals
from celery.utils.debug import cry
from kombu.utils import json as kombu_json

from celeriac import _core, json_lines, kombu_bridge, ladder
from celeriac.commands import Commands
from celeriac.hosting import Hosting
from celeriac.incidents import Incidents

if TYPE_CHECKING:
    from celeriac.worker import Worker
    from celeriac.zygote import Zygote

__all__ = ["Ended", "Hooks", "run"]

logger = logging.getLogger("celery.worker")


@dataclass(frozen=True)
class Ended:
    """How the worker ended."""

    exitcode: int
    restart: bool


def run(worker: Worker, zygote: Zygote) -> Ended:
    """Runs the Rust worker until it is told to stop; blocks. The zygote's socket is given away."""
    hooks = Hooks(worker)
    exitcode, restart, _broken = _core.run_worker(
        json.dumps(worker.core_config),
        hooks,
        zygote_fd=zygote.socket,
        zygote_pid=zygote.pid,
        wants_received=hooks.wants_received,
        desk=worker.pool.calls.desk,
        bridges=kombu_bridge.bridges(worker.app) if ladder.broker(worker.app).rung == "python" else None,
    )
    return Ended(exitcode, restart)


class Hooks:
    """Called from Rust, one call at a time. Whatever user code raises is logged here and goes no further."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.incidents = Incidents(worker)
        self.commands = Commands(worker)
        self.hosting = Hosting(worker, self.incidents)

    @property
    def wants_received(self) -> bool:
        """Whether `task_received` has receivers; Rust asks again after each notice."""
        return bool(signals.task_received.receivers)

    def notice(self, text: str) -> None:
        try:
            self._notice(json.loads(text))
        except SystemExit as leaving:
            # `WorkerShutdown`, above all: how the app's own code ends Celery's worker.
            self.worker.fail(leaving)
        except Exception:
            logger.exception("A hook of the worker failed: %s", text)

    def _notice(self, notice: Any) -> None:
        if isinstance(notice, str):
            notice = {"what": notice}
        fields = notice.get("fields") or {}
        match notice["what"]:
            case "ready":
                self.worker.consumer.ready()
            case "shutting_down":
                signals.worker_shutting_down.send(
                    sender=self.worker.hostname,
                    sig=fields["signal"],
                    how=fields["how"],
                    exitcode=fields["exit_code"],
                )
            case "revoked":
                # What the state file is written from, and what the app's own code may look at.
                self.worker.state.revoked.update(fields)
            case "over":
                self.worker.app.clock.adjust(fields["clock"])
            case "events":
                self.worker.consumer.event_dispatcher.switch(tasks=fields["tasks"])
            case "neighbour":
                self.worker.consumer.gossip.heard(fields["event"], fields["missed"])
            case "heartbeat":
                signals.heartbeat_sent.send(sender=self.worker.consumer)
            case "listening":
                self.worker.listening()
            case "children":
                self.worker.pool.pids = fields
            case "say":
                self.worker.say(fields, sys.__stdout__)
            case "cry":
                self.worker.say(cry(), sys.__stderr__)
            case "connected":
                self.worker.consumer.connected()
            case "lost":
                self.worker.consumer.lost()
            case "stopping":
                self.worker.stopping(**fields)

    def log(self, records: list[tuple[str, int, str, str | None, str | None]]) -> None:
        for name, level, message, data, task in records:
            target = logging.getLogger(name)
            if not target.isEnabledFor(level):
                continue
            with json_lines.about(json.loads(task) if task else None):
                if data is None:
                    target.log(level, "%s", message)
                else:
                    fields = json.loads(data)
                    target.log(level, "Task %(name)s[%(id)s] received", fields, extra={"data": fields})

    def received(self, envelope: str, body: bytes) -> None:
        parts = json.loads(envelope)
        with json_lines.about(_headers(parts)):
            self.incidents.received(parts, body)

    def report(self, incident: str, envelope: str, body: bytes, pid: int | None) -> str | None:
        parts = json.loads(envelope)
        with json_lines.about(_headers(parts)):
            try:
                return json.dumps(self.incidents.report(json.loads(incident), parts, body, pid))
            except Exception:
                logger.exception("A message could not be reported: %s", incident)
                return None

    def store_revoked(self, tasks: str) -> None:
        self.commands.store_revoked(json.loads(tasks))

    def hosted(self, event: str, envelope: str | None, data: bytes | None) -> str | None:
        with json_lines.about(_headers(json.loads(envelope)) if envelope else None):
            try:
                return self.hosting.event(event, envelope, data)
            except Exception:
                logger.exception("A request or strategy of the app failed: %s", event)
                return None

    def control(self, method: str, arguments: str) -> str | None:
        try:
            return self.commands.run(method, kombu_json.loads(arguments))
        except SystemExit as leaving:
            self.worker.fail(leaving)
            return None


def _headers(envelope: dict[str, Any]) -> dict[str, Any] | None:
    """The headers of a message, where they are those of a task."""
    headers = envelope["headers"]
    return headers if isinstance(headers, dict) and "task" in headers else None
