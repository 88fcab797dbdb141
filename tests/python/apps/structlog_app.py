"""django-structlog with its boot step; what it logs goes to the journal."""

import django
import structlog
from base import make_app, record
from django.conf import settings
from watched import add_tasks

settings.configure(
    SECRET_KEY="of no use",
    INSTALLED_APPS=["django_structlog"],
    DJANGO_STRUCTLOG_CELERY_ENABLED=True,
)
django.setup()


def to_journal(logger, method, event):
    event.pop("task_id", None)
    event.pop("child_task_id", None)
    record("structlog", level=method, **{f"log_{name}": value for name, value in event.items()})
    raise structlog.DropEvent


structlog.configure(processors=[structlog.contextvars.merge_contextvars, to_journal])

from django_structlog.celery.steps import DjangoStructLogInitStep  # noqa: E402

app = make_app("structlog_app")
app.steps["worker"].add(DjangoStructLogInitStep)
add_tasks(app)


@app.task(name="sleep")
def sleep(seconds):
    import time

    time.sleep(seconds)
