"""An app with boot steps of several kinds, which say what they see."""

import os
import signal
import threading
import time

from celeriac import zygote
from celery import Celery, bootsteps, signals
from celery.utils.timer2 import Timer
from celery.worker.components import Pool

app = Celery("steps", broker="memory://", backend="cache+memory://")


def say(*words):
    os.write(1, (" ".join(["STEP", *map(str, words)]) + "\n").encode())


fork = zygote.start


def start(plan):
    say("fork with", threading.active_count(), "thread")
    return fork(plan)


zygote.start = start


class Liveness(bootsteps.StartStopStep):
    """As it is pasted everywhere."""

    requires = ("celery.worker.components:Timer",)

    def __init__(self, worker, **options):
        super().__init__(worker, **options)
        self.beats = 0

    def create(self, worker):
        worker.timer.call_repeatedly(0.05, self.beat, (worker,), priority=10)

    def beat(self, worker):
        self.beats += 1
        if self.beats == 2:
            say("alive", worker.hostname.split("@")[0])

    def start(self, worker):
        say("start Liveness")
        if os.environ.get("STOP_EARLY"):
            os.kill(os.getpid(), signal.SIGTERM)

    def stop(self, worker):
        say("stop Liveness")


class AfterPool(bootsteps.StartStopStep):
    requires = (Pool,)

    def start(self, worker):
        say("start AfterPool", worker.pool.num_processes, sorted(worker.pool.info)[0])


class OfConsumer(bootsteps.StartStopStep):
    requires = ("celery.worker.consumer:Connection",)

    def start(self, consumer):
        say("start OfConsumer", consumer.app.main, type(consumer.connection).__name__, consumer.hub)

    def stop(self, consumer):
        say("stop OfConsumer")


class OwnTimer(Timer):
    def start(self, *args, **kwargs):
        say("own timer starts")
        super().start(*args, **kwargs)


if os.environ.get("OWN_TIMER"):
    app.conf.worker_timer = "steps:OwnTimer"


class Watchdog(bootsteps.Step):
    """Ends its worker from the thread of the timer."""

    requires = ("celery.worker.components:Timer",)

    def include_if(self, worker):
        return bool(os.environ.get("STOP_FROM_TIMER"))

    def create(self, worker):
        worker.timer.call_after(0.2, self.end, (worker,))
        worker.timer.call_at(time.time() + 3600, self.end, (worker,))

    def end(self, worker):
        if not worker.consumer.connection:
            worker.timer.call_after(0.2, self.end, (worker,))
        else:
            worker.stop(exitcode=4)


app.steps["worker"].add(Watchdog)
app.steps["worker"].add(Liveness)
app.steps["worker"].add(AfterPool)
app.steps["consumer"].add(OfConsumer)


@signals.worker_init.connect
def init(sender, **_):
    say("worker_init")


@signals.celeryd_after_setup.connect
def after_setup(instance, **_):
    instance.app.amqp.queues.select_add("added")
    say("celeryd_after_setup")


@signals.worker_ready.connect
def ready(sender, **_):
    say("worker_ready", sender.hostname, sender.pool.num_processes, type(sender.controller).__name__)


@signals.worker_shutting_down.connect
def shutting_down(sig, how, exitcode, **_):
    say("worker_shutting_down", sig, how, exitcode)


@signals.worker_shutdown.connect
def shutdown(sender, **_):
    say("worker_shutdown")
