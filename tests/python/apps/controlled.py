"""Commands of remote control that the app registers, in every way that Celery offers; and tasks to look at."""

import time
from datetime import datetime, timezone

from base import make_app, record
from celery.worker.control import Panel, control_command, inspect_command

app = make_app("controlled")


@app.task(name="hold", bind=True)
def hold(self, seconds, **note):
    record("started", id=self.request.id)
    time.sleep(seconds)
    return seconds


@app.task(name="mark", rate_limit="100/m", queue_hint="cold")
def mark(number):
    record("ran", number=number)
    return number


@inspect_command()
def current_prefetch_count(state):
    return {"prefetch_count": state.consumer.qos.value}


@control_command(args=[("n", int)], signature="[N=1]")
def increase_prefetch_count(state, n=1):
    state.consumer.qos.increment_eventually(n)
    return {"ok": "prefetch count incremented"}


@inspect_command(alias="words_of", variadic="words", signature="[word1 [word2 ...]]")
def count_words(state, words=None, **kwargs):
    return {"words": words, "others": sorted(kwargs)}


@Panel.register(name="enlarge", type="control", args=[("n", int)])
def make_larger(state, n=1, **kwargs):
    pool = state.consumer.pool
    pool.grow(n)
    state.consumer._update_prefetch_count(n)
    return {"ok": state["hostname"]}


@Panel.register
def plainly(state, **kwargs):
    return "plain"


@inspect_command()
def look_around(state):
    controller = state.consumer.controller
    return {
        "app": state.app.main,
        "is the current app": state.app is app,
        "hostname": state.hostname,
        "controller": controller.hostname,
        "pool": state.consumer.pool.info["implementation"],
        "same pool": controller.pool is state.consumer.pool,
        "stats": sorted(controller.stats()),
        "autoscaler": controller.autoscaler is None,
        "set": sorted(set(state.tset(["b", "a"]))),
        "tasks": sorted(name for name in state.app.tasks if not name.startswith("celery.")),
    }


@inspect_command()
def dates(state, at=None):
    return {"next": datetime(2030, 1, 1, tzinfo=timezone.utc), "given": type(at).__name__}


@control_command()
def listen_to(state, queue):
    state.consumer.call_soon(state.consumer.add_task_queue, queue)
    return {"ok": "will listen"}


@control_command()
def fail_at_it(state):
    raise LookupError("nothing here")
