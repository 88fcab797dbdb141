"""A stage: one kind of worker, one broker, one backend, a producer, and what was observed."""

import json
import os
from pathlib import Path

from celery import Celery

from support.waiting import until
from support.worker import WorkerProcess

# Asking the neighbours takes a second at each start.
QUIET = ["--without-mingle", "--without-gossip"]

# Without the handler Rust and C crash without a trace; the second lets root run pickle.
ALWAYS = {"PYTHONFAULTHANDLER": "1", "C_FORCE_ROOT": "1"}


class Stage:
    def __init__(self, kind, folder: Path, broker_url, result_backend, queue, conf):
        self.kind = kind
        self.folder = folder
        self.queue = queue
        self.journal_path = folder / "journal.jsonl"
        self.conf = {
            "broker_url": broker_url,
            "result_backend": result_backend,
            "task_default_queue": queue,
            "broker_connection_retry_on_startup": True,
            **conf,
        }
        # The producer is Celery itself in this process; it knows tasks by name only.
        self.app = self.producer()
        self.workers = []

    def producer(self):
        """A new one, whose connections are not made yet."""
        app = Celery("producer", set_as_current=False)
        app.conf.update(self.conf)
        return app

    # ---- the worker's side

    def worker(
        self, *options, app="zoo", conf=None, env=None, concurrency=1, kind=None, ready=True, before=(), quiet=QUIET
    ):
        """Starts a worker; `conf` adds settings for it alone, `before` are words before its command."""
        options = ["--loglevel=INFO", f"--concurrency={concurrency}", *quiet, *options]
        if not any(option.startswith(("-n", "--hostname")) for option in options):
            options.append(f"--hostname=w{len(self.workers)}@here")
        worker = WorkerProcess(
            kind or self.kind, app, options, self.folder,
            ALWAYS
            | {"APP_CONF": json.dumps(self.conf | (conf or {})), "JOURNAL": str(self.journal_path)}
            | (env or {}),
            before,
        )  # fmt: skip
        self.workers.append(worker)
        return worker.start(ready)

    # ---- the producer's side

    def send(self, name, *args, kwargs=None, **options):
        return self.app.send_task(name, args, kwargs, **options)

    def s(self, name, *args, **options):
        """A signature that is sent by this stage's producer."""
        return self.app.signature(name, args=args, **options)

    # ---- what can be seen

    def journal(self, event=None, **fields):
        if not self.journal_path.exists():
            return []
        lines = [json.loads(line) for line in self.journal_path.read_text().splitlines()]
        return [
            line
            for line in lines
            if event in (None, line["event"]) and all(line.get(key) == value for key, value in fields.items())
        ]

    def wait_journal(self, event, count=1, timeout=30, **fields):
        def enough():
            found = self.journal(event, **fields)
            return found if len(found) >= count else None

        def describe():
            here = len(self.journal(event, **fields))
            return f"{count} x {event} {fields} in the journal, there are {here}\n{self.logs()}"

        return until(enough, describe, timeout)

    def depth(self):
        """Messages that wait in the stage's queue."""
        with self.app.connection_for_read() as connection:
            channel = connection.default_channel
            if connection.transport.driver_type == "redis":
                return channel._size(self.queue)
            return channel.queue_declare(self.queue, passive=True).message_count

    def wait_empty(self, timeout=30):
        """Until the queue is empty and nothing is unsettled."""
        until(lambda: self.depth() == 0 and not self.unacked(), lambda: f"{self.depth()} messages wait", timeout)

    def unacked(self):
        """What workers hold, where the broker tells: Redis only."""
        with self.app.connection_for_read() as connection:
            if connection.transport.driver_type != "redis":
                return {}
            return connection.default_channel.client.hgetall("unacked")

    def redis(self):
        import redis

        return redis.Redis.from_url(self.conf["broker_url"])

    # ---- the end

    def logs(self):
        return "\n".join(worker.describe() for worker in self.workers)

    def close(self):
        for worker in self.workers:
            worker.destroy()
        self.app.close()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        if error is not None and os.environ.get("CELERIAC_TEST_LOGS"):
            print(self.logs())
        self.close()
