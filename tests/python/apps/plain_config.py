"""All defaults."""

from celery import Celery

app = Celery("plain_config")


@app.task
def add(x, y):
    return x + y
