"""An app whose worker needs no server."""

from celery import Celery, signals

app = Celery("living", broker="memory://", backend="cache+memory://")


@app.task
def add(x, y):
    return x + y


@signals.worker_init.connect
def say_class(sender, **_):
    print("CLASS", type(sender).__mro__[1].__module__, flush=True)


@signals.celeryd_after_setup.connect
def say_class_in_log(sender, instance, **_):
    import logging

    logging.getLogger("celery.worker").warning("CLASS %s", type(instance).__mro__[1].__module__)
