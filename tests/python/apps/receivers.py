"""Takes its time over `task_received`; the second receiver is connected when the worker is ready."""

import time

from base import make_app, record
from celery import signals

app = make_app("receivers")


def on_received(sender=None, request=None, **_):
    time.sleep(0.2)
    record("received", id=request.id, args=request.args, nesting=request.replaced_task_nesting)


if app.conf.get("connect_early"):
    signals.task_received.connect(on_received)


@signals.worker_ready.connect
def on_ready(**_):
    if not app.conf.get("connect_early"):
        signals.task_received.connect(on_received)


@app.task(name="receivers.task", bind=True)
def task(self, number):
    record("ran", id=self.request.id)
    return number
