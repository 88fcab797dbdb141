"""An app with one of everything that keeps it off a native rung."""

import click
from celery import Celery, Task, bootsteps, signals

app = Celery("ladder_zoo", broker="sqla+sqlite:///broker.db", backend="db+sqlite:///results.db")
app.conf.task_send_sent_event = True
app.conf.broker_write_url = "memory://other"
app.user_options["worker"].add(click.Option(("--colour",)))


def route(name, args, kwargs, options, task=None, **_):
    return None


app.conf.task_routes = (route,)


class Hooked(Task):
    def on_failure(self, *args):
        pass


@app.task
def plain():
    pass


@app.task(base=Hooked)
def hooked():
    pass


@app.task(autoretry_for=(OSError,))
def retrying():
    pass


@app.task
def traced():
    pass


traced.__trace__ = route


@signals.before_task_publish.connect
def stamp(**_):
    pass


@signals.setup_logging.connect
def logging_of_ours(**_):
    pass


class Probe(bootsteps.StartStopStep):
    requires = ("celery.worker.components:Timer",)


app.steps["worker"].add(Probe)
