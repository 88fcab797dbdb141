"""Which rung of the ladder each concern of an app is on, and what cannot be hosted at all.

Decided once, at start, from the app; the worker acts on it and `celeriac doctor` shows it. Each decision is
made here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import click
from celery import signals
from celery.exceptions import ImproperlyConfigured

from celeriac import _core, aio, backends, tracer
from celeriac import continuations as going_on
from celeriac.delayed import refusal

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Task

    from celeriac.worker import Worker

Rung = Literal["native", "python"]

RUN_CELERY = "run `celery worker` without CELERIAC for this app"

#: Celery's pools that celeriac has an equal of.
POOLS = {
    "celery.concurrency.prefork:TaskPool": "prefork",
    "celery.concurrency.thread:TaskPool": "threads",
    "celery.concurrency.solo:TaskPool": "solo",
    "celery.concurrency.gevent:TaskPool": "gevent",
    "celery.concurrency.eventlet:TaskPool": "eventlet",
}

#: What an app with a pool of its own may use instead.
OTHER_POOLS = "use prefork, threads, solo, gevent or eventlet"

DEFAULT_CONSUMER = "celery.worker.consumer:Consumer"
DEFAULT_AUTOSCALER = "celery.worker.autoscale:Autoscaler"
DEFAULT_STRATEGY = "celery.worker.strategy:default"
DEFAULT_REQUEST = "celery.worker.request:Request"

#: Whether messages of a task go through objects of the app's own in the parent process (`celeriac.hosting`).
Hosting = Literal["native", "request", "strategy"]


class Refused(ImproperlyConfigured, click.ClickException):  # type: ignore[misc]
    """The app or the command line asks for what celeriac cannot do. Exit status 2, like other usage
    errors."""

    exit_code = 2

    def __init__(self, reasons: Iterable[str]) -> None:
        self.reasons = list(reasons)
        click.ClickException.__init__(self, "\n       ".join(self.reasons))


@dataclass(frozen=True)
class Decision:
    """One concern, or one task, and where it runs."""

    name: str
    rung: Rung
    reasons: list[str] = field(default_factory=list)


# --- the rungs ---


def concerns(worker: Worker) -> list[Decision]:
    """Every concern of the app, in the order in which a task meets them."""
    app = worker.app
    return [
        broker(app),
        _content(app),
        execution(app),
        backend(app),
        continuations(app),
        *_loops(worker),
        Decision("schedule", "python", ["beat is Celery's, beside the worker (`celeriac beat`) or with it (`-B`)"]),
        _logging(),
    ]


def broker(app: Celery) -> Decision:
    """Native where Rust speaks to every address and all options can be told to it."""
    from celeriac import config

    conf = app.conf
    reasons = []
    transport = conf.broker_transport
    if transport is not None and (not isinstance(transport, str) or "." in transport or ":" in transport):
        reasons.append(f"broker_transport is {name_of(transport)}")
    if callable(conf.broker_password):
        reasons.append("broker_password is a function")
    strategy = conf.broker_failover_strategy
    if strategy is not None and not isinstance(strategy, str):
        reasons.append(f"broker_failover_strategy is {name_of(strategy)}")
    reasons += [
        f"broker_transport_options[{name!r}] is {value}"
        for name, value in config.foreign_options(conf.broker_transport_options)
    ]
    if not reasons:
        scheme = _core.foreign_broker(json.dumps(config.broker(app)))
        if scheme is not None:
            reasons.append(f"{scheme} is spoken by kombu only")
    return Decision("broker", "python" if reasons else "native", reasons)


def backend(app: Celery) -> Decision:
    """Native where the supervisor may write results itself, and Rust speaks to the address."""
    from celeriac import config

    native, reason = backends.decide(app, broker_native=broker(app).rung == "native")
    if native and not _core.knows_backend(json.dumps(config.backend(app, native=True)), json.dumps(config.broker(app))):
        native, reason = False, "its address is none that Rust speaks to"
    return Decision("result backend", "native" if native else "python", [reason])


def _content(app: Celery) -> Decision:
    return Decision(
        "content",
        "python",
        ["kombu decodes in the child: " + ", ".join(sorted(app.conf.accept_content or ["any"]))],
    )


def execution(app: Celery) -> Decision:
    """Native where plain tasks can do without Celery's tracer."""
    native, reasons = tracer.decide(app, results_native=backend(app).rung == "native")
    return Decision("execution", "native" if native else "python", reasons)


def _loops(worker: Worker) -> Iterator[Decision]:
    found = aio.tasks(worker.app)
    if found:
        try:
            each = aio.concurrency(worker)
        except ValueError:
            return
        count = f"{len(found)} tasks are" if len(found) > 1 else "one task is"
        yield Decision(
            "event loops",
            "python",
            [f"{count} `async def`: {worker.concurrency} loops of {aio.event_loop()}, {each} tasks at a time on each"],
        )


