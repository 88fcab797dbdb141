"""What the apps under test share: configuration handed over by the test, and a journal that it reads.

APP_CONF is a JSON object of settings, JOURNAL the path of a file of JSON lines.
"""

import json
import os
import time

from celery import Celery


def make_app(name, kind=Celery):
    app = kind(name)
    app.conf.update(json.loads(os.environ["APP_CONF"]))
    return app


def record(event, **fields):
    """One line, in one write, so that lines of several processes do not mix."""
    line = json.dumps({"event": event, "pid": os.getpid(), "time": time.time(), **fields}, default=repr) + "\n"
    descriptor = os.open(os.environ["JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)
