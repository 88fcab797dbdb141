"""Chords for the chaos test: a member leaves a line when it has run, a body when its effect has happened."""

import time

from base import make_app, record

app = make_app("chords")
app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)


@app.task(name="member")
def member(number, index, seconds):
    time.sleep(seconds)
    record("member", chord=number, index=index)
    return number * 1000 + index


@app.task(name="body")
def body(values, number, seconds):
    # Long enough to be hit in the middle now and then.
    time.sleep(seconds)
    record("body", chord=number, id=body.request.id, total=sum(values), count=len(values))
    return sum(values)
