"""Batch tasks of celery-batches, as its documentation shows them."""

import time

from base import make_app, record
from celery_batches import Batches

app = make_app("batches_app")


def account(requests):
    record(
        "batch",
        numbers=sorted(request.args[0] for request in requests),
        ids=sorted(request.id for request in requests),
        about=sorted(
            {(request.name, request.hostname, request.delivery_info["routing_key"][:1]) for request in requests}
        ),
    )


@app.task(base=Batches, flush_every=4, flush_interval=1, name="total")
def total(requests):
    account(requests)
    for request in requests:
        app.backend.mark_as_done(request.id, sum(request.args), request=request)


@app.task(base=Batches, flush_every=3, flush_interval=600, acks_late=True, name="late")
def late(requests):
    account(requests)
    time.sleep(0.5)
    if any(request.kwargs.get("fail") for request in requests):
        raise ValueError("in a batch")
    for request in requests:
        app.backend.mark_as_done(request.id, "done", request=request)


@app.task(name="versions")
def versions():
    import celery

    return celery.__version__
