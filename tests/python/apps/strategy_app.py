"""Strategies of an app's own: one built on Celery's, one that collects messages and posts a function to the pool."""

import os

from base import make_app, record
from celery.worker.strategy import default

app = make_app("strategy_app")


def picky(task, app, consumer):
    """Drops and rejects some messages unread, runs the rest as Celery does."""
    handle = default(task, app, consumer)

    def on_message(message, body, ack, reject, callbacks, **kwargs):
        (verdict, *_), _, _ = message.payload
        record("strategy", verdict=verdict, id=message.headers["id"])
        if verdict == "drop":
            message.ack()
        elif verdict == "reject":
            message.reject()
        else:
            handle(message, body, ack, reject, callbacks, **kwargs)

    return on_message


def together(messages):
    """Runs in a child."""
    record("together", messages=sorted(messages), in_child=os.getpid() != os.getppid())
    if "fail" in messages:
        raise ValueError("fail")
    return len(messages)


def pairs(task, app, consumer):
    """Two messages make one call."""
    waiting = []

    def on_message(message, body, ack, reject, callbacks, **kwargs):
        waiting.append(message)
        if len(waiting) < 2:
            return
        messages = [waiting.pop(0), waiting.pop(0)]
        words = [message.payload[0][0] for message in messages]

        def done(answer):
            record("done", answer=answer)
            for message in messages:
                message.ack()

        def failed(einfo):
            record("failed", error=type(getattr(einfo.exception, "exc", einfo.exception)).__name__)
            for message in messages:
                message.reject()

        consumer.pool.apply_async(
            together,
            (words,),
            callback=done,
            error_callback=failed,
            accept_callback=lambda pid, when: record("accepted", child=pid != os.getpid()),
        )

    return on_message


def ticking(task, app, consumer):
    """Answers by the consumer's timer."""

    def on_message(message, body, ack, reject, callbacks, **kwargs):
        consumer.timer.call_after(0.05, message.ack)
        consumer.timer.call_after(0.05, record, ("ticked",), {"hostname": consumer.hostname})

    return on_message


def broken(task, app, consumer):
    """Asks for what only Celery's own consumer has."""
    consumer.hub.call_soon(print)


if os.environ.get("WITH_BROKEN"):

    @app.task(name="broken", Strategy="strategy_app:broken")
    def broken_task():
        pass


@app.task(name="picky", Strategy="strategy_app:picky", rate_limit="50/s")
def picky_task(verdict):
    return verdict


@app.task(name="pair", Strategy="strategy_app:pairs")
def pair(word):
    raise RuntimeError("never called")


@app.task(name="tick", Strategy="strategy_app:ticking")
def tick():
    raise RuntimeError("never called")
