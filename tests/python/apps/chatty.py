"""Tasks that print and log, and a root logger with a handler of the app's own."""

import logging
import os
import sys

from base import make_app
from celery.utils.log import get_task_logger

app = make_app("chatty")

if os.environ.get("OWN_HANDLER"):
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(logging.Formatter("OWN %(levelname)s %(name)s %(message)s"))
    logging.getLogger().addHandler(handler)


@app.task(name="chat")
def chat():
    print("printed")
    print("complained", file=sys.stderr)
    logging.getLogger("mine").info("noted")
    logging.getLogger("mine").debug("whispered")
    get_task_logger("chatty").warning("warned")


@app.task(name="fail")
def fail():
    raise ValueError("no")
