"""Breaks outside the bodies of its tasks: in the loader, in the backend, in a receiver."""

import json
import os

from base import record
from celery import Celery, signals
from celery.backends.redis import RedisBackend
from celery.loaders.app import AppLoader
from kombu.exceptions import OperationalError


class Loader(AppLoader):
    def on_task_init(self, task_id, task):
        if task.name == "internal.init":
            raise RuntimeError("the loader breaks")

    def on_process_cleanup(self):
        record("cleanup")
        if os.environ.get("BREAK_CLEANUP"):
            raise RuntimeError("the cleanup breaks")


class Backend(RedisBackend):
    """Refuses some results, each in its own way."""

    def _store_result(self, task_id, result, state, *args, **kwargs):
        if result == "refused":
            raise ValueError("the backend breaks")
        if result == "away":
            raise OperationalError("the backend is away")
        return super()._store_result(task_id, result, state, *args, **kwargs)


app = Celery("internal", loader=Loader)
app.conf.update(json.loads(os.environ["APP_CONF"]))
if app.conf.get("break_backend"):
    app.conf.result_backend = f"internal:Backend+{app.conf.result_backend}"


@signals.task_internal_error.connect
def on_internal_error(sender=None, **fields):
    fields.pop("signal", None)
    record(
        "internal_error",
        sender=sender.name,
        id=fields["task_id"],
        keys=sorted(fields),
        exception=repr(fields["exception"]),
        request=fields["request"].get("id"),
    )


@signals.task_prerun.connect
def on_prerun(task=None, **_):
    if task.name == "internal.prerun":
        raise RuntimeError("the receiver breaks")


@signals.task_postrun.connect
def on_postrun(task_id=None, state=None, retval=None, **_):
    record("postrun", id=task_id, state=state, retval=repr(retval))


@app.task(name="internal.init")
def init():
    return "never"


@app.task(name="internal.prerun")
def prerun():
    return "ran"


@app.task(name="internal.value")
def value(result):
    return result
