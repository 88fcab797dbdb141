"""A task for the chaos tests: each run leaves a line, early acks are for nobody here."""

import os
import time

from base import make_app, record

app = make_app("counting")
app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)


@app.task(name="count")
def count(number, seconds=0.0):
    time.sleep(seconds)
    # Written before the result is stored and the message settled: a run that is repeated shows twice.
    record("ran", number=number)
    return number


@app.task(name="slow")
def slow(number, seconds):
    record("started", number=number, process=os.getpid())
    time.sleep(seconds)
    record("ran", number=number)
    return number


@app.task(name="hold")
def hold(number, path):
    """Runs until the file is there."""
    record("started", number=number, process=os.getpid())
    while not os.path.exists(path):
        time.sleep(0.01)
    record("ran", number=number)
    return number
