"""An app with options of its own."""

import click
from celery import Celery, bootsteps, signals
from celery.bin.base import CeleryOption

app = Celery("optional", broker="memory://", backend="cache+memory://")
app.user_options["worker"].add(CeleryOption(("--team",), help="Whose tasks", help_group="App"))
app.user_options["worker"].add(CeleryOption(("--dry/--wet",), is_flag=True, default=False))
app.user_options["preload"].add(click.Option(("-Z", "--zone")))


class Step(bootsteps.Step):
    def __init__(self, worker, team=None, dry=None, **options):
        super().__init__(worker, **options)
        print("STEP", team, dry, flush=True)


app.steps["worker"].add(Step)


@signals.user_preload_options.connect
def preload(options, **_):
    print("PRELOAD", options["zone"], flush=True)


@signals.celeryd_after_setup.connect
def stop(**_):
    raise SystemExit(0)
