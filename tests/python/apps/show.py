"""An app whose worker says what it was told, and stops before it starts."""

import json
import os

from celery import Celery, signals

app = Celery("show", broker="memory://", backend="cache+memory://")
app.conf.broker_connection_retry_on_startup = True

ATTRIBUTES = [
    *("hostname", "loglevel", "logfile", "pidfile", "concurrency", "prefetch_multiplier", "optimization"),
    *("time_limit", "soft_time_limit", "max_tasks_per_child", "max_memory_per_child", "purge", "no_color"),
    *("quiet", "task_events"),
]


@app.task
def add(x, y):
    return x + y


@signals.celeryd_after_setup.connect
def show(sender, instance, conf, **_):
    seen = {name: getattr(instance, name) for name in ATTRIBUTES}
    seen["class"] = f"{type(instance).__mro__[1].__module__}.{type(instance).__mro__[1].__name__}"
    seen["pool"] = instance.pool_cls.__module__
    seen["queues"] = sorted(instance.app.amqp.queues.consume_from)
    seen["include"] = instance.include
    seen["disable_prefetch"] = conf.get("worker_disable_prefetch")
    seen["acks_late"] = conf.task_acks_late
    seen["broker"] = conf.broker_url
    seen["backend"] = conf.result_backend
    seen["options"] = {name: repr(value) for name, value in instance.options.items()}
    seen["cwd"] = os.getcwd()
    seen["uid"] = os.getuid()
    print("SHOWN " + json.dumps(seen), flush=True)
    raise SystemExit(0)
