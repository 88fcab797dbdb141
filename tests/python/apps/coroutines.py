"""Tasks that are coroutine functions, beside ordinary ones.

With TWIN in the environment the same tasks are ordinary functions: what the original worker is asked.
"""

import asyncio
import contextvars
import functools
import os
import sys
import time

from base import make_app, record
from celery import Task, current_task, signals
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

if os.environ.get("NO_UVLOOP"):
    sys.modules["uvloop"] = None
app = make_app("coroutines")
TWIN = bool(os.environ.get("TWIN"))


def twin(function):
    """The ordinary function that does what a coroutine function does."""
    if not TWIN:
        return function

    @functools.wraps(function)
    def run(*args, **kwargs):
        return asyncio.run(function(*args, **kwargs))

    del run.__wrapped__
    return run


for name in ("prerun", "postrun", "success", "failure", "retry"):

    def receive(sender, _name=name, **fields):
        state = fields.get("state")
        task_id = fields.get("task_id") or sender.request.id
        record("signal", name=_name, task=sender.name, id=task_id, state=state)

    getattr(signals, f"task_{name}").connect(receive, weak=False)


class Hooked(Task):
    def before_start(self, task_id, args, kwargs):
        record("hook", name="before_start", id=self.request.id)

    def on_success(self, retval, task_id, args, kwargs):
        record("hook", name="on_success", id=self.request.id, retval=retval)

    def on_failure(self, exc, task_id, args, kwargs, einfo):
        record("hook", name="on_failure", id=self.request.id, exc=repr(exc), frames=einfo.traceback.count("File "))

    def after_return(self, status, retval, task_id, args, kwargs, einfo):
        record("hook", name="after_return", id=self.request.id, status=status)


@app.task(name="add", base=Hooked)
@twin
async def add(x, y):
    await asyncio.sleep(0)
    return x + y


@app.task(name="fail", base=Hooked)
@twin
async def fail(text):
    await asyncio.sleep(0)
    raise ValueError(text)


@app.task(name="tsum")
@twin
async def tsum(numbers):
    await asyncio.sleep(0)
    return sum(numbers)


@app.task(name="note")
@twin
async def note(*args):
    record("note", args=args)


@app.task(name="again", bind=True, max_retries=2)
@twin
async def again(self, until):
    await asyncio.sleep(0)
    if self.request.retries < until:
        raise self.retry(exc=KeyError("not yet"), countdown=0)
    return self.request.retries


@app.task(name="auto", autoretry_for=(KeyError,), retry_backoff=False, default_retry_delay=0, max_retries=2)
@twin
async def auto(until):
    await asyncio.sleep(0)
    if current_task.request.retries < until:
        raise KeyError("not yet")
    return current_task.request.retries


@app.task(name="ignore", bind=True)
@twin
async def ignore(self):
    self.update_state(state="ODD", meta={"stays": True})
    await asyncio.sleep(0)
    raise Ignore()


@app.task(name="reject", acks_late=True)
@twin
async def reject():
    await asyncio.sleep(0)
    raise Reject("not wanted", requeue=False)


@app.task(name="replaced", bind=True)
@twin
async def replaced(self):
    await asyncio.sleep(0)
    raise self.replace(add.s(20, 22))


class Counting(Task):
    """A class based task whose `__call__` goes around the whole run."""

    name = "counting"

    def __call__(self, *args, **kwargs):
        started = time.monotonic()
        result = super().__call__(*args, **kwargs)
        record("around", took=time.monotonic() - started, result=repr(result))
        return result

    if TWIN:

        def run(self, seconds):
            time.sleep(seconds)
            return "slept"
    else:

        async def run(self, seconds):
            await asyncio.sleep(seconds)
            return "slept"


app.register_task(Counting())


class Outer(Task):
    """One whose `__call__` is a coroutine function too."""

    name = "outer"

    async def __call__(self, *args, **kwargs):
        await asyncio.sleep(0)
        return ["around", await super().__call__(*args, **kwargs)]

    async def run(self, x):
        await asyncio.sleep(0)
        return [x, self.request.id == current_task.request.id]


