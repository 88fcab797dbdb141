"""Runs command lines of either worker and reads what they print."""

import json
import os
import subprocess
import sys

from support.worker import APPS, BIN


def environment(**more):
    """The environment of this process without what would reach the workers under test."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CELERY", "CELERIAC", "DJANGO")) and name not in {"APP", "BROKER_URL", "NO_COLOR"}
    }
    return kept | {"PYTHONPATH": str(APPS), "PYTHONDONTWRITEBYTECODE": "1", "C_FORCE_ROOT": "1"} | more


def run(program, *words, **options):
    """Runs `celery` or `celeriac` to its end."""
    return finish([str(BIN / program), *words], **options)


def python(source, *words, **options):
    """Runs a Python program to its end and returns what it prints."""
    done = finish([sys.executable, "-c", source, *words], **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def finish(command, cwd=None, timeout=60, **env):
    """Runs a command with these additions to the environment."""
    return subprocess.run(command, env=environment(**env), cwd=cwd, timeout=timeout, capture_output=True, text=True)


def shown(done):
    """What `apps/show.py` said of its worker."""
    for line in done.stdout.splitlines():
        if line.startswith("SHOWN "):
            return json.loads(line.removeprefix("SHOWN "))
    raise AssertionError(f"{done.args}: {done.stdout}\n{done.stderr}")


def complaint(done):
    """The `Error: …` line and all that follows it."""
    return done.stderr[done.stderr.index("Error: ") :].strip()
