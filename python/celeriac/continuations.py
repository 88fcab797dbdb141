"""The native rung of continuations: callbacks and chain steps are built in Rust and published by the supervisor.

Celery's tracer calls `apply_async` of what comes next. Before it runs, a lane puts a `Step` in the place of the
next step of the chain and of a lone callback: the same mapping, whose `apply_async` hands the message over where
that is the message that Celery would send, and is Celery's own where it might not be.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import celery
import kombu
from celery import signals
from celery.app import amqp, base, routes
from celery.app import task as app_task
from celery.canvas import Signature
from kombu import messaging, serialization
from kombu.exceptions import OperationalError
from kombu.utils import json as kombu_json
from kombu.utils.uuid import uuid

from celeriac import backends
from celeriac._core import Target

if TYPE_CHECKING:
    from celeriac._core import ChildPipe

#: ``python`` leaves all continuations to Celery; ``native`` refuses to start where the app forbids native ones.
SWITCH = "CELERIAC_CONTINUATIONS"

#: What may be said to `apply_async` of a native continuation, beside stamps. What Celery makes of anything else
#: (``eta``, ``expires``, ``serializer``, ``compression`` and so on) is left to Celery.
OPTIONS = frozenset(
    {
        "task_id",
        "reply_to",
        "root_id",
        "parent_id",
        "group_id",
        "group_index",
        "chord",
        "link",
        "link_error",
        "chain",
        "priority",
        "ignore_result",
        "time_limit",
        "soft_time_limit",
        "stamped_headers",
        "headers",
        "shadow",
        "replaced_task_nesting",
        "retries",
        "queue",
        "exchange",
        "routing_key",
    }
)
#: Those of them that say where the message goes.
ROUTING = ("queue", "exchange", "routing_key")
#: Routes are remembered for so many pairs of task and destination.
MOST_TARGETS = 10_000


# --- the decision ---


class Rung(NamedTuple):
    """Who publishes continuations, and why."""

    native: bool
    reasons: list[str]


def forced() -> str | None:
    """The rung that the environment asks for."""
    return os.environ.get(SWITCH) or None


def decide(app: Any, *, broker_native: bool, results_native: bool) -> Rung:
    """Whether the supervisor can publish this app's continuations exactly as Celery would."""
    if forced() == "python":
        return Rung(False, [f"{SWITCH}=python"])
    reasons = list(obstacles(app, broker_native=broker_native, results_native=results_native))
    if reasons:
        return Rung(False, reasons)
    return Rung(True, ["callbacks and chain steps of plain tasks are published by the supervisor"])


def obstacles(app: Any, *, broker_native: bool, results_native: bool) -> Iterator[str]:
    """What about the app asks for Celery's own code."""
    conf = app.conf
    if not broker_native:
        yield "the broker is not spoken natively"
    if conf.broker_write_url != conf.broker_read_url:
        yield "broker_write_url is another than broker_read_url, which the supervisor is connected to"
    if conf.task_always_eager:
        yield "task_always_eager"
    if conf.task_protocol != 2:
        yield f"task_protocol is {conf.task_protocol}"
    if conf.task_serializer != "json":
        yield f"task_serializer is {conf.task_serializer}"
    if conf.task_compression:
        yield f"task_compression is {conf.task_compression}"
    if conf.task_send_sent_event:
        yield "task_send_sent_event"
    if conf.get("worker_deduplicate_successful_tasks") and not results_native:
        yield "worker_deduplicate_successful_tasks needs continuations sent before results, which children write"
    yield from observers()
    for router in app.amqp.routes:
        if type(router) is not routes.MapRoute:
            yield f"task_routes has a function: {_name(router)}"
    yield from _replaced(app)


def observers() -> Iterator[str]:
    """Receivers of the signals around publishing."""
    for name in ("before_task_publish", "after_task_publish", "task_sent"):
        signal = getattr(signals, name)
        if signal.receivers:
            for receiver in signal._live_receivers(None):
                yield f"{name} has a receiver: {_name(receiver)}"


