"""Tasks that log, for JSON lines."""

import logging
import os
import time
import warnings
from decimal import Decimal

from base import make_app
from celery.signals import after_setup_logger, setup_logging, task_received
from celery.utils.log import get_task_logger

app = make_app("traced")
task_logger = get_task_logger("traced.tasks")
plain = logging.getLogger("traced.plain")


@app.task(name="speak", bind=True)
def speak(self):
    task_logger.info("through the task logger: %s", "å\n")
    plain.warning("through any logger", extra={"order": 7, "price": Decimal("1.5"), "odd": {(1, 2): float("nan")}})
    print("printed")
    warnings.warn("warned", stacklevel=1)
    return {name: self.request.get(name) for name in ("traceparent", "tracestate")}


@app.task(name="fail")
def fail():
    raise LookupError("not\nthere")


@app.task(name="outer", bind=True)
def outer(self):
    plain.warning("outer")
    return speak.delay().id


@app.task(name="late", soft_time_limit=0.2)
def late():
    time.sleep(30)


@app.task(name="dies")
def dies():
    os.kill(os.getpid(), 9)


if os.environ.get("RECEIVER"):

    @task_received.connect(weak=False)
    def received(request=None, **_):
        plain.warning("a receiver")


if os.environ.get("OWN_LOGGING") == "all":

    @setup_logging.connect(weak=False)
    def own_logging(**_):
        logging.basicConfig(level="INFO", format="OWN %(message)s")


if os.environ.get("OWN_LOGGING") == "more":

    @after_setup_logger.connect(weak=False)
    def more_logging(logger=None, **_):
        handler = logging.FileHandler(os.environ["OWN_LOG"])
        handler.setFormatter(logging.Formatter("OWN %(message)s"))
        logger.addHandler(handler)