def continuations(app: Celery) -> Decision:
    """Native where the supervisor can publish what follows a task exactly as Celery would."""
    native, reasons = going_on.decide(
        app, broker_native=broker(app).rung == "native", results_native=backend(app).rung == "native"
    )
    return Decision("continuations", "native" if native else "python", reasons)


def _logging() -> Decision:
    reasons = [
        "records go through Python's logging, but for the line of a received task where no handler of the app sees it"
    ]
    for name in ("setup_logging", "after_setup_logger", "after_setup_task_logger"):
        reasons += [f"{name} has a receiver: {receiver}" for receiver in receivers(getattr(signals, name))]
    return Decision("logging", "python", reasons)


def tasks(worker: Worker) -> list[Decision]:
    """Every task of the app but Celery's own, with what it has of its own."""
    native = execution(worker.app).rung == "native"
    found = []
    for name, task in sorted(worker.app.tasks.items()):
        if name.startswith("celery."):
            continue
        obstacles = list(tracer.of_task(task)) if native else []
        rung: Rung = "native" if native and not obstacles and hosting(task) == "native" else "python"
        reasons = [*_peculiarities(task), *_sent_by_celery(task)]
        if obstacles:
            reasons.append(f"Celery's tracer runs it: {', '.join(obstacles)}")
        found.append(Decision(name, rung, reasons))
    return found


#: What a task class may override and the tracer then calls.
HOOKS = (
    "__call__",
    "before_start",
    "on_success",
    "on_failure",
    "on_retry",
    "after_return",
    "apply_async",
    "retry",
    "replace",
)


def _peculiarities(task: Task) -> list[str]:
    from celery.app.task import Task as Plain

    reasons = []
    overridden = [hook for hook in HOOKS if getattr(type(task), hook, None) is not getattr(Plain, hook, None)]
    # Celery itself wraps `__call__` of the plain class while a worker runs.
    if overridden:
        reasons.append(f"{name_of(type(task).__mro__[1])} overrides {', '.join(overridden)}")
    if aio.is_async(task):
        reasons.append("async def: it runs on an event loop")
    match hosting(task):
        case "strategy":
            reasons.append(f"Strategy is {name_of(task.Strategy)}: the parent process hands it each message")
        case "request":
            reasons.append(f"Request is {name_of(task.Request)}: the parent process makes one for each message")
    if task.__trace__ is not None:
        reasons.append(f"__trace__ is {name_of(task.__trace__)}")
    if getattr(task, "autoretry_for", None):
        reasons.append("autoretry_for")
    if name_of(type(task.backend)) != name_of(type(task.app.backend)):
        reasons.append(f"backend is {name_of(type(task.backend))}")
    return reasons


def hosting(task: Task) -> Hosting:
    """Whose objects the task's messages go through; a strategy makes its requests itself."""
    if name_of(task.Strategy) != DEFAULT_STRATEGY:
        return "strategy"
    return "native" if name_of(task.Request) == DEFAULT_REQUEST else "request"


def _sent_by_celery(task: Task) -> list[str]:
    return [f"Celery sends it where it follows a task: {reason}" for reason in going_on.of_task(task)]


def receivers(signal: Any) -> list[str]:
    """Names of the live receivers of a signal."""
    return [name_of(receiver) for receiver in signal._live_receivers(None)] if signal.receivers else []


# --- what cannot be hosted ---


def refused_options(options: Mapping[str, Any]) -> list[str]:
    """Keyword arguments of the worker that cannot be served; both doors come through here."""
    plain = {name: value for name, value in options.items() if isinstance(value, (str, int, float, list, tuple, bool))}
    reason = _core.refuse_options(json.dumps(plain))
    return [reason] if reason else []


def refused_app(worker: Worker) -> list[str]:
    """What the app has that celeriac cannot host, each with what to do."""
    return [
        *_refused_settings(worker),
        *_refused_autoscale(worker),
        *_refused_tasks(worker),
        *aio.refused(worker),
        *_refused_continuations(worker),
    ]


def pool_kind(pool_class: Any) -> str | None:
    """The name of a pool that we have an equal of; none for others."""
    if isinstance(pool_class, str):
        return POOLS.get(pool_class)
    return POOLS.get(f"{pool_class.__module__}:{pool_class.__qualname__}")