def watched() -> bool:
    """Whether such receivers came after the start: integrations connect theirs in the children."""
    return bool(
        signals.before_task_publish.receivers or signals.after_task_publish.receivers or signals.task_sent.receivers
    )


#: What Celery calls on the way to the broker; each must be as Celery and kombu have made it.
PATH: tuple[tuple[Any, str], ...] = (
    (Signature, "apply_async"),
    (Signature, "_merge"),
    (app_task.Task, "apply_async"),
    (app_task.Task, "_get_exec_options"),
    (app_task.Task, "add_trail"),
    (base.Celery, "send_task"),
    (amqp.AMQP, "as_task_v2"),
    (amqp.AMQP, "_create_task_sender"),
    (routes.Router, "route"),
    (messaging.Producer, "publish"),
    (messaging.Producer, "_publish"),
    (messaging.Producer, "_prepare"),
)
HOMES = tuple(os.path.dirname(os.path.abspath(package.__file__)) + os.sep for package in (celery, kombu))


def _replaced(app: Any) -> Iterator[str]:
    for owner, name in PATH:
        if not plain_function(owner, name):
            yield f"{owner.__name__}.{name} was replaced"
    for thing, known in ((app, base.Celery), (app.amqp, amqp.AMQP), (app.amqp.router, routes.Router)):
        for name in ("send_task", "as_task_v2", "_create_task_sender", "create_task_message", "route"):
            if hasattr(known, name) and getattr(type(thing), name) is not getattr(known, name):
                yield f"{_name(type(thing))} overrides {name}"
            if name in vars(thing) and name != "create_task_message":
                yield f"{name} was replaced"
    # Celery caches these two on the object itself; what lies there must be of its making.
    if app.amqp.create_task_message != app.amqp.as_task_v2:
        yield "amqp.create_task_message was replaced"
    if not _at_home(app.amqp.send_task_message):
        yield "amqp.send_task_message was replaced"
    if app.amqp.Producer is not messaging.Producer:
        yield f"amqp.Producer is {_name(app.amqp.Producer)}"
    if not plain_function(type(app.backend), "on_task_call"):
        yield f"{_name(type(app.backend))} overrides on_task_call"
    encoder = serialization.registry._encoders.get("json")
    if (
        encoder is None
        or encoder.encoder is not kombu_json.dumps
        or serialization.dumps != serialization.registry.dumps
        or kombu_json.dumps.__defaults__[1] is not kombu_json.JSONEncoder
    ):
        yield "JSON is not encoded by kombu"


def plain_function(owner: type, name: str) -> bool:
    """A function of Celery's or kombu's own modules: not wrapped by an integration, not patched by the app."""
    return _at_home(inspect.getattr_static(owner, name, None))


def _at_home(function: Any) -> bool:
    return (
        inspect.isfunction(function)
        and not hasattr(function, "__wrapped__")
        and os.path.abspath(function.__code__.co_filename).startswith(HOMES)
    )


def of_task(task: Any) -> list[str]:
    """Why continuations with this task are sent by Celery."""
    plain = app_task.Task
    reasons = [
        f"{_name(type(task).__mro__[1])} overrides {name}"
        for name in ("apply_async", "shadow_name", "_get_exec_options")
        if getattr(type(task), name) is not getattr(plain, name) or name in vars(task)
    ]
    for name, usual in (("serializer", "json"), ("compression", None), ("expires", None), ("mandatory", None)):
        value = getattr(task, name, None)
        if value not in (None, usual):
            reasons.append(f"{name} is {value!r}")
    if getattr(task, "_dump_pydantic_arguments", None) is not None:
        reasons.append("pydantic arguments are dumped by Celery")
    if task.soft_time_limit and task.time_limit and task.soft_time_limit > task.time_limit:
        reasons.append("soft_time_limit is above time_limit")
    return reasons


def _name(thing: Any) -> str:
    from celeriac import ladder

    return ladder.name_of(thing)


# --- where messages of a task go, and what they are like ---


