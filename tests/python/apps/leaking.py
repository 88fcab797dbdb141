"""Tasks that keep memory."""

import os
import time
from pathlib import Path

from base import make_app, record

app = make_app("leaking")

KEPT = []


def keep(size):
    # Written to, or the kernel would not give it.
    KEPT.append(bytearray(b"x" * size))


@app.task(name="leak", bind=True)
def leak(self, size):
    keep(size)
    record("leaked", id=self.request.id)
    return os.getpid()


@app.task(name="tick")
def tick(number):
    record("ticked", number=number)
    return number


@app.task(name="swell", bind=True)
def swell(self, size, until):
    """Keeps memory and goes on until a file is there."""
    keep(size)
    record("swollen", id=self.request.id)
    while not Path(until).exists():
        time.sleep(0.01)
    return os.getpid()
