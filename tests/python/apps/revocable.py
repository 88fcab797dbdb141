"""Tasks to be revoked, held back and annotated; a line in the journal for what the parent signals of them."""

import time

from base import make_app, record
from celery import signals

app = make_app("revocable")


def watch(name):
    def receive(sender=None, request=None, **fields):
        told = {
            key: int(value) if key == "signum" and value is not None else value
            for key, value in fields.items()
            if key != "signal"
        }
        sender = sender.name if name == "task_revoked" else None
        record(name, id=request.id, sender=sender, task=getattr(request, "task", None) and "…", **told)

    getattr(signals, name).connect(receive, weak=False)


watch("task_received")
watch("task_revoked")


@app.task(name="mark")
def mark(number):
    record("ran", number=number)
    return number


@app.task(name="hold", bind=True)
def hold(self, seconds):
    record("started", id=self.request.id)
    time.sleep(seconds)
    record("ended", id=self.request.id)
    return seconds


@app.task(name="hold_late", bind=True, acks_late=True)
def hold_late(self, seconds):
    record("started", id=self.request.id)
    time.sleep(seconds)
    record("ended", id=self.request.id)
    return seconds


@app.task(name="limited", rate_limit="2/s")
def limited(number):
    record("ran", number=number)
    return number


@app.task(name="slow", rate_limit="1/h")
def slow(number):
    record("ran", number=number)
    return number
