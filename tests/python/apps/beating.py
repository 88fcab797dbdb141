"""An app with a schedule, and schedulers of its own."""

import time

from base import make_app, record
from celery import signals
from celery.beat import PersistentScheduler

app = make_app("beating")
app.conf.beat_schedule = {"tick": {"task": "tick", "schedule": 0.3, "args": (1,)}}


@app.task(name="tick")
def tick(number):
    record("tick", number=number)


@app.task(name="sleep")
def sleep(seconds):
    record("started")
    time.sleep(seconds)
    record("ran")


class Stubborn(PersistentScheduler):
    """Says whose it is."""

    def setup_schedule(self):
        super().setup_schedule()
        record("scheduler", name=type(self).__name__, file=self.schedule_filename)


class Slow(PersistentScheduler):
    """Takes its time to save."""

    def close(self):
        record("saving")
        time.sleep(1)
        super().close()
        record("saved")


@signals.beat_init.connect
def init(sender, **_):
    record("beat_init", sender=type(sender).__name__)


@signals.beat_embedded_init.connect
def embedded(sender, **_):
    record("beat_embedded_init", sender=type(sender).__name__)
