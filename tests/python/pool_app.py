"""Tasks for the tests of the pool."""

from __future__ import annotations

import os
import random
import sys
import time
from typing import Any

import billiard
import multiprocessing
from celery import Celery, Task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded


def make(**settings: Any) -> Celery:
    app = Celery("pool_app", broker="memory://", set_as_current=False)
    app.conf.update(settings)

    @app.task(name="add")
    def add(x: int, y: int) -> int:
        return x + y

    @app.task(name="fail")
    def fail(text: str) -> None:
        raise KeyError(text)

    @app.task(name="retry", bind=True)
    def retry(self: Task) -> None:
        raise self.retry(exc=ValueError("again"), countdown=60)

    @app.task(name="ignore")
    def ignore() -> None:
        raise Ignore

    @app.task(name="reject")
    def reject(requeue: bool) -> None:
        raise Reject("unwanted", requeue=requeue)

    @app.task(name="leave")
    def leave(code: Any) -> None:
        sys.exit(code)

    @app.task(name="die")
    def die(signum: int) -> None:
        os.kill(os.getpid(), signum)
        time.sleep(60)

    @app.task(name="sleep")
    def sleep(seconds: float) -> str:
        try:
            time.sleep(seconds)
        except SoftTimeLimitExceeded:
            return "soft limit"
        return "slept"

    @app.task(name="who", bind=True)
    def who(self: Task) -> dict[str, Any]:
        process = billiard.current_process()
        return {
            "name": process.name,
            "index": getattr(process, "index", None),
            "daemon": process.daemon,
            "same": process is multiprocessing.current_process(),
            "class": type(process).__name__,
            "stdin": os.readlink("/proc/self/fd/0"),
            "random": random.random(),
            "delivery_info": self.request.delivery_info,
            "reply_to": self.request.reply_to,
            "correlation_id": self.request.correlation_id,
            "hostname": self.request.hostname,
            "headers": self.request.headers,
        }

    return app
