"""Tasks of every sort that users write."""

import os
import signal
import sys
import time

from base import make_app, record
from celery import Task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

app = make_app("zoo")


class Expected(Exception):
    pass


class TwoArguments(Exception):
    """Cannot be made from its message alone, as exceptions that travel by JSON must be."""

    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")
        self.code = code


@app.task(name="add")
def add(x, y):
    return x + y


@app.task(name="echo")
def echo(*args, **kwargs):
    return [args, kwargs]


@app.task(name="mark")
def mark(number):
    """Leaves a line when it ran."""
    record("ran", number=number)
    return number


@app.task(name="late_mark", acks_late=True)
def late_mark(number):
    record("ran", number=number)
    return number


@app.task(name="total")
def total(numbers):
    return sum(numbers)


@app.task(name="fail")
def fail(text="no"):
    raise ValueError(text)


@app.task(name="fail_late", acks_late=True)
def fail_late(text="no"):
    raise ValueError(text)


@app.task(name="fail_rejecting", acks_late=True, acks_on_failure_or_timeout=False)
def fail_rejecting():
    record("ran", number="fail_rejecting")
    raise ValueError("rejected")


@app.task(name="fail_with_two_arguments")
def fail_with_two_arguments():
    raise TwoArguments(7, "seven")


@app.task(name="fail_in_a_chain")
def fail_in_a_chain():
    try:
        {}["key"]
    except KeyError as error:
        raise RuntimeError("because") from error


@app.task(name="expected", throws=(Expected,))
def expected():
    raise Expected("as announced")


@app.task(name="retry_twice", bind=True, max_retries=5)
def retry_twice(self, delay=0.1):
    record("try", retries=self.request.retries, id=self.request.id)
    if self.request.retries < 2:
        raise self.retry(countdown=delay, exc=ConnectionError("busy"))
    return self.request.retries


@app.task(name="retry_in_vain", bind=True, max_retries=1)
def retry_in_vain(self):
    raise self.retry(countdown=0.1, exc=ConnectionError("always busy"))


@app.task(name="retry_without_cause", bind=True, max_retries=1)
def retry_without_cause(self):
    raise self.retry(countdown=0.1)


@app.task(
    name="autoretry",
    bind=True,
    autoretry_for=(ConnectionError,),
    retry_backoff=0.05,
    max_retries=3,
    retry_jitter=False,
)
def autoretry(self):
    if self.request.retries < 1:
        raise ConnectionError("once more")
    return self.request.retries


@app.task(name="ignore", bind=True)
def ignore(self):
    self.update_state(state="SEEN", meta={"by": "ignore"})
    raise Ignore("not worth a result")


@app.task(name="reject", acks_late=True)
def reject():
    raise Reject("not for me", requeue=False)


@app.task(name="reject_early")
def reject_early():
    raise Reject("too late to refuse", requeue=False)


@app.task(name="requeue_once", bind=True, acks_late=True)
def requeue_once(self):
    record("ran", number="requeue_once", redelivered=bool(self.request.delivery_info.get("redelivered")))
    if not self.request.delivery_info.get("redelivered"):
        raise Reject("again, please", requeue=True)
    return "second time"


@app.task(name="progress", bind=True)
def progress(self):
    self.update_state(state="PROGRESS", meta={"done": 1})
    seen = self.AsyncResult(self.request.id)
    return [seen.state, seen.info]


@app.task(name="replaced", bind=True)
def replaced(self, x):
    raise self.replace(add.s(x, x))


@app.task(name="parent_of", bind=True)
def parent_of(self):
    child = add.delay(1, 1)
    return child.id


@app.task(name="silent", ignore_result=True)
def silent():
    record("ran", number="silent")
    return "never stored"


@app.task(name="unencodable")
def unencodable():
    return object


@app.task(name="wrong_arguments")
def wrong_arguments(one):
    return one


@app.task(name="sleep")
def sleep(seconds, number=None):
    record("started", number=number)
    time.sleep(seconds)
    record("ran", number=number)
    return number


@app.task(name="sleep_late", acks_late=True)
def sleep_late(seconds, number=None):
    record("started", number=number)
    time.sleep(seconds)
    record("ran", number=number)
    return number


@app.task(name="sleep_rejecting", acks_late=True, reject_on_worker_lost=True)
def sleep_rejecting(seconds, number=None):
    record("started", number=number)
    time.sleep(seconds)
    record("ran", number=number)
    return number


@app.task(name="catch_soft_limit", soft_time_limit=1)
def catch_soft_limit():
    try:
        time.sleep(30)
    except SoftTimeLimitExceeded:
        return "stopped in time"