class _Probe(messaging.Producer):  # type: ignore[misc]
    """Catches what Celery would publish."""

    def __init__(self, app: Any) -> None:
        super().__init__(None, auto_declare=False)
        self.__connection__ = app.connection_for_write()
        self.caught: dict[str, Any] = {}

    def _publish(self, *args: Any, **kwargs: Any) -> None:
        self.caught = inspect.signature(messaging.Producer._publish).bind(self, *args, **kwargs).arguments


def target(app: Any, name: str, destination: Mapping[str, str]) -> dict[str, Any]:
    """Celery's message of an empty call of a task, as `Target` reads it.

    Raises LookupError where only Celery can send such messages.
    """
    from celeriac import config

    task = app.tasks.get(name)
    options: dict[str, Any] = dict(destination)
    if task is not None:
        reasons = of_task(task)
        if reasons:
            raise LookupError(", ".join(reasons))
        # With a result to come Celery may ask the backend to wait for it.
        options = {**task._get_exec_options(), **options, "task_type": task, "ignore_result": True}
    probe = _Probe(app)
    app.send_task(
        name,
        task_id="id",
        reply_to="oid",
        root_id="id",
        parent_id="id",
        producer=probe,
        add_to_parent=False,
        retry=False,
        **options,
    )
    caught = probe.caught
    headers, properties = dict(caught["headers"]), dict(caught["properties"])
    if task is not None:
        headers["ignore_result"] = task.ignore_result
    exchange = caught["exchange"]
    if caught["content_type"] != "application/json" or "compression" in headers or caught.get("mandatory"):
        raise LookupError("it is not sent as plain JSON")
    queues = [entity for entity in caught["declare"] or () if isinstance(entity, kombu.Queue)]
    if len(queues) > 1 or len(queues) != len(caught["declare"] or ()):
        raise LookupError("more than a queue is declared for it")
    kinds = {binding["exchange"]["type"] for queue in queues for binding in config.queue(queue)["bindings"]}
    if kinds - {"direct", "topic"} or (exchange and not queues):
        raise LookupError("its exchange is none that the supervisor publishes to")
    if any(queue.on_declared for queue in queues):
        raise LookupError("its queue has on_declared")
    if caught["priority"] is not None:
        properties["priority"] = caught["priority"]
    known = app.amqp.queues.consume_from
    return {
        "headers": headers,
        "properties": properties,
        "content_type": caught["content_type"],
        "content_encoding": caught["content_encoding"],
        "argsrepr_maxsize": app.amqp.argsrepr_maxsize,
        "kwargsrepr_maxsize": app.amqp.kwargsrepr_maxsize,
        "repr_maxlevels": app.conf.get("task_repr_maxlevels", 3),
        "exchange": getattr(exchange, "name", exchange) or "",
        "routing_key": caught["routing_key"] or "",
        # The session has declared what it consumes.
        "declare": next((config.queue(queue) for queue in queues if queue.name not in known), None),
    }


# --- handing over ---


