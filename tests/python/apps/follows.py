"""Tasks that show what they were sent as the next step of something."""

from datetime import datetime

from base import make_app, record

app = make_app("follows")

#: Attributes of the request that are shown.
SHOWN = (
    *("task", "shadow", "expires", "group", "group_index", "retries", "timelimit", "root_id", "parent_id"),
    *("argsrepr", "kwargsrepr", "ignore_result", "replaced_task_nesting", "stamped_headers", "stamps", "reply_to"),
    *("correlation_id", "callbacks", "errbacks", "chain", "chord", "children"),
)


def show(self, args, kwargs):
    request = self.request
    info = {name: request.delivery_info[name] for name in ("exchange", "routing_key", "priority")}
    seen = {name: repr(getattr(request, name, None)) for name in SHOWN}
    tenant = vars(request).get("x-tenant")
    record("saw", id=request.id, args=repr(args), kwargs=repr(kwargs), tenant=tenant, **seen, delivery=repr(info))


@app.task(name="look", bind=True)
def look(self, *args, **kwargs):
    show(self, args, kwargs)
    return [len(args), {"kwargs": kwargs}, "it's", 1.5, None]


@app.task(name="limited", bind=True, time_limit=50, soft_time_limit=40, ignore_result=True)
def limited(self, *args, **kwargs):
    show(self, args, kwargs)


@app.task(name="odd", bind=True)
def odd(self, *args):
    show(self, args, {})
    return (1, datetime(2031, 2, 3), {4: 5})


@app.task(name="fail")
def fail(*args):
    raise ValueError("no")


@app.task(name="replaced", bind=True)
def replaced(self, *args):
    raise self.replace(look.s("in its place"))


@app.task(name="changes", bind=True)
def changes(self, *args):
    """Changes what comes next, as code that knows Celery well does."""
    step = self.request.chain[-1]
    step["args"] = ["changed"]
    step["options"]["shadow"] = "changed"
    return None


@app.task(name="ends", bind=True)
def ends(self, *args):
    """Ends its chain."""
    self.request.chain = None
    return "ended"


@app.task(name="adds", bind=True)
def adds(self, *args):
    self.request.callbacks = [look.si("added").set(task_id="added")]
    return None


@app.task(name="errback")
def errback(request, error, traceback):
    record("errback", task=request.id, error=repr(error))


@app.task(name="total")
def total(numbers):
    return sum(numbers)


@app.task(name="number", bind=True)
def number(self, value):
    return value
