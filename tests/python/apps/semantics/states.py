"""Tasks by what they store: states, results of every sort, exceptions of every sort."""

import datetime
import decimal
import os
import time
import uuid
from collections import namedtuple

from base import record
from celery import states
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

from .celery import app, note

Pair = namedtuple("Pair", "left right")


class Custom(Exception):
    """Takes what it does not give to `Exception`."""

    def __init__(self, code, *, text="none"):
        super().__init__(f"{code}: {text}")
        self.code = code


class KeywordsOnly(Exception):
    def __init__(self, *, reason):
        self.reason = reason
        super().__init__()


class Unspeakable(Exception):
    def __repr__(self):
        raise RuntimeError("no repr")

    __str__ = __repr__


class Base(BaseException):
    pass


class Unpicklable(Exception):
    def __init__(self, text):
        super().__init__(text)
        self.hook = lambda: None


EXCEPTIONS = {
    "custom": lambda: Custom(7, text="seven"),
    "keywords": lambda: KeywordsOnly(reason="only"),
    "unspeakable": lambda: Unspeakable("x"),
    "unpicklable": lambda: Unpicklable("hooked"),
    "unencodable": lambda: ValueError(object, {1, 2}),
    "non_ascii": lambda: ValueError("schön war's: ☃"),
    "surrogate": lambda: ValueError("\ud800"),
    "no_arguments": lambda: ValueError(),
    "key": lambda: KeyError("missing"),
    "os": lambda: FileNotFoundError(2, "No such file", "/nowhere"),
    "unicode": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    "many": lambda: ValueError(*range(30)),
    "long": lambda: ValueError("x" * 5000),
    "base": lambda: Base("not an Exception"),
    "generator_exit": lambda: GeneratorExit("left"),
    "stop": lambda: StopIteration("stopped"),
    "group": lambda: app.groups("both", [ValueError(1), KeyError("k")]),
    "local": lambda: type("Local", (ValueError,), {})("made on the spot"),
    "nested": lambda: Outer.Inner("inside"),
}

app.groups = getattr(__import__("builtins"), "ExceptionGroup", lambda text, errors: ValueError(text, errors))


class Outer:
    class Inner(Exception):
        pass


VALUES = {
    "none": lambda: None,
    "text": lambda: "schön ☃ \x00 \u2028",
    "surrogate": lambda: "\ud800",
    "number": lambda: 2**70,
    "float": lambda: [1.5, float("inf"), 1e300],
    "nan": lambda: float("nan"),
    "datetime": lambda: datetime.datetime(2026, 11, 22, 9, 30, 1, 5, tzinfo=datetime.timezone.utc),
    "date": lambda: [datetime.date(2026, 1, 2), datetime.time(3, 4)],
    "decimal": lambda: decimal.Decimal("1.10"),
    "uuid": lambda: uuid.UUID(int=5),
    "bytes": lambda: b"\x00\xff",
    "set": lambda: {1},
    "tuple": lambda: (1, (2, 3)),
    "pair": lambda: Pair(1, [2]),
    "keys": lambda: {1: "one", None: "none", False: "no"},
    "bad_keys": lambda: {(1, 2): 3},
    "object": lambda: object,
    "function": lambda: note,
    "lock": lambda: __import__("threading").Lock(),
    "generator": lambda: (n for n in range(3)),
    "exception": lambda: ValueError("returned"),
    "recursive": lambda: recursive(),
    "signature": lambda: value.si("none"),
    "huge": lambda: "x" * (1 << 20),
}


def recursive():
    endless = []
    endless.append(endless)
    return endless


@app.task(name="states.value")
def value(which):
    return VALUES[which]()


@app.task(name="states.error")
def error(which):
    raise EXCEPTIONS[which]()


@app.task(name="states.length")
def length(text, **more):
    return [len(text), sorted(more)]


@app.task(name="states.chained_error")
def chained_error():
    try:
        {}["key"]
    except KeyError as first:
        raise Custom(1) from first


