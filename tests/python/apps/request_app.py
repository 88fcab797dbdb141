"""Tasks with a `Request` of their own that leaves a line for each of its hooks."""

import os
import signal
import time

import billiard
from base import make_app, record
from celery import Task, signals
from celery.exceptions import Ignore, Reject
from celery.worker.request import Request

app = make_app("request_app")


def told(value):
    """An exception or a result as it is equal from run to run."""
    exc = getattr(value, "exception", value)
    exc = getattr(exc, "exc", exc)
    return type(exc).__name__ if isinstance(exc, BaseException) else repr(value)


class Told(Request):
    def tell(self, hook, *about):
        record("hook", hook=hook, id=self.id, task=self.name, about=about, process=billiard.current_process().name)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tell("init", self.args, self.kwargs, self.hostname)

    def execute_using_pool(self, pool, **kwargs):
        self.tell("execute")
        return super().execute_using_pool(pool, **kwargs)

    def on_accepted(self, pid, time_accepted):
        self.tell("accepted", pid != os.getpid(), abs(time.monotonic() - time_accepted) < 5)
        super().on_accepted(pid, time_accepted)

    def on_success(self, failed__retval__runtime, **kwargs):
        failed, retval, runtime = failed__retval__runtime
        self.tell("success", failed, told(retval), runtime is None)
        return super().on_success(failed__retval__runtime, **kwargs)

    def on_failure(self, exc_info, send_failed_event=True, return_ok=False):
        self.tell("failure", told(exc_info), return_ok)
        return super().on_failure(exc_info, send_failed_event, return_ok)

    def on_timeout(self, soft, timeout):
        self.tell("timeout", soft, timeout)
        super().on_timeout(soft, timeout)

    def on_retry(self, exc_info):
        self.tell("retry", told(exc_info))
        super().on_retry(exc_info)

    def acknowledge(self):
        self.tell("acknowledge", self.acknowledged)
        super().acknowledge()

    def reject(self, requeue=False):
        self.tell("reject", requeue)
        super().reject(requeue)

    def terminate(self, pool, signal=None):
        self.tell("terminate", int(signal))
        super().terminate(pool, signal)


class Watched(Task):
    Request = Told


@signals.task_received.connect(weak=False)
def received(request, **_):
    record("hook", hook="task_received", id=request.id, task=request.name, about=[isinstance(request, Told)])


@signals.task_revoked.connect(weak=False)
def revoked(request, terminated, signum, expired, **_):
    record("hook", hook="task_revoked", id=request.id, task=request.task, about=[terminated, signum, expired])


@signals.task_failure.connect(weak=False)
def failed(sender, task_id, exception, **_):
    here = billiard.current_process().name == "MainProcess"
    record("hook", hook="task_failure", id=task_id, task=sender.name, about=[here, type(exception).__name__])


@app.task(name="add", base=Watched)
def add(x, y=0):
    return x + y


@app.task(name="late", base=Watched, acks_late=True)
def late(how):
    match how:
        case "fail":
            raise ValueError(how)
        case "ignore":
            raise Ignore
        case "reject":
            raise Reject("no", requeue=False)
        case "leave":
            raise SystemExit(3)
        case "big":
            raise Unpicklable(lambda: None)
    return how


class Unpicklable(Exception):
    pass


@app.task(name="retry", base=Watched, bind=True)
def retry(self):
    if not self.request.retries:
        raise self.retry(countdown=0.05)
    return "done"


@app.task(name="hard", base=Watched, time_limit=1)
def hard():
    time.sleep(60)


@app.task(name="soft", base=Watched, soft_time_limit=1)
def soft():
    time.sleep(60)


@app.task(name="killed", base=Watched)
def killed():
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(name="requeued", base=Watched, acks_late=True, reject_on_worker_lost=True)
def requeued():
    path = os.environ["JOURNAL"] + ".seen"
    # Once only.
    if not os.path.exists(path):
        open(path, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return "the second time"


@app.task(name="limited", base=Watched, rate_limit="20/s")
def limited(number):
    return number


@app.task(name="sleep", base=Watched, acks_late=True)
def sleep(seconds):
    record("begun")
    time.sleep(seconds)


@app.task(name="early_sleep", base=Watched)
def early_sleep(seconds):
    record("begun")
    time.sleep(seconds)


@app.task(name="plain")
def plain(x):
    return x
