"""Tasks that ask to be run again, in every way there is."""

from datetime import datetime, timedelta, timezone

from base import record
from celery import Task
from celery.exceptions import Ignore, Reject, Retry

from .celery import app, note

BUSY = ConnectionError("busy")


class Busy(Exception):
    pass


class VeryBusy(Busy):
    pass


class Expected(Exception):
    pass


def retrying(name, **options):
    """A task with this name that sees itself."""
    return app.task(name=f"retries.{name}", bind=True, **options)


@retrying("other_arguments")
def other_arguments(self, x, y=1):
    note(self)
    if self.request.retries < 2:
        raise self.retry(args=(x + 1,), kwargs={"y": y * 2}, countdown=0)
    return [x, y]


@retrying("kwargs_only")
def kwargs_only(self, x, y=1):
    note(self)
    if not self.request.retries:
        raise self.retry(kwargs={"x": 5, "y": 6}, countdown=0)
    return [x, y]


@retrying("other_queue")
def other_queue(self, queue):
    note(self, routing_key=self.request.delivery_info["routing_key"] == queue)
    if not self.request.retries:
        raise self.retry(queue=queue, countdown=0)
    return "there"


@retrying("at_eta")
def at_eta(self):
    note(self)
    if not self.request.retries:
        raise self.retry(eta=datetime.now(timezone.utc) + timedelta(seconds=0.3))
    return "in time"


@retrying("with_options")
def with_options(self):
    note(self)
    if not self.request.retries:
        raise self.retry(
            countdown=0, exc=BUSY, priority=5, time_limit=60, soft_time_limit=50, expires=300, shadow="shadowed",
            headers={"trace": "1"}, ignore_result=False, compression="gzip",
        )  # fmt: skip
    return "done"


@retrying("keeps_options")
def keeps_options(self):
    note(self)
    if self.request.retries < 2:
        raise self.retry(countdown=0)
    return "kept"


@retrying("without_end", max_retries=None)
def without_end(self):
    if self.request.retries < 5:
        raise self.retry(countdown=0)
    return self.request.retries


@retrying("never", max_retries=0)
def never(self):
    note(self)
    raise self.retry(countdown=0, exc=BUSY)


@retrying("never_without_cause", max_retries=0)
def never_without_cause(self):
    raise self.retry(countdown=0)


@retrying("fewer")
def fewer(self):
    note(self)
    raise self.retry(countdown=0, max_retries=1)


@retrying("while_handling", max_retries=1, default_retry_delay=0)
def while_handling(self):
    note(self)
    try:
        raise KeyError("handled")
    except KeyError:
        raise self.retry() from None


@retrying("class_as_cause", max_retries=1)
def class_as_cause(self):
    raise self.retry(exc=ValueError, countdown=0)


@retrying("not_thrown")
def not_thrown(self):
    note(self)
    if self.request.retries < 1:
        answer = self.retry(countdown=0.5, throw=False)
        return type(answer).__name__
    return "second"


@retrying("raised_by_hand")
def raised_by_hand(self):
    raise Retry("by hand", exc=BUSY, when=3)


@retrying("expected", throws=(Expected,), max_retries=1)
def expected(self):
    raise self.retry(countdown=0, exc=Expected("as announced"))


@retrying("cannot_be_sent", acks_late=True)
def cannot_be_sent(self):
    raise self.retry(args=(object(),), countdown=0)


@retrying("late", acks_late=True)
def late(self):
    note(self)
    if not self.request.retries:
        raise self.retry(countdown=0, exc=BUSY)
    return "late"


@retrying("ignoring", ignore_result=True)
def ignoring(self):
    note(self)
    if not self.request.retries:
        raise self.retry(countdown=0)
    note(self, "ended")


@retrying("unpicklable_cause", max_retries=1)
def unpicklable_cause(self):
    class Local(Exception):
        pass

    raise self.retry(exc=Local("local", lambda: None), countdown=0)


@retrying("auto", autoretry_for=(Busy,), dont_autoretry_for=(VeryBusy,), retry_kwargs={"countdown": 0}, max_retries=2)
def auto(self, how):
    note(self)
    match how:
        case "busy":
            raise Busy(self.request.retries)
        case "very":
            raise VeryBusy("no")
        case "other":
            raise ValueError("not among them")
        case "once" if not self.request.retries:
            raise Busy("once")
        case "ignore":
            raise Ignore("whatever")
        case "reject":
            raise Reject("whatever", requeue=False)
    return how


@retrying("backoff", autoretry_for=(Busy,), retry_backoff=True, retry_backoff_max=1, retry_jitter=False, max_retries=2)
def backoff(self):
    note(self)
    raise Busy("backed off")


@retrying("jitter", autoretry_for=(Busy,), retry_backoff=1, retry_backoff_max=1, max_retries=1)
def jitter(self):
    note(self)
    raise Busy("jittered")


class ByClass(Task):
    name = "retries.by_class"
    autoretry_for = (Busy,)
    retry_kwargs = {"max_retries": 1, "countdown": 0}

    def run(self):
        note(self)
        if not self.request.retries:
            raise Busy("class")
        return "by class"


app.register_task(ByClass())


class InHook(Task):
    def before_start(self, task_id, args, kwargs):
        if not self.request.retries:
            raise self.retry(countdown=0)


@app.task(name="retries.before_start", base=InHook, bind=True)
def before_start(self):
    note(self)
    return self.request.retries


@app.task(name="retries.errback")
def errback(request, exc, traceback):
    record("errback", id=request.id, retries=request.retries, exc=repr(exc), traceback=bool(traceback))
