"""Tasks that say where they came from, on the queues that TOPOLOGY names."""

import os
import time

import topology
from base import make_app, record

app = make_app("routing")
getattr(topology, os.environ.get("TOPOLOGY", "nothing"))(app)


def seen(task):
    """Where the message came from, as the task sees it."""
    info = task.request.delivery_info
    return {name: info[name] for name in ("exchange", "routing_key", "priority")}


@app.task(name="where", bind=True)
def where(self):
    record("ran", task="where")
    return seen(self)


@app.task(name="mark", bind=True)
def mark(self, number):
    record("ran", number=number, **seen(self))


@app.task(name="late_mark", bind=True, acks_late=True)
def late_mark(self, number):
    record("ran", number=number, **seen(self))


@app.task(name="properties", bind=True)
def properties(self):
    shown = dict(self.request.properties)
    return {name: shown.get(name) for name in ("application_headers", "delivery_mode", "priority")}


for name in topology.ROUTES:

    @app.task(name=name, bind=True)
    def routed(self):
        record("ran", task=self.name, **seen(self))


@app.task(name="send")
def send(name, args=(), options=None):
    """Sends from a child."""
    app.tasks[name].apply_async(tuple(args), **(options or {}))


@app.task(name="retry_once", bind=True)
def retry_once(self, number):
    record("try", number=number, retries=self.request.retries, **seen(self))
    if self.request.retries < 2:
        raise self.retry(countdown=1)


@app.task(name="mark_at", bind=True)
def mark_at(self, number):
    record("ran", number=number, at=time.time(), eta=self.request.eta, **seen(self))
