"""Task classes, their hooks, their checks of arguments; tasks that call other tasks."""

from base import record
from celery import Task, current_app, current_task
from celery.exceptions import Ignore, Reject
from pydantic import BaseModel

from .celery import app, note

PLAIN = (int, str, list, dict, tuple, type(None))


class Everywhere(app.Task):
    """What an app gives all of its tasks."""

    abstract = True
    label = "everywhere"

    def __call__(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return super().__call__(*args, **kwargs)


class Hooked(Everywhere):
    abstract = True

    def leave(self, hook, *rest, **more):
        request = self.request
        record(
            hook,
            id=request.id,
            rest=[part if isinstance(part, PLAIN) else repr(part) for part in rest],
            stored=self.AsyncResult(request.id).state,
            current=current_task.name if current_task else None,
            **more,
        )

    def before_start(self, task_id, args, kwargs):
        self.leave("before_start", task_id, args, kwargs)

    def on_success(self, retval, task_id, args, kwargs):
        self.leave("on_success", retval, task_id, args, kwargs)

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        self.leave("on_failure", exc, task_id, args, kwargs, type(einfo).__name__, type(einfo.exception).__name__)

    def on_retry(self, exc, task_id, args, kwargs, einfo):
        self.leave("on_retry", exc, task_id, args, kwargs, type(einfo).__name__)

    def after_return(self, status, retval, task_id, args, kwargs, einfo):
        self.leave("after_return", status, retval, task_id, args, kwargs, type(einfo).__name__)


@app.task(name="classes.hooked", base=Hooked, bind=True, throws=(KeyError,))
def hooked(self, how, y=2):
    record("body", id=self.request.id, label=self.label)
    match how:
        case "fail":
            raise ValueError("failed")
        case "expected":
            raise KeyError("expected")
        case "retry" if not self.request.retries:
            raise self.retry(countdown=0, exc=ValueError("once"))
        case "ignore":
            raise Ignore("hooked")
        case "reject":
            raise Reject("hooked", requeue=False)
        case "unencodable":
            return object
        case "exit":
            raise SystemExit(3)
    return [how, y]


class Breaking(Hooked):
    def break_at(self, hook):
        # The hook to break is the first argument.
        if self.request.args[0] == hook:
            raise RuntimeError(f"{hook} breaks")

    def before_start(self, *args):
        super().before_start(*args)
        self.break_at("before_start")

    def on_success(self, *args):
        super().on_success(*args)
        self.break_at("on_success")

    def on_failure(self, *args):
        super().on_failure(*args)
        self.break_at("on_failure")

    def on_retry(self, *args):
        super().on_retry(*args)
        self.break_at("on_retry")

    def after_return(self, *args):
        super().after_return(*args)
        self.break_at("after_return")


@app.task(name="classes.breaking", base=Breaking, bind=True)
def breaking(self, where, how="succeed"):
    if how == "fail":
        raise ValueError("failed")
    if how == "retry" and not self.request.retries:
        raise self.retry(countdown=0)
    return how


class HookRejects(Hooked):
    def on_success(self, retval, task_id, args, kwargs):
        super().on_success(retval, task_id, args, kwargs)
        raise Reject("at the end", requeue=False)


@app.task(name="classes.hook_rejects", base=HookRejects)
def hook_rejects():
    return "rejected afterwards"


class Stateful(Task):
    def __init__(self):
        self.log = []

    def run(self, x):
        self.log.append(x)
        return [self.log, self.name, type(self).__name__]


class Named(Stateful):
    name = "classes.stateful"
    ignore_result = False


app.register_task(Named())


@app.task(name="classes.counted", base=Everywhere, bind=True)
def counted(self):
    return [self.calls, self.label, isinstance(self, Everywhere)]


class Wrapping(Task):
    def __call__(self, *args, **kwargs):
        return {"wrapped": self.run(*args, **kwargs), "direct": self.request.called_directly}


@app.task(name="classes.wrapped", base=Wrapping)
def wrapped(x):
    return x


class Shadowed(Task):
    def shadow_name(self, args, kwargs, options):
        return f"shadow of {args[0]}"


@app.task(name="classes.shadowed", base=Shadowed, bind=True)
def shadowed(self, x):
    note(self)
    return self.request.shadow


@app.task(name="classes.typed")
def typed(x, *, y=1):
    return [x, y]


@app.task(name="classes.untyped", typing=False)
def untyped(x):
    return x


# ---- tasks that call others


@app.task(name="classes.leaf", bind=True)
def leaf(self, *args):
    note(self)
    return list(args)


@app.task(name="classes.parent", bind=True)
def parent(self):
    first = leaf.delay("by delay")
    second = leaf.apply_async(("by apply_async",), shadow="leafy", headers={"x": "1"})
    third = leaf.s("by signature").apply_async(priority=7)
    self.app.send_task("classes.leaf", ("by name",))
    leaf.apply_async(("apart",), add_to_parent=False)
    direct = leaf("direct")
    eager = leaf.apply(("eager",)).result
    return {
        "children": [child.id in (first.id, second.id, third.id) for child in self.request.children],
        "direct": direct,
        "eager": eager,
        "current": [current_task.name, current_app.main, self.request.id == current_task.request.id],
    }


@app.task(name="classes.types_refused")
def types_refused():
    """The sender checks arguments; here the sender is a task."""
    try:
        typed.delay(1, 2, 3)
    except TypeError as error:
        said = str(error)
    untyped.delay(1, 2)
    return said


@app.task(name="classes.joins", bind=True)
def joins(self):
    try:
        leaf.delay().get(timeout=5)
    except RuntimeError as error:
        refused = str(error).split("!")[0]
    return [refused, leaf.delay("joined").get(timeout=20, disable_sync_subtasks=False)]


@app.task(name="classes.eager", bind=True)
def eager(self):
    app.conf.task_always_eager = True
    try:
        done = leaf.delay("eagerly")
        return [done.result, type(done).__name__, done.state]
    finally:
        app.conf.task_always_eager = False


# ---- pydantic


class Argument(BaseModel):
    value: int


class Answer(BaseModel):
    value: int
    name: str | None = None


@app.task(name="classes.model", pydantic=True)
def model(argument: Argument, plain: int, maybe: Argument | None = None) -> Answer:
    kinds = [type(argument).__name__, type(plain).__name__, type(maybe).__name__]
    return Answer(value=argument.value + int(plain), name=" ".join(kinds))


@app.task(name="classes.model_strict", pydantic=True, pydantic_strict=True)
def model_strict(argument: Argument) -> int:
    return argument.value


@app.task(
    name="classes.model_context",
    pydantic=True,
    pydantic_context={"a": 1},
    pydantic_dump_kwargs={"exclude_none": True},
)
def model_context(argument: Argument) -> Answer:
    return Answer(value=argument.value)


@app.task(name="classes.model_sends")
def model_sends():
    return model.delay(Argument(value=4), 5).id is not None