@app.task(name="soft_limited", soft_time_limit=1)
def soft_limited():
    time.sleep(30)


@app.task(name="hard_limited", time_limit=1)
def hard_limited():
    time.sleep(30)


@app.task(name="hard_limited_late", time_limit=1, acks_late=True)
def hard_limited_late():
    time.sleep(30)


@app.task(name="hard_limited_requeued", bind=True, time_limit=1, acks_late=True, acks_on_failure_or_timeout=False)
def hard_limited_requeued(self):
    record("ran", number="hard_limited_requeued")
    if not self.request.delivery_info.get("redelivered"):
        time.sleep(30)
    return "second time"


@app.task(name="kill_self")
def kill_self():
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="kill_self_late", acks_late=True)
def kill_self_late():
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="kill_self_once", bind=True, acks_late=True, reject_on_worker_lost=True)
def kill_self_once(self):
    record("ran", number="kill_self_once")
    if not self.request.delivery_info.get("redelivered"):
        os.kill(os.getpid(), signal.SIGKILL)
    return "second time"


@app.task(name="exit_process")
def exit_process():
    sys.exit(3)


@app.task(name="grow")
def grow(mebibytes):
    """Leaves the process larger than it was."""
    app.kept = bytearray(os.urandom(1024)) * (1024 * mebibytes)
    return os.getpid()


@app.task(name="whoami")
def whoami():
    import multiprocessing

    import billiard

    process = billiard.current_process()
    return {
        "pid": os.getpid(),
        "name": process.name,
        "index": process.index,
        "daemon": process.daemon,
        "same": multiprocessing.current_process() is process,
    }


@app.task(name="request_attributes", bind=True)
def request_attributes(self, *args, **kwargs):
    return {key: repr(value) for key, value in vars(self.request).items() if not key.startswith("_")}


@app.task(name="speak")
def speak():
    from celery.utils.log import get_task_logger

    print("printed")
    get_task_logger("zoo.speaker").warning("logged")
    return None


@app.task(name="errback")
def errback(request, error, traceback):
    record("errback", task=request.id, error=repr(error))


@app.task(name="old_errback")
def old_errback(task_id):
    record("old_errback", task=task_id)


# ---- classes of tasks


class Hooked(Task):
    """Leaves a line at each of its hooks."""

    abstract = True

    def __init__(self):
        self.runs = 0

    def before_start(self, task_id, args, kwargs):
        record("before_start", id=task_id, args=list(args), kwargs=kwargs)

    def on_success(self, retval, task_id, args, kwargs):
        stored = self.AsyncResult(task_id).state
        record("on_success", id=task_id, retval=retval, args=list(args), kwargs=kwargs, stored=stored)

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        stored = self.AsyncResult(task_id).state
        record(
            "on_failure",
            id=task_id,
            exc=repr(exc),
            einfo=type(einfo).__name__,
            args=list(args),
            stored=stored,
        )

    def on_retry(self, exc, task_id, args, kwargs, einfo):
        record("on_retry", id=task_id, exc=repr(exc), einfo=type(einfo).__name__)

    def after_return(self, status, retval, task_id, args, kwargs, einfo):
        record("after_return", id=task_id, status=status, retval=repr(retval), einfo=type(einfo).__name__)


class Counting(Hooked):
    def __call__(self, *args, **kwargs):
        self.runs += 1
        record("call", id=self.request.id, runs=self.runs)
        return super().__call__(*args, **kwargs)


@app.task(name="hooked.succeed", base=Hooked, bind=True)
def hooked_succeed(self, x, y=2):
    record("body", id=self.request.id, bound=type(self).__mro__[1].__name__)
    return x * y


@app.task(name="hooked.fail", base=Hooked)
def hooked_fail(x):
    raise ValueError(x)


@app.task(name="hooked.retry", base=Hooked, bind=True, max_retries=1)
def hooked_retry(self):
    if not self.request.retries:
        raise self.retry(countdown=0.1, exc=ConnectionError("busy"))
    return "done"


@app.task(name="hooked.counting", base=Counting)
def hooked_counting():
    return "counted"


class ByClass(Counting):
    name = "hooked.by_class"

    def run(self, x):
        return [x, self.runs]


app.register_task(ByClass())


class RefusesToStart(Hooked):
    def before_start(self, task_id, args, kwargs):
        raise RuntimeError("not today")


@app.task(name="hooked.refuses", base=RefusesToStart)
def hooked_refuses():
    return "never"


class BadHook(Hooked):
    def on_success(self, retval, task_id, args, kwargs):
        raise RuntimeError("a hook that breaks")


@app.task(name="hooked.bad_hook", base=BadHook)
def hooked_bad_hook():
    return "still a success"
