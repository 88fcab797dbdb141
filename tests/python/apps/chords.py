"""Chords for the chaos test: a member leaves a line when it has run, a body when its effect has happened."""

import os
import signal
import time

from base import make_app, record
from celery.signals import after_task_publish, before_task_publish

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


# ---- members that die at a given step, the first time


def die_once():
    try:
        os.close(os.open(os.environ["JOURNAL"] + ".died", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class Frail:
    """Encoded for the result first, then for the chord: dies in between."""

    encoded = False

    def __json__(self):
        if self.encoded:
            die_once()
        self.encoded = True
        return 7


@app.task(name="dies_with_its_result_stored")
def dies_with_its_result_stored():
    return Frail()


@app.task(name="dies_with_its_result_stored_early", acks_late=False)
def dies_with_its_result_stored_early():
    return Frail()


def die_sending(sender, **_):
    if sender == "body":
        die_once()


if step := os.environ.get("DIES"):
    {"before it sends": before_task_publish, "after it has sent": after_task_publish}[step].connect(die_sending)
