"""Pools of greenlets, `-P gevent` and `-P eventlet`: what is settled before Celery and the app are imported.

Such a pool has one child with all of its tasks, in which the library has patched Python before anything else was
imported. It cannot be a fork: the supervisor has the app imported and is not patched, because it waits for no greenlet.
So the zygote's fork becomes a new interpreter that runs this module, patches as `celery worker` does, and then goes
through the same command line as the supervisor (`celeriac.greenlets`), which is how it finds the app just so.

The supervisor in turn undoes what others patched: it becomes `python -m celeriac` where `celery worker -P gevent` has
patched it already, and keeps apps from patching it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from celeriac.zygote import Plan

KINDS = ("gevent", "eventlet")

#: What a child is told, as JSON; it takes the variable away, so that no process of a task sees it.
SPEC = "CELERIAC_GREEN"

#: Set to its own pid and what had patched it, in a process that must not be patched again.
UNPATCHED = "CELERIAC_UNPATCHED"


class Line(NamedTuple):
    """A command line of ours, and where it was given."""

    argv: list[str]
    folder: str


#: That of this process; none where another program has made the worker.
line: Line | None = None

#: Set to its own pid in a process that has left its terminal and its privileges, which it cannot do again.
DETACHED = "CELERIAC_DETACHED"

#: Where this process began, if that is there: options may have led it elsewhere.
_began = os.path.realpath("/proc/self/cwd")


def named(words: list[str]) -> str | None:
    """The pool of greenlets that a command line names, if it does."""
    from celery import _find_option_with_arg

    try:
        pool = _find_option_with_arg(words, ["-P"], ["--pool"])
    except (KeyError, IndexError):
        return None
    return pool if pool in KINDS else None


def missing(kind: str) -> str | None:
    """Why the pool cannot run here, if it cannot."""
    try:
        with warnings.catch_warnings():
            # What eventlet says of itself the child says too.
            warnings.simplefilter("ignore")
            __import__(kind)
    except ImportError as error:
        return f"the pool {kind} cannot be used ({error}): pip install 'celery[{kind}]', or use -P threads."
    return None


# --- the supervisor ---


def note() -> None:
    """The command line of this process is ours: a child may go through it again."""
    global line
    line = Line(list(sys.argv), os.path.realpath("/proc/self/cwd"))


def patching() -> list[str]:
    """What has patched this process."""
    gevent: Any = sys.modules.get("gevent.monkey")
    eventlet: Any = sys.modules.get("eventlet.patcher")
    found = []
    if gevent and any(map(gevent.is_module_patched, ("socket", "threading"))):
        found.append("gevent")
    if eventlet and any(map(eventlet.is_monkey_patched, ("socket", "thread"))):
        found.append("eventlet")
    return found


def stay_unpatched(kind: str) -> None:
    """Whatever the app asks of gevent or eventlet from now on, nothing is patched."""
    if missing(kind):
        return
    if kind == "gevent":
        from gevent import events

        def refuse(event: object) -> None:
            if isinstance(event, events.GeventWillPatchAllEvent | events.GeventWillPatchModuleEvent):
                raise events.DoNotPatch

        events.subscribers.append(refuse)
    else:
        import eventlet

        eventlet.monkey_patch = eventlet.patcher.monkey_patch = lambda **_: None


def have_patched() -> list[str]:
    """What had patched this process, if that is why it was started again."""
    pid, _, kinds = os.environ.get(UNPATCHED, "").partition(" ")
    return kinds.split() if pid == str(os.getpid()) else []


def start_again() -> NoReturn:
    """Becomes `python -m celeriac` with the same words, unpatched."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.environ[UNPATCHED] = " ".join([str(os.getpid()), *patching()])
    folder = line.folder if line else _began
    if os.path.isdir(folder):
        os.chdir(folder)
    os.execv(sys.executable, [*_interpreter(), "celeriac", *sys.argv[1:]])


def is_celery() -> bool:
    """Whether this process is the `celery` command, whose words are ours too."""
    name = os.path.basename(sys.argv[0])
    folder = os.path.basename(os.path.dirname(sys.argv[0]))
    return name == "celery" or (name == "__main__.py" and folder == "celery")


def _interpreter() -> list[str]:
    return [sys.executable, *subprocess._args_from_interpreter_flags(), "-m"]  # type: ignore[attr-defined]


# --- the child ---


def become(plan: Plan, descriptor: int) -> NoReturn:
    """What the zygote's fork does: it becomes a new interpreter, with the socket to the supervisor."""
    assert line is not None, "refused before the zygote is forked"
    spec = {
        "kind": plan.kind,
        "descriptor": descriptor,
        "argv": line.argv,
        "folder": line.folder,
        "path": sys.path,
        "hostname": plan.hostname,
        "lanes": plan.lanes,
        "native_results": plan.native_results,
        "native_continuations": plan.native_continuations,
    }
    os.set_inheritable(descriptor, True)
    os.execve(sys.executable, [*_interpreter(), "celeriac.green"], {**os.environ, SPEC: json.dumps(spec)})


def main() -> NoReturn:
    """The child, from its first line on."""
    spec = json.loads(os.environ.pop(SPEC))
    os.set_inheritable(spec["descriptor"], False)
    if os.path.isdir(spec["folder"]):
        os.chdir(spec["folder"])
    sys.argv[:] = spec["argv"]
    sys.path[:] = spec["path"]
    import celery

    # As Celery's own command does first.
    celery.maybe_patch_concurrency(["celery", "-P", spec["kind"]])
    from celeriac import greenlets

    greenlets.main(spec)


if __name__ == "__main__":
    main()
