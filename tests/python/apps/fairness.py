"""Short tasks, and one that is not."""

import time
from pathlib import Path

from base import make_app, record

app = make_app("fairness")


@app.task(name="work")
def work(number, until=None):
    record("works", number=number)
    while until and not Path(until).exists():
        time.sleep(0.01)
    record("worked", number=number)
    return number
