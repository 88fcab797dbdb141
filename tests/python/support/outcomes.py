"""How tasks ended, in a form that two workers can be compared by."""

import re

import redis

from support.lines import by_process, lines_of_task, plain
from support.waiting import until

ENDED = {"SUCCESS", "FAILURE", "REVOKED"}


def ended(stage, task_id):
    """The result document once it is final."""
    document = stage.app.backend.get_task_meta(task_id, cache=False)
    return document if document["status"] in ENDED else None


def comparable(document):
    """A result document without what differs from run to run."""
    traceback = document.get("traceback")
    return {
        "status": document["status"],
        "result": plain(repr(document["result"])),
        "type": type(document["result"]).__name__,
        # Frames of the tracer may differ; the user's own and the exception may not.
        "frames": re.findall(r'/apps/[\w/]+\.py", line \d+, in \w+', traceback or ""),
        "last": plain(traceback or "").strip().splitlines()[-1:],
        "children": len(document.get("children") or []),
        "done": bool(document.get("date_done")),
        "keys": sorted(document),
    }


def story(stage, worker, task_id):
    """Everything that one task left behind: its lines, and what it noted itself."""
    return {
        "lines": by_process(lines_of_task(worker.log, f"[{task_id}]")),
        "journal": [
            {key: value for key, value in line.items() if key not in ("pid", "time")}
            for line in stage.journal(id=task_id)
        ],
    }


class Published:
    """Every result that is written to Redis, in order: each is published, too."""

    def __init__(self, stage):
        self.decode = stage.app.backend.decode
        self.pubsub = redis.Redis.from_url(stage.conf["result_backend"]).pubsub(ignore_subscribe_messages=True)
        self.pubsub.psubscribe("celery-task-meta-*")
        # Until the server has it.
        until(lambda: self.pubsub.subscribed and self.pubsub.get_message(timeout=0.1) is None, "subscribed")
        self.documents = {}

    def of(self, task_id):
        """What was stored for a task so far. What is stored twice in a row counts once: Celery does so after a hard
        time limit."""
        while message := self.pubsub.get_message():
            key = message["channel"].decode().removeprefix("celery-task-meta-")
            self.documents.setdefault(key, []).append(self._comparable(self.decode(message["data"])))
        found = self.documents.get(task_id, [])
        return [stored for number, stored in enumerate(found) if not number or stored != found[number - 1]]

    @staticmethod
    def _comparable(document):
        found = {"status": document["status"], "keys": sorted(document)}
        if document["status"] != "STARTED":
            found["result"] = plain(repr(document["result"]))
        return found