class Continuations:
    """What a child needs to hand continuations over."""

    def __init__(self, app: Any, pipe: ChildPipe, writer: backends.Writer | None, job: backends.Job) -> None:
        self.app = app
        self.pipe = pipe
        self.writer = writer
        self.job = job
        self.targets: dict[tuple[Any, ...], tuple[Target, Any] | None] = {}
        self.step = type("Step", (Step,), {"continuations": self})
        self.body = type("Step", (Step,), {"continuations": self, "awaited": True})

    def prepare(self, embed: dict[str, Any]) -> None:
        """Puts steps where the tracer looks for what comes next."""
        chain = embed.get("chain")
        if chain and self.is_plain(chain[-1]):
            embed["chain"] = [*chain[:-1], self.step(chain[-1], app=self.app)]
        callbacks = embed.get("callbacks")
        # Several callbacks are sent as a group.
        if callbacks and len(callbacks) == 1 and self.is_plain(callbacks[0]):
            embed["callbacks"] = [self.step(callbacks[0], app=self.app)]
        chord = embed.get("chord")
        if chord and self.is_plain(chord):
            embed["chord"] = self.body(chord, app=self.app)

    @staticmethod
    def is_plain(signature: Any) -> bool:
        """The signature of a task and not of a group, chord and so on."""
        return (
            type(signature) is dict
            and not signature.get("subtask_type")
            and isinstance(signature.get("task"), str)
            and signature.keys() >= {"args", "kwargs", "options", "immutable"}
        )

    def send(self, signature: Step, args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
        """Hands a call over and gives its result, as `apply_async` does; None where Celery has to send it."""
        pipe, number = self.pipe, self.job.number
        if not number or os.getpid() != pipe.pid or watched():
            return None
        stamps = options.get("stamped_headers") or ()
        if any(name not in OPTIONS and name not in stamps for name in options):
            return None
        if any(name not in options for name in stamps):
            return None
        parent = self.app.current_worker_task
        if not (options.get("root_id") and options.get("parent_id")):
            if not parent or self.app.conf.task_inherit_parent_priority:
                return None
            request = parent.request
            options = {
                **options,
                "root_id": options.get("root_id") or request.root_id or request.id,
                "parent_id": options.get("parent_id") or request.id,
            }
        found = self.target(signature["task"], options)
        if found is None or not (isinstance(args, (tuple, list)) and _is_plain(list(args)) and _is_plain(kwargs)):
            return None
        way, task = found
        if task is not None and task.typing:
            # Raises what Celery would raise.
            task.__header__(*(args or ()), **(kwargs or {}))
        task_id = options.get("task_id") or uuid()
        try:
            error = pipe.go_on(
                number,
                way,
                task_id,
                options.get("reply_to") or self.app.thread_oid,
                json.dumps(args),
                json.dumps(kwargs),
                json.dumps(options),
                as_tuple=isinstance(args, tuple),
                hold=self.is_stored(parent),
                wait=signature.awaited,
            )
        except (ValueError, TypeError):
            return None
        if error is not None:
            raise OperationalError(error)
        result = (task or self.app).AsyncResult(task_id)
        result.ignored = options.get("ignore_result", task.ignore_result if task else None)
        if parent:
            parent.add_trail(result)
        return result

    def is_stored(self, parent: Any) -> bool:
        """Whether the result of the running task goes to the supervisor next."""
        if self.writer is None or not parent:
            return False
        ignored = parent.request.ignore_result
        return not (parent.ignore_result if ignored is None else ignored)

    def target(self, name: str, options: Mapping[str, Any]) -> tuple[Target, Any] | None:
        """Where the messages of a task go, with the task if it is known; None where Celery has to send them."""
        destination = {name: options[name] for name in ROUTING if options.get(name) is not None}
        if not all(isinstance(value, str) for value in destination.values()):
            return None
        key = (name, *destination.items())
        if key not in self.targets:
            if len(self.targets) >= MOST_TARGETS:
                self.targets.clear()
            try:
                made = Target(json.dumps(target(self.app, name, destination)))
                self.targets[key] = made, self.app.tasks.get(name)
            except Exception:
                # Celery meets it again where the task sees it.
                self.targets[key] = None
        return self.targets[key]


class Step(Signature):  # type: ignore[misc]
    """What comes next; to user code the mapping that it was made of."""

    continuations: Continuations
    #: Whether `apply_async` returns when the broker has the message. What counts the members of a chord marks its
    #: body as sent next.
    awaited = False

    def apply_async(self, args: Any = None, kwargs: Any = None, route_name: Any = None, **options: Any) -> Any:
        if route_name is None:
            given = {name: value for name, value in options.items() if value is not None}
            result = self.continuations.send(self, *self._merge(args, kwargs, given))
            if result is not None:
                return result
        return super().apply_async(args, kwargs, route_name, **options)

    __repr__ = dict.__repr__

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def _is_plain(value: Any) -> bool:
    """Shown in `argsrepr` as what JSON makes of it is shown."""
    kind = type(value)
    if kind in (str, int, float, bool, type(None)):
        return True
    if kind is list:
        return all(map(_is_plain, value))
    if kind is dict:
        return all(type(name) is str for name in value) and all(map(_is_plain, value.values()))
    return False
