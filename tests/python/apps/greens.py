"""An app for pools of greenlets: what its tasks see of each other, and of the process that they run in."""

import os
import sys
import threading
import time

from base import make_app, record
from celery import current_task, signals

if os.environ.get("PATCHES"):
    # As many apps for these pools do, whatever the command line says.
    __import__(os.environ["PATCHES"])
    if os.environ["PATCHES"] == "gevent":
        from gevent import monkey

        monkey.patch_all()
    else:
        import eventlet

        eventlet.monkey_patch()


def patched():
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    return bool((gevent and gevent.is_module_patched("socket")) or (eventlet and eventlet.is_monkey_patched("socket")))


# What the app was imported into.
PATCHED = patched()

app = make_app("greens")
if os.environ.get("POOL"):
    app.conf.worker_pool = os.environ["POOL"]
local = threading.local()
arrived = []
initialized = []


@app.task(name="meet")
def meet(count):
    """Ends when so many of it run at a time; gives how many did."""
    arrived.append(1)
    until = time.monotonic() + 60
    while len(arrived) < count and time.monotonic() < until:
        time.sleep(0.05)
    return len(arrived)


@app.task(name="where")
def where():
    return {"pid": os.getpid(), "import": PATCHED, "now": patched(), "initialized": len(initialized)}


@app.task(name="own", bind=True)
def own(self, seconds=0.2):
    """What is to belong to this task alone, while others run."""
    fresh = not hasattr(local, "id")
    local.id = self.request.id
    before = current_task.request.id
    time.sleep(seconds)
    return [fresh, local.id, before, current_task.request.id, self.request.id]


@app.task(name="add")
def add(x, y):
    return x + y


@app.task(name="total")
def total(numbers):
    return sum(numbers)


@app.task(name="fail")
def fail(text="no"):
    raise ValueError(text)


# Not at once: a task that comes again may end before the first try has stored that it is to come again.
@app.task(name="retry_once", bind=True, max_retries=2)
def retry_once(self):
    if self.request.retries < 1:
        raise self.retry(countdown=2, exc=ConnectionError("busy"))
    return self.request.retries


@app.task(name="retry_in_vain", bind=True, max_retries=1)
def retry_in_vain(self):
    raise self.retry(countdown=2, exc=ConnectionError("always busy"))


@app.task(name="progress", bind=True)
def progress(self, steps):
    for step in range(steps):
        self.update_state(state="PROGRESS", meta={"step": step})
    return steps


@app.task(name="sends")
def sends(number):
    """Sends another and waits for it, which pools of greenlets allow."""
    return add.delay(number, 1).get(timeout=60)


@app.task(name="threaded", bind=True)
def threaded(self):
    """Stores a state from a real thread, as code does that leaves blocking calls to one."""
    if "gevent" in sys.modules:
        import gevent

        run = gevent.get_hub().threadpool.apply
    else:
        from eventlet import tpool

        run = tpool.execute
    # Which is local to the greenlet.
    task_id = self.request.id
    run(lambda: app.backend.store_result(task_id, {"by": "thread"}, "PROGRESS"))
    return app.backend.get_task_meta(task_id, cache=False)["result"]


@app.task(name="lasts", bind=True)
def lasts(self, seconds, number=0):
    record("begins", id=self.request.id, number=number)
    try:
        time.sleep(seconds)
        record("ends", id=self.request.id, number=number)
        return number
    except BaseException as exc:
        record("raised", id=self.request.id, type=type(exc).__name__)
        raise
    finally:
        record("finally", id=self.request.id)


@app.task(name="lasts_late", acks_late=True, bind=True)
def lasts_late(self, seconds, number=0):
    record("begins", id=self.request.id, number=number)
    time.sleep(seconds)
    record("ends", id=self.request.id, number=number)
    return number


@app.task(name="exits")
def exits():
    raise SystemExit(3)


@app.task(name="large")
def large(size):
    return "x" * size


@signals.worker_init.connect
def on_init(**_):
    initialized.append(os.getpid())


@signals.worker_process_init.connect
def on_process(**_):
    record("worker_process_init")


@signals.worker_shutdown.connect
def on_shutdown(**_):
    record("worker_shutdown", patched=patched())


for name in ("started", "preshutdown", "postshutdown"):
    getattr(signals, f"eventlet_pool_{name}").connect(
        lambda sender, name=name, **_: record("pool", what=name, sender=type(sender).__module__), weak=False
    )


@signals.eventlet_pool_apply.connect
def on_apply(sender, target, args, kwargs, **_):
    record("apply", target=target.__name__, name=args[0], id=args[1], count=len(args), kwargs=kwargs)
