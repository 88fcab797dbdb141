"""An ordinary Celery app: nothing in it knows which worker runs it.

Broker and results are folders, so that no server is needed. DEMO_FOLDER says where.
"""

import os
from pathlib import Path

from celery import Celery

folder = Path(os.environ["DEMO_FOLDER"])
for name in ("queue", "control", "results"):
    (folder / name).mkdir(parents=True, exist_ok=True)

app = Celery("proj", broker="filesystem://", backend=f"file://{folder}/results")
app.conf.update(
    broker_transport_options={
        "data_folder_in": str(folder / "queue"),
        "data_folder_out": str(folder / "queue"),
        "control_folder": str(folder / "control"),
    },
    broker_connection_retry_on_startup=True,
    # The file backend counts a chord's parts with a polling task; one a second is slow for a demo.
    result_chord_retry_interval=0.2,
)


@app.task
def add(x, y):
    return x + y


@app.task
def divide(x, y):
    return x / y


@app.task(bind=True, max_retries=3)
def third_time_lucky(self):
    if self.request.retries < 2:
        raise self.retry(countdown=0.2, exc=ConnectionError("the other end is busy"))
    return f"answered at try {self.request.retries + 1}"


@app.task
def total(numbers):
    return sum(numbers)