@app.task(name="states.started", track_started=True, bind=True)
def started(self):
    note(self, stored=self.AsyncResult(self.request.id).state)
    return "ran"


@app.task(name="states.progress", bind=True)
def progress(self, other=None):
    self.update_state(state="PROGRESS", meta={"done": 1, "of": [2]})
    self.update_state(state="PROGRESS")
    self.update_state(meta={"only": "meta"})
    if other:
        self.update_state(task_id=other, state="ELSEWHERE", meta="by another")
    self.backend.store_result(self.request.id, {"x": 1}, "CUSTOM", request=self.request)
    return "done"


@app.task(name="states.success_first", bind=True)
def success_first(self):
    self.update_state(state=states.SUCCESS, meta="by hand")
    raise ValueError("too late")


FAILED = {"exc_type": "ValueError", "exc_message": ["x"], "exc_module": "builtins"}


@app.task(name="states.failure_by_hand", bind=True)
def failure_by_hand(self):
    self.update_state(state=states.FAILURE, meta=FAILED)
    raise Ignore()


@app.task(name="states.bad_state", bind=True)
def bad_state(self):
    self.update_state(state="PROGRESS", meta=object())


@app.task(name="states.ignoring", ignore_result=True, bind=True)
def ignoring(self):
    note(self)
    return "silent"


@app.task(name="states.ignoring_error", ignore_result=True, bind=True)
def ignoring_error(self):
    note(self)
    raise ValueError("silent")


@app.task(name="states.storing_errors", ignore_result=True, store_errors_even_if_ignored=True, bind=True)
def storing_errors(self):
    note(self)
    raise ValueError("stored")


@app.task(name="states.reject", bind=True)
def reject(self, requeue=False):
    note(self)
    if requeue and self.request.delivery_info.get("redelivered"):
        return "second"
    raise Reject(404, requeue=requeue)


@app.task(name="states.reject_late", bind=True, acks_late=True)
def reject_late(self, requeue=False):
    note(self)
    if requeue and self.request.delivery_info.get("redelivered"):
        return "second"
    raise Reject("reason", requeue=requeue)


@app.task(name="states.forget", bind=True)
def forget(self):
    self.update_state(state="SEEN")
    self.backend.forget(self.request.id)
    return "after"


@app.task(name="states.soft_caught", soft_time_limit=0.5, bind=True)
def soft_caught(self):
    note(self)
    try:
        time.sleep(30)
    except SoftTimeLimitExceeded as limit:
        return repr(limit)


@app.task(name="states.soft", soft_time_limit=0.5)
def soft():
    time.sleep(30)


@app.task(name="states.soft_then_hard", soft_time_limit=0.5, time_limit=1)
def soft_then_hard():
    while True:
        try:
            time.sleep(30)
        except SoftTimeLimitExceeded:
            record("soft")


@app.task(name="states.hard", time_limit=0.5)
def hard():
    time.sleep(30)


@app.task(name="states.exit")
def leave(code=None):
    raise SystemExit(code)


@app.task(name="states.dedupe", bind=True, acks_late=True)
def dedupe(self):
    note(self)
    return "once"


@app.task(name="states.everything", bind=True)
def everything(self, *args, **kwargs):
    """All that user code can read of its request."""
    request = self.request
    names = sorted({*vars(request), *(name for name in dir(request) if not name.startswith("_"))})
    seen = {name: repr(getattr(request, name)) for name in names if not callable(getattr(request, name))}
    return {
        "seen": seen,
        "delivery_info": sorted(request.delivery_info),
        "options": sorted(request.as_execution_options()),
        "task": [self.name, self.app.current_task.name, self.app.current_worker_task.name],
        "called_directly": request.called_directly,
        "pid": os.getpid() > 1,
        "missing": getattr(request, "no_such_field", "absent"),
        "got": request.get("no_such_field", "default"),
    }
