"""Connects every signal of a worker and leaves a line for each that fires."""

import os

import billiard
from base import make_app, record
from celery import signals

app = make_app("signals_app")

NAMES = """
    celeryd_init celeryd_after_setup import_modules after_setup_logger after_setup_task_logger worker_init
    worker_before_create_process worker_ready heartbeat_sent worker_shutting_down worker_shutdown
    task_received task_revoked task_rejected task_unknown
    worker_process_init worker_process_shutdown task_prerun task_postrun task_success task_failure task_retry
    task_internal_error before_task_publish after_task_publish
"""


def role():
    name = billiard.current_process().name
    return "child" if name.startswith("ForkPoolWorker") else name


def about(value):
    """A value in a form that is equal from run to run."""
    if value is None or isinstance(value, bool | int | str | list | dict):
        return repr(value)
    return type(value).__name__


def task_of(fields):
    for key in ("task_id", "id"):
        if fields.get(key):
            return fields[key]
    request = fields.get("request")
    if request is not None:
        return getattr(request, "id", None)
    headers = fields.get("headers")
    return headers.get("id") if headers else None


def connect(name):
    def receive(sender=None, **fields):
        fields.pop("signal", None)
        if name == "heartbeat_sent" and getattr(app, "heartbeat_seen", False):
            return
        app.heartbeat_seen = app.heartbeat_seen or name == "heartbeat_sent"
        record(
            name,
            role=role(),
            sender=type(sender).__name__ if not isinstance(sender, str) else "str",
            fields={key: about(value) for key, value in fields.items()},
            task=task_of(fields),
        )

    getattr(signals, name).connect(receive, weak=False)


app.heartbeat_seen = False
for signal_name in NAMES.split():
    connect(signal_name)


@signals.worker_process_shutdown.connect(weak=False)
def left(pid=None, exitcode=None, **_):
    record("left", matches=pid == os.getpid(), exitcode=exitcode)


@app.task(name="add")
def add(x, y):
    return x + y


@app.task(name="fail")
def fail():
    raise ValueError("no")


@app.task(name="retry", bind=True, max_retries=1)
def retry(self):
    if not self.request.retries:
        raise self.retry(countdown=0.1)
    return "done"


@app.task(name="parent_of")
def parent_of():
    return add.delay(1, 1).id


@app.task(name="hard_limited", time_limit=1)
def hard_limited():
    import time

    time.sleep(30)


@app.task(name="kill_self")
def kill_self():
    os.kill(os.getpid(), 9)