app.register_task(Outer())

if os.environ.get("PYDANTIC"):
    from pydantic import BaseModel

    class Point(BaseModel):
        x: int

    @app.task(name="moved", pydantic=True)
    async def moved(point: Point) -> Point:
        await asyncio.sleep(0)
        return Point(x=point.x + 1)

# ---- what only a loop can do


@app.task(name="nap")
async def nap(seconds):
    await asyncio.sleep(seconds)
    return seconds


@app.task(name="nap_late", acks_late=True)
async def nap_late(seconds):
    record("began", id=current_task.request.id)
    await asyncio.sleep(seconds)
    return seconds


@app.task(name="nap_early", bind=True)
async def nap_early(self, seconds):
    record("began", id=self.request.id)
    try:
        await asyncio.sleep(seconds)
    finally:
        record("left", id=self.request.id, error=repr(sys.exc_info()[1]))
    return seconds


@app.task(name="own_child", bind=True)
def own_child(self):
    return os.getpid()


@app.task(name="own_failure")
def own_failure(text):
    raise ValueError(text)


@app.task(name="spin")
def spin(seconds):
    """Burns processor time."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass
    record("spun")


variable = contextvars.ContextVar("variable", default=None)


@app.task(name="who", bind=True)
async def who(self, number, rounds):
    """Whether a task is itself at every await, in tasks of its own and in threads."""
    seen = set()

    def look():
        seen.add((current_task.name, current_task.request.id, self.request.id, self.request.args[0], variable.get()))

    variable.set(number)
    for _ in range(rounds):
        look()
        await asyncio.sleep(0)
    await asyncio.gather(*(asyncio.create_task(inner(look)) for _ in range(3)))
    await asyncio.to_thread(look)
    assert seen == {("who", self.request.id, self.request.id, number, number)}, seen
    # Called directly it is what it is without a worker.
    assert await called(5) == 10
    assert current_task.request.id == self.request.id
    return asyncio.get_running_loop().__class__.__module__.split(".")[0]


async def inner(look):
    await asyncio.sleep(0)
    look()


@app.task(name="called")
async def called(x):
    assert current_task.name == "who"
    return x * 2


@app.task(name="soft", bind=True, soft_time_limit=0.3)
async def soft(self, how):
    try:
        match how:
            case "sleep":
                await asyncio.sleep(60)
            case "gather":
                await asyncio.gather(asyncio.sleep(60), asyncio.sleep(60))
            case "timeout":
                await asyncio.wait_for(asyncio.sleep(60), 50)
            case "group":
                async with asyncio.TaskGroup() as group:
                    group.create_task(asyncio.sleep(60))
    except SoftTimeLimitExceeded as exc:
        await asyncio.sleep(0.01)
        left = len(asyncio.all_tasks())
        record("soft", id=self.request.id, how=how, error=repr(exc), left=left)
        return "tidied"


@app.task(name="soft_through", soft_time_limit=0.3)
async def soft_through():
    await asyncio.sleep(60)


@app.task(name="hard", bind=True, time_limit=0.5, base=Hooked)
async def hard(self):
    try:
        await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.01)
        record("left", id=self.request.id)


@app.task(name="stubborn", bind=True)
async def stubborn(self):
    record("began", id=self.request.id)
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            record("refused", id=self.request.id)


@app.task(name="dies")
async def dies():
    await asyncio.sleep(0.2)
    os._exit(7)


@app.task(name="exits")
async def exits():
    await asyncio.sleep(0)
    raise SystemExit(3)


@app.task(name="cancels_itself")
async def cancels_itself():
    asyncio.current_task().cancel()
    await asyncio.sleep(1)


@app.task(name="pid")
async def pid():
    return os.getpid()


@signals.worker_process_shutdown.connect
def closes(**_):
    loop = asyncio.get_event_loop_policy().get_event_loop() if not TWIN else None
    if loop is not None and not loop.is_closed():
        loop.run_until_complete(asyncio.sleep(0))
        record("closed")


@signals.worker_process_init.connect
def opens(**_):
    record("opened")
