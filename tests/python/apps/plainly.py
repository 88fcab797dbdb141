"""Tasks that are plain, and what they can see and leave behind."""

import os

import billiard
from base import make_app, record
from celery import Task, current_task, signals
from celery.app import trace
from celery.app.task import Context

app = make_app("plainly")

if os.environ.get("SHOW_ARGUMENTS"):
    trace.LOG_SUCCESS += " of %(args)s and %(kwargs)s"


class Watching(Task):
    """Its hooks after a failure see what the body has left in the request."""

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        record("on_failure", id=task_id, note=getattr(self.request, "note", None), traceback=einfo.traceback)

    def on_retry(self, exc, task_id, args, kwargs, einfo):
        record("on_retry", id=task_id, note=getattr(self.request, "note", None))


def seen(request):
    """What is alike in each run."""
    shown = {
        name: value
        for name, value in sorted(vars(request).items())
        if name not in ("properties", "origin", "delivery_info", "reply_to", "hostname") and not callable(value)
    }
    return {"type": type(request) is Context, "queue": request.delivery_info["redelivered"], **shown}


@app.task(name="nothing")
def nothing():
    pass


@app.task(name="echo")
def echo(value=None, **more):
    return value if not more else [value, more]


@app.task(name="look", bind=True)
def look(self):
    return seen(self.request)


@app.task(name="look_from_outside")
def look_from_outside():
    return seen(current_task.request)


@app.task(name="note", bind=True, base=Watching)
def note(self, how):
    self.request.note = how
    if how == "fail":
        raise ValueError(how)
    if how == "retry" and not self.request.retries:
        raise self.retry(countdown=0)
    if how == "unencodable":
        return object()
    return how


@app.task(name="calls_itself", bind=True)
def calls_itself(self, depth):
    """A direct call has a request of its own."""
    own = (self.request.id is not None, self.request.called_directly)
    return [own] if depth == 0 else [own, *self(depth - 1), (self.request.id is not None, depth)]


@app.task(name="spawns", bind=True)
def spawns(self):
    nothing.delay()
    return len(self.request.children)


@app.task(name="raises", bind=True)
def raises(self, what):
    try:
        {}["inner"]
    except KeyError as error:
        raise RuntimeError(what) from error


@app.task(name="reads", bind=True)
def reads(self):
    """All that a child keeps of what ran before."""
    stack = self.request_stack.stack
    return [len(stack), billiard.current_process().name.startswith("ForkPoolWorker")]


@signals.task_failure.connect
def on_task_failure(sender=None, task_id=None, exception=None, **_):
    record("task_failure", id=task_id, exception=repr(exception), context=repr(exception.__cause__))
