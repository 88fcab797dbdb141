"""Tasks whose function is a coroutine function, which Celery lacks: which they are, and what lets a tracer run them.

They run on event loops in children of their own (`celeriac.loop`). Celery's tracer is not one of coroutines, and
integrations replace it; so it runs as it is, each call in a greenlet, and where it calls the task's function the
greenlet lets the loop go on until the coroutine has ended.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from celery.backends.base import Backend

if TYPE_CHECKING:
    from celery.app.task import Task

    from celeriac.worker import Worker

#: How many run at a time on one loop; the option of the command line comes first.
SWITCH = "CELERIAC_ASYNC_CONCURRENCY"
#: A process may usually have 1,024 files open: so many tasks may hold four each.
DEFAULT = 250
#: Beyond this the loop itself is the bound; the number of a slot has to fit, too.
MOST = 10_000

#: Marks what the bridge has put in place of a function.
BRIDGED = "_celeriac_bridged"


def is_async(task: Task) -> bool:
    """Whether a task runs on an event loop."""
    return any(inspect.iscoroutinefunction(one) for one in (type(task).__call__, *_layers(_run(task))))


def tasks(app: Any) -> list[Task]:
    """The tasks of an app that do, by name."""
    return [task for _, task in sorted(app.tasks.items()) if is_async(task)]


def concurrency(worker: Worker) -> int:
    """How many tasks run at a time on one loop. Raises ValueError in words for the user."""
    given: str | int | None = worker.async_concurrency
    name = "--async-concurrency"
    if given is None:
        name, given = SWITCH, os.environ.get(SWITCH) or DEFAULT
    try:
        number = int(given)
    except ValueError:
        number = 0
    if not 1 <= number <= MOST:
        raise ValueError(f"{name} is {given}: it is a number from 1 to {MOST}.")
    return number


def refused(worker: Worker) -> Iterator[str]:
    """Why the app's coroutine tasks cannot be run, each with what to do."""
    from celeriac import ladder

    found = tasks(worker.app)
    if not found:
        return
    first = f"task {found[0].name} is `async def`"
    kind = ladder.pool_kind(worker.pool_cls)
    if kind != "prefork":
        yield f"{first}, which runs on an event loop beside the pool prefork only, not with {kind}: use `-P prefork`."
    if importlib.util.find_spec("greenlet") is None:
        yield f"{first}, which needs the package greenlet: `pip install 'celeriac[async]'`."
    if os.environ.get("USE_FAST_LOCALS"):
        yield f"{first}, and USE_FAST_LOCALS gives Celery a stack of running tasks that knows threads only: unset it."
    try:
        concurrency(worker)
    except ValueError as error:
        yield str(error)
    for task in found:
        match ladder.hosting(task):
            case "strategy":
                yield f"task {task.name} is `async def` and sets Strategy, which cannot be had together: remove one."
            case "request":
                yield f"task {task.name} is `async def` and sets Request, which cannot be had together: remove one."


def event_loop() -> str:
    """The package whose event loop is used."""
    return "asyncio" if importlib.util.find_spec("uvloop") is None else "uvloop"


# --- the bridge from a tracer to a coroutine ---


def _run(task: Any) -> Any:
    # With `autoretry_for` the function proper lies beneath.
    return getattr(task, "_orig_run", None) or task.run


def _layers(function: Any) -> Iterator[Any]:
    """A function and those that it is wrapped around, outermost first."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def install(app: Any) -> None:
    """Puts the bridge into every coroutine task of an app, once."""
    found = tasks(app)
    for task in found:
        _bridge(task)
    if found and not hasattr(Backend._call_task_errbacks, BRIDGED):
        Backend._call_task_errbacks = _awaiting(Backend._call_task_errbacks)


def _bridge(task: Any) -> None:
    """As deep as can be: what is wrapped around the coroutine function (pydantic's validation, an integration's span)
    then encloses the whole run, as it does where the function is none of coroutines."""
    cls = type(task)
    if inspect.iscoroutinefunction(cls.__call__):
        cls.__call__ = _bridged(cls.__call__)
        return
    name = "_orig_run" if getattr(task, "_orig_run", None) else "run"
    function = getattr(task, name)
    if any(hasattr(layer, BRIDGED) for layer in _layers(function)):
        return
    put: Callable[[Any], None] = functools.partial(setattr, task, name)
    for layer in _layers(function):
        function = layer
        inner = getattr(layer, "__wrapped__", None)
        cell = None if inspect.iscoroutinefunction(layer) else _cell(layer, inner)
        if cell is None:
            break
        put = functools.partial(setattr, cell, "cell_contents")
    put(_bridged(function))


def _cell(function: Any, inner: Any) -> Any:
    """Where a function keeps the one that it is wrapped around."""
    for cell in getattr(function, "__closure__", None) or ():
        try:
            if inner is not None and cell.cell_contents == inner:
                return cell
        except ValueError:
            # Empty.
            continue
    return None


def _bridged(function: Any) -> Any:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        made = function(*args, **kwargs)
        wait = waiter() if inspect.iscoroutine(made) else None
        return made if wait is None else wait(made)

    setattr(run, BRIDGED, True)
    return run


def _outside_of_loops() -> Callable[[Any], Any] | None:
    """Celery calls an errback of three arguments where the failure is stored, and nobody awaits it there."""
    return asyncio.run if _calling.get() else None


#: How the outcome of a coroutine is waited for by whoever has just made it; None where it can await. Another in a child
#: with an event loop.
waiter: Callable[[], Callable[[Any], Any] | None] = _outside_of_loops

_calling = contextvars.ContextVar("celeriac_calling_errbacks", default=False)


def _awaiting(call_errbacks: Any) -> Any:
    @functools.wraps(call_errbacks)
    def call(*args: Any, **kwargs: Any) -> Any:
        token = _calling.set(True)
        try:
            return call_errbacks(*args, **kwargs)
        finally:
            _calling.reset(token)

    setattr(call, BRIDGED, True)
    return call
