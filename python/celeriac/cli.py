"""The first door: the `celeriac` command.

Rust reads the command line (`src/cli`): help, complaints and refusals are ours. What it passes goes through
Celery's own `worker` command, of whatever version is installed, so that defaults, settings, privileges and
the app's own options follow its rules. Every other command line is Celery's, unchanged.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import celery
import click
from celery.exceptions import ImproperlyConfigured
from click.core import augment_usage_errors

from celeriac import _core, green, seam
from celeriac.green import DETACHED

PROGRAM = "celeriac"


def main() -> NoReturn:
    """The console script."""
    line = _read(_core.parse_globals(sys.argv, _environment(), version()))
    if not line["ours"]:
        _run_celery(line["command"])
    sys.exit(_in_click(lambda: _run(line)))


def as_child() -> int:
    """The child of a pool of greenlets goes through the supervisor's command line; gives its exit status."""
    line = _read(_core.parse_globals(sys.argv, _environment(), version()))
    return _in_click(lambda: _run_as_child(line))


def _run_as_child(line: dict[str, Any]) -> int:
    context = _load_app(line["options"], line["command"])
    context.command.parse_args(context, line["arguments"])
    # What a worker is only once, the supervisor is.
    context.params.update(detach=False, uid=None, gid=None, pidfile=None, statedb=None, beat=False)
    with context:
        context.invoke(_callback(context), **context.params)
    return 0


def version() -> str:
    """What ``--version`` prints: Celery's own text first, for scripts that read it."""
    return f"{celery.VERSION_BANNER}, celeriac {_core.__version__}"


def _environment() -> dict[str, str]:
    """The environment, without variables that are no Unicode: no option is read from those."""

    def is_text(text: str) -> bool:
        return not any("\ud800" <= letter <= "\udfff" for letter in text)

    return {name: value for name, value in os.environ.items() if is_text(name) and is_text(value)}


def _read(answer: str) -> dict[str, Any]:
    """What the parser found; prints and exits where it says so."""
    parsed: dict[str, Any] = json.loads(answer)
    if parsed["kind"] == "exit":
        stream = sys.stderr if parsed["code"] else sys.stdout
        stream.write(parsed["text"])
        stream.flush()
        sys.exit(parsed["code"])
    return parsed


def _run_celery(command: str) -> NoReturn:
    """Celery's own command line, for all that is not ours."""
    if command == "multi":
        # It starts `python -m celery worker`; the seam makes that ours.
        os.environ[seam.SWITCH] = "1"
    from celery.__main__ import main as celery_main

    celery_main()
    sys.exit(0)


def _in_click(run: Callable[[], int]) -> int:
    """Runs with click's exceptions answered as its own commands answer them."""
    try:
        return run()
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        click.echo("Aborted!", file=sys.stderr)
        return 1
    except ImproperlyConfigured as error:
        click.echo(f"Error: {error}", err=True)
        return 1


def _run(line: dict[str, Any]) -> int:
    """`celeriac worker` and `celeriac doctor`."""
    green.note()
    for kind in (green.named(line["arguments"]), *green.have_patched()):
        if kind:
            green.stay_unpatched(kind)
    seam.install()
    context = _load_app(line["options"], line["command"])
    app = context.obj.app
    parsed = _read(
        _core.parse_command(line["command"], line["arguments"], _environment(), json.dumps(_options_of(app)))
    )
    _refuse_missing_pool(app, line["arguments"])
    # Read again by the options of Celery's command: they know the defaults, the settings and the app's own.
    words = [word for word in line["arguments"] if word != "--json"]
    context.command.parse_args(context, words)
    if line["command"] == "doctor":
        from celeriac import doctor

        return doctor.main(app, context, as_json=bool(parsed["options"]["json"]))
    _refuse_other_worker(app)
    from celeriac import ladder

    if ladder.pool_kind(context.params["pool"]) in green.KINDS and green.patching():
        _unpatch()
    _detach_once(context)
    with context:
        context.invoke(_callback(context), **context.params)
    return 0


def _converted(value: Any, param: click.Parameter, context: click.Context) -> Any:
    """A value as the option makes it: in 5.4 the app is found here."""
    if getattr(param, "is_flag", False):
        return bool(value)
    with augment_usage_errors(context, param):
        return None if value is None else param.type(value, param, context)


def _callback(context: click.Context) -> Callable[..., Any]:
    callback = context.command.callback
    assert callback is not None, "Celery's commands have one"
    return callback


def _load_app(options: dict[str, Any], command: str) -> click.Context:
    """Lets Celery's global callback export the options, find the app and add the app's own options."""
    from celery.bin.celery import celery as group
    from celery.bin.worker import worker

    if options["workdir"]:
        os.chdir(options["workdir"])
    parent = click.Context(group, info_name=PROGRAM, auto_envvar_prefix="CELERY")
    parent.invoked_subcommand = command
    with parent:
        values = {param.name: _converted(options[param.name], param, parent) for param in group.params if param.name}
        parent.invoke(_callback(parent), **values)
    # Named for Celery's `worker`: the names of environment variables and settings are made from it.
    return click.Context(worker, info_name="worker", parent=parent, **worker.context_settings)


def _options_of(app: celery.Celery) -> list[dict[str, Any]]:
    """The options that the app added to the worker, for the parser."""
    added = [*app.user_options.get("preload", ()), *app.user_options.get("worker", ())]
    return [
        {
            "name": option.name,
            "spellings": [*option.opts, *option.secondary_opts],
            "values": 0 if option.is_flag or option.count else option.nargs,
            "help": option.help or "",
        }
        for option in added
        if isinstance(option, click.Option)
    ]


def _refuse_missing_pool(app: celery.Celery, words: list[str]) -> None:
    """A pool whose library is not installed, asked before Celery imports it. Exit status 1, as Celery's traceback."""
    kind = green.named(words) or app.conf.worker_pool
    why = green.missing(kind) if kind in green.KINDS else None
    if why:
        raise click.ClickException(why)


def _unpatch() -> None:
    if green.have_patched():
        raise click.ClickException(
            "the app patches this process with gevent or eventlet in a way that celeriac cannot prevent: let the "
            "option -P do it, or call patch_all() and monkey_patch() as attributes of their modules."
        )
    green.start_again()


def _refuse_other_worker(app: celery.Celery) -> None:
    from celeriac.worker import Worker

    if not (isinstance(app.Worker, type) and issubclass(app.Worker, Worker)):
        raise click.UsageError(
            f"{type(app).__qualname__} defines a worker of its own ({app.Worker!r}), which celeriac would "
            "not run: remove it, or run `celery worker`."
        )


def _detach_once(context: click.Context) -> None:
    """``--detach``: runs this same command line again in the background, and goes on there."""
    params = context.params
    if os.environ.get(DETACHED) == str(os.getpid()):
        # Privileges were dropped on the way here, and cannot be dropped twice.
        params.update(detach=False, uid=None, gid=None)
    if not params["detach"]:
        return
    from celery.platforms import detached
    from celery.utils.nodenames import node_format

    hostname = params["hostname"]
    with detached(
        # Touched there, so that messages are not lost with the terminal.
        node_format(params["logfile"], hostname),
        node_format(params["pidfile"], hostname),
        params["uid"],
        params["gid"],
        params["umask"],
        fake=bool(os.environ.get("C_FAKEFORK")),
        after_forkers=False,
    ):
        os.environ[DETACHED] = str(os.getpid())
        python = params["executable"] or sys.executable
        os.execv(python, [python, "-m", "celeriac", *sys.argv[1:]])
