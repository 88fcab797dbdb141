"""The handler of a received task is slow, so that something else comes meanwhile."""

import time

from base import make_app, record
from celery.signals import task_received

app = make_app("slow_to_notice")


@app.task(name="add")
def add(x, y):
    return x + y


@task_received.connect
def slowly(request, **_):
    record("noticing", task=request.id)
    time.sleep(1)
