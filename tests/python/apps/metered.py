"""Tasks that end in every way there is, for the metrics."""

import os
import time

from base import make_app, record
from celery.exceptions import Ignore, Reject

app = make_app("metered")


@app.task(name="ok")
def ok(x):
    return x


@app.task(name="fail")
def fail(text):
    raise (KeyError if text == "key" else ValueError)(text)


@app.task(name="again", bind=True, max_retries=1)
def again(self):
    if self.request.retries == 0:
        raise self.retry(countdown=0)
    return "second"


@app.task(name="ignored")
def ignored():
    raise Ignore()


@app.task(name="rejected", acks_late=True)
def rejected():
    raise Reject("unwanted", requeue=False)


@app.task(name="dies")
def dies():
    os.kill(os.getpid(), 9)


@app.task(name="late", time_limit=0.3)
def late():
    time.sleep(60)


@app.task(name="burn")
def burn(seconds):
    record("burning")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass


@app.task(name="wait", acks_late=True)
def wait(path):
    record("waiting")
    while not os.path.exists(path):
        time.sleep(0.02)
