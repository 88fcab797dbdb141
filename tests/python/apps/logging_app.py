"""An app that sets up logging itself: Celery's own set-up is to stay away."""

import json
import logging
import os

from base import make_app
from celery.signals import setup_logging

app = make_app("logging_app")


class AsJson(logging.Formatter):
    def format(self, record):
        data = getattr(record, "data", None)
        return json.dumps(
            {
                "logger": record.name,
                "level": record.levelname,
                "process": record.processName,
                "text": record.getMessage().splitlines()[0],
                "data": sorted(data) if isinstance(data, dict) else None,
            }
        )


@setup_logging.connect(weak=False)
def own_logging(**_):
    handler = logging.FileHandler(os.environ["OWN_LOG"])
    handler.setFormatter(AsJson())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


@app.task(name="add")
def add(x, y):
    logging.getLogger("mine").info("adding")
    return x + y


@app.task(name="fail")
def fail():
    raise ValueError("logged")
