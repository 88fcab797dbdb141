"""Tasks that may wait in the queue once only: celery-once and celery-singleton, both with their locks in Redis."""

from base import make_app
from celery_once import AlreadyQueued, QueueOnce
from celery_singleton import Singleton

app = make_app("locks_app")
app.conf.ONCE = {
    "backend": "celery_once.backends.Redis",
    "settings": {"url": app.conf.broker_url, "default_timeout": 600},
}


@app.task(name="once.one", base=QueueOnce)
def once_one(number):
    return number


@app.task(name="once.failing", base=QueueOnce)
def once_failing(number):
    raise ValueError(number)


@app.task(name="once.early", base=QueueOnce, once={"unlock_before_run": True})
def once_early(number):
    # Unlocked by now, or this is refused.
    return once_early.apply_async((number,), countdown=3600) is not None


@app.task(name="singleton.one", base=Singleton)
def singleton_one(number):
    return number


@app.task(name="singleton.failing", base=Singleton)
def singleton_failing(number):
    raise ValueError(number)


@app.task(name="twice")
def twice(name):
    """Sends a task twice while this one occupies the only child; says what the second time gave."""
    first = app.tasks[name].delay(7)
    try:
        second = app.tasks[name].delay(7)
    except AlreadyQueued as refused:
        return [first.id, type(refused).__name__]
    return [first.id, "same" if second.id == first.id else "another"]
