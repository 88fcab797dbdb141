"""The recipe that people paste for liveness and readiness probes: a boot step with a timer, and two files."""

import os
from pathlib import Path

from base import make_app, record
from celery import bootsteps
from celery.signals import worker_ready, worker_shutdown

app = make_app("probe_app")
FOLDER = Path(os.environ["PROBE_FOLDER"])
HEARTBEAT, READY = FOLDER / "heartbeat", FOLDER / "ready"


class LivenessProbe(bootsteps.StartStopStep):
    requires = {"celery.worker.components:Timer"}

    def __init__(self, parent, **kwargs):
        super().__init__(parent, **kwargs)
        self.requests = []
        self.timer = None

    def start(self, parent):
        record("step.start", hostname=parent.hostname, app=parent.app.main)
        self.timer = parent.timer.call_repeatedly(0.2, self.update, (parent,), priority=10)

    def stop(self, parent):
        self.timer.cancel()
        record("step.stop")
        HEARTBEAT.unlink(missing_ok=True)

    def update(self, parent):
        HEARTBEAT.touch()
        record("step.beat", hostname=parent.hostname)


app.steps["worker"].add(LivenessProbe)


@worker_ready.connect(weak=False)
def ready(**_):
    READY.touch()


@worker_shutdown.connect(weak=False)
def down(**_):
    READY.unlink(missing_ok=True)


@app.task(name="sleep")
def sleep(seconds):
    import time

    time.sleep(seconds)
