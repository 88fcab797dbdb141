"""The second door: `celery worker` itself, for every unit file and chart that already says so.

The `celery` command imports each entry point of the group `celery.commands` before it runs anything, this
module among them. With ``CELERIAC=1`` in the environment it makes `Celery.Worker` ours and adds our options to
Celery's `worker` command; without it nothing is changed.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import click
from celery import Celery
from kombu.utils.objects import cached_property

from celeriac import _core, green

SWITCH = "CELERIAC"


def is_on() -> bool:
    """Whether the environment asks for celeriac."""
    return os.environ.get(SWITCH, "").strip().lower() in {"1", "true", "yes", "on"}


def install(worker: str = "celeriac.worker:Worker") -> None:
    """Makes `app.Worker` ours for every app of this process that does not define its own."""

    def worker_class(app: Celery) -> Any:
        """The worker of celeriac."""
        return app.subclass_with_self(worker, name="Worker")

    door = cached_property(worker_class)
    door.__set_name__(Celery, "Worker")
    Celery.Worker = door
    _add_options()


def _add_options() -> None:
    """Gives Celery's `worker` command the options that it does not have (`src/cli/flags.rs`); the worker checks
    their values."""
    from celery.bin.base import CeleryOption
    from celery.bin.worker import worker

    known = {param.name for param in worker.params}
    worker.params += [
        CeleryOption(
            [*option["spellings"], option["name"]],
            envvar=option["env"],
            help=option["help"],
            help_group=option["heading"],
        )
        for option in json.loads(_core.own_options())
        if option["name"] not in known
    ]


if is_on():
    if green.is_celery() and "worker" in sys.argv and "multi" not in sys.argv and green.named(sys.argv):
        # Celery's command has patched this process. `python -m celeriac` reads the same words.
        green.start_again()
    install()


@click.command()
def celeriac() -> None:
    """Say whether `celery worker` starts celeriac."""
    from celeriac import __version__

    state = "starts celeriac" if is_on() else f"starts Celery's own worker ({SWITCH}=1 changes that)"
    click.echo(f"celeriac {__version__} is installed; `celery worker` {state}.")
