"""Tasks that are measured."""

import asyncio
import time

from base import make_app

app = make_app("measured")


@app.task(name="nap")
async def nap():
    await asyncio.sleep(0.1)


@app.task(name="spin")
def spin(seconds):
    """CPU, of this thread."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


@app.task(name="burn")
def burn():
    while True:
        pass