def _refused_settings(worker: Worker) -> Iterator[str]:
    conf = worker.app.conf
    if pool_kind(worker.pool_cls) is None:
        yield f"the pool {name_of(worker.pool_cls)} is not one of celeriac's: {OTHER_POOLS}, or {RUN_CELERY}."
    if name_of(worker.consumer_cls) != DEFAULT_CONSUMER:
        yield f"worker_consumer is {name_of(worker.consumer_cls)}, which celeriac does not run: {RUN_CELERY}."
    if worker.timer_cls and not _has_thread(worker.timer_cls):
        yield (
            f"worker_timer is {name_of(worker.timer_cls)}, which is no subclass of celery.utils.timer2:Timer: boot "
            f"steps have no event loop here but a timer with a thread. Remove the setting, or {RUN_CELERY}."
        )
    if conf.get("worker_agent"):
        yield f"worker_agent is {name_of(conf.worker_agent)}, which celeriac does not run: {RUN_CELERY}."
    if getattr(worker, "pool_start_method", None) == "spawn":
        yield (
            "worker_pool_start_method is 'spawn', which is not supported by celeriac yet: remove it, or "
            + RUN_CELERY
            + "."
        )


def _refused_autoscale(worker: Worker) -> Iterator[str]:
    from celery.worker import autoscale

    bounds = worker.options.get("autoscale")
    if not bounds:
        return
    kind = pool_kind(worker.pool_cls)
    if kind in ("threads", "solo"):
        yield f"--autoscale needs processes, and the pool is {kind}: leave it out, or use -P prefork."
    if name_of(worker.autoscaler_cls) != DEFAULT_AUTOSCALER:
        yield (
            f"worker_autoscaler is {name_of(worker.autoscaler_cls)}, which celeriac does not run: leave the setting "
            f"out, or {RUN_CELERY}."
        )
    if autoscale.AUTOSCALE_KEEPALIVE <= 0:
        yield f"AUTOSCALE_KEEPALIVE is {autoscale.AUTOSCALE_KEEPALIVE:g}: it must be more than 0 seconds."


def _has_thread(timer_class: Any) -> bool:
    from celery.utils.timer2 import Timer
    from kombu.utils.imports import symbol_by_name

    found = symbol_by_name(timer_class)
    return isinstance(found, type) and issubclass(found, Timer)


def _refused_continuations(worker: Worker) -> Iterator[str]:
    wanted = going_on.forced()
    if wanted not in (None, "native", "python"):
        yield f"{going_on.SWITCH}={wanted}: it is `native` or `python`."
    if wanted == "native":
        decision = continuations(worker.app)
        if decision.rung != "native":
            reasons = ", ".join(decision.reasons)
            yield f"{going_on.SWITCH}=native, and this app needs Celery's own code ({reasons}): unset it."


def _refused_tasks(worker: Worker) -> Iterator[str]:
    from celery.worker.request import Request
    from kombu.utils.imports import symbol_by_name

    for name, task in sorted(worker.app.tasks.items()):
        if hosting(task) == "native":
            continue
        for attribute in ("Strategy", "Request"):
            own = getattr(task, attribute)
            try:
                found = symbol_by_name(own)
            except Exception as error:
                yield f"task {name} sets {attribute} to {own!r}, which cannot be imported ({error}): correct the name."
                continue
            if not callable(found):
                yield f"task {name} sets {attribute} to {own!r}, which cannot be called: correct it."
            elif attribute == "Request" and not (isinstance(found, type) and issubclass(found, Request)):
                yield (
                    f"task {name} sets Request to {name_of(found)}, which is no subclass of {DEFAULT_REQUEST}: "
                    f"make it one, or {RUN_CELERY}."
                )


def refused_queues(worker: Worker) -> list[str]:
    """Queues that cannot be consumed. Asked last: `celeryd_after_setup` may still change them."""
    delayed = refusal(worker.app)
    return ([delayed] if delayed else []) + [
        f"queue {queue.name} has on_declared, which celeriac does not call: remove it, or {RUN_CELERY}."
        for queue in worker.app.amqp.queues.consume_from.values()
        if queue.on_declared is not None
    ]


def settings_without_effect(worker: Worker) -> list[str]:
    """Settings whose effect does not exist yet and whose loss breaks no task, in words for one warning at start."""
    conf = worker.app.conf
    if conf.broker_write_url == conf.broker_read_url:
        return []
    return ["broker_write_url for events (they go to broker_read_url, which the supervisor is connected to)"]


def name_of(thing: Any) -> str:
    """`module:Name` of a class or function; a text is a name already."""
    if isinstance(thing, str):
        module, _, name = thing.rpartition(":" if ":" in thing else ".")
    else:
        module, name = getattr(thing, "__module__", "?"), getattr(thing, "__qualname__", repr(thing))
        # The qualified name of a boot step begins with its module.
        name = name.removeprefix(f"{module}.")
    return f"{module}:{name}"
