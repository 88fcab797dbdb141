"""What the core is told: the app's settings as the JSON that `src/config` reads, durations in seconds.

Built once, after `celeryd_after_setup`, when nothing changes any more. What cannot be said in JSON cannot be
hosted natively; the ladder says what then.
"""

from __future__ import annotations

import json
import logging
import ssl
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from billiard.common import REMAP_SIGTERM
from celery import signals
from celery.utils.time import rate
from celery.worker.autoscale import AUTOSCALE_KEEPALIVE
from kombu.serialization import prepare_accept_content, registry
from kombu.transport.base import to_rabbitmq_queue_arguments
from kombu.utils.url import url_to_parts

from celeriac import aio, events, gossip, ladder, lines

if TYPE_CHECKING:
    from celery import Celery
    from celery.app.task import Task
    from kombu import Exchange, Queue

    from celeriac.worker import Worker

#: Loggers of Celery's lines, the per-task ones first.
TASK_LOGGERS = ("celery.worker.strategy", "celery.app.trace", "celery.worker.consumer")


def build(worker: Worker) -> dict[str, Any]:
    """The whole configuration, `Config` in `src/config/mod.rs`."""
    app = worker.app
    conf = app.conf
    return {
        "hostname": worker.hostname,
        "broker": broker(app),
        "queues": [queue(one) for one in app.amqp.queues.consume_from.values()],
        "backend": backend(app, native=ladder.backend(app).rung == "native"),
        "pool": pool(worker),
        "autoscale": autoscale(worker),
        "prefetch_multiplier": max(worker.prefetch_multiplier, 0),
        "disable_prefetch": bool(conf.get("worker_disable_prefetch")),
        "eta_task_limit": conf.get("worker_eta_task_limit"),
        "rate_limits": not worker.disable_rate_limits,
        "revoked": [str(task_id) for task_id in worker.state.revoked],
        "clock": app.clock.value,
        "tasks": {name: task_policy(task) for name, task in app.tasks.items()},
        "accept_content": accept_content(conf.accept_content),
        "timezone": timezone(app),
        "time_limit": worker.time_limit,
        "soft_time_limit": worker.soft_time_limit,
        "shutdown": shutdown(worker),
        "control": control(app),
        "app_has_stats": any(True for _ in worker.informative_steps()),
        "heartbeat": heartbeat(worker),
        "heartbeat_signal": bool(signals.heartbeat_sent.receivers),
        "events": events.config(worker),
        "cluster": cluster(worker),
        "lines": lines.config(),
        "log_tasks": worker.log_format == "json",
        "http": worker.http,
        **rungs(worker),
        "log_info": wants_lines(logging.INFO),
        "log_debug": wants_lines(logging.DEBUG),
    }


def rungs(worker: Worker) -> dict[str, list[tuple[str, Any]]]:
    """The ladder, where somebody may ask for it."""
    if worker.http is None:
        return {"rungs": [], "rung_tasks": []}
    return {
        "rungs": [(decision.name, decision.rung) for decision in ladder.concerns(worker)],
        "rung_tasks": sorted(Counter(decision.rung for decision in ladder.tasks(worker)).items()),
    }


def wants_lines(level: int) -> bool:
    """Whether anybody sees Celery's lines of this level."""
    return any(logging.getLogger(name).isEnabledFor(level) for name in TASK_LOGGERS)


def heartbeat(worker: Worker) -> float | None:
    """Seconds between heartbeats."""
    if worker.options.get("without_heartbeat"):
        return None
    return float(worker.options.get("heartbeat_interval") or 2.0)


def cluster(worker: Worker) -> dict[str, Any]:
    """`ClusterConfig`."""
    heard = gossip.queue(worker)
    return {"mingle": gossip.mingles(worker), "gossip": queue(heard) if heard else None}


# --- broker ---


def broker(app: Celery) -> dict[str, Any]:
    """`BrokerConfig`. What JSON cannot hold is left to the Python bridge, which has the app itself."""
    conf = app.conf
    retry_on_startup = conf.broker_connection_retry_on_startup
    strategy = conf.broker_failover_strategy
    return {
        "urls": broker_urls(app),
        "transport_options": _options(conf.broker_transport_options),
        "use_ssl": tls(conf.broker_use_ssl),
        "heartbeat": conf.broker_heartbeat,
        "connection_timeout": conf.broker_connection_timeout,
        "retry": bool(conf.broker_connection_retry),
        "retry_on_startup": bool(conf.broker_connection_retry if retry_on_startup is None else retry_on_startup),
        "max_retries": conf.broker_connection_max_retries,
        "failover_strategy": strategy if isinstance(strategy, str) else None,
        "login_method": conf.broker_login_method,
    }


def broker_urls(app: Celery) -> list[str]:
    """Addresses to consume from, in order of failover, with what `broker_user` and its like add to them."""
    configured = app.conf.broker_read_url
    connection = app.connection_for_read()
    addresses = list(connection.alt) or [configured]
    return [
        _completed(str(address), app) if address and "://" in address else _from_parts(connection)
        for address in addresses
    ]


def _from_parts(connection: Any) -> str:
    """The address of a connection that was not given as a URL."""
    info = connection.info()
    scheme = info["transport"] if isinstance(info["transport"], str) else connection.transport.driver_type
    return (
        f"{scheme}://"
        + _authority(info["userid"], info["password"], info["hostname"], info["port"])
        + _path(info["virtual_host"])
    )


def _completed(address: str, app: Celery) -> str:
    """An address whose blanks are filled from the settings, and otherwise untouched."""
    conf = app.conf
    transport = conf.broker_transport
    if isinstance(transport, str) and "." not in transport and ":" not in transport:
        # Named explicitly it wins over the scheme.
        address = f"{transport}://{address.split('://', 1)[1]}"
    extra = (conf.broker_user, conf.broker_password, conf.broker_port, conf.broker_vhost)
    if not any(isinstance(value, (str, int)) for value in extra) or "+" in address.split("://", 1)[0]:
        return address
    parts = url_to_parts(address)
    query = "?" + address.split("?", 1)[1] if "?" in address else ""
    user = parts.username or conf.broker_user
    password = parts.password or conf.broker_password
    authority = _authority(
        user, password if isinstance(password, str) else None, parts.hostname, parts.port or conf.broker_port
    )
    return f"{parts.scheme}://{authority}{_path(parts.path or conf.broker_vhost)}{query}"


def _authority(user: str | None, password: str | None, host: str | None, port: int | str | None) -> str:
    credentials = quote(user or "", safe="") + (f":{quote(password, safe='')}" if password else "")
    return (f"{credentials}@" if credentials else "") + (host or "localhost") + (f":{port}" if port else "")


def _path(virtual_host: str | int | None) -> str:
    return "" if virtual_host is None else "/" + quote(str(virtual_host), safe="/")


def tls(value: Any) -> Any:
    """`broker_use_ssl` and its like: false, true, or options; how a certificate is checked is always spelled
    `CERT_NONE`, `CERT_OPTIONAL` or `CERT_REQUIRED`."""
    if not isinstance(value, Mapping):
        return bool(value)
    return {
        name: _verification(option) if name.endswith("cert_reqs") else _plain(option) for name, option in value.items()
    }


def _verification(value: Any) -> Any:
    if isinstance(value, str):
        word = value.upper().removeprefix("CERT_")
        return f"CERT_{word}"
    return ssl.VerifyMode(value).name if value is not None else None


# --- queues ---


def queue(entity: Queue) -> dict[str, Any]:
    """A queue as kombu would declare it, `topology::Queue`."""
    # A bound queue is a copy, and one with bindings loses in it the default exchange that Celery gives every queue.
    entity = copy(entity)
    arguments = to_rabbitmq_queue_arguments(
        entity.queue_arguments or {},
        expires=entity.expires,
        message_ttl=entity.message_ttl,
        max_length=entity.max_length,
        max_length_bytes=entity.max_length_bytes,
        max_priority=entity.max_priority,
    )
    return {
        "name": entity.name,
        "bindings": list(_bindings(entity)),
        "durable": bool(entity.durable),
        "exclusive": bool(entity.exclusive),
        "auto_delete": bool(entity.auto_delete),
        "no_declare": bool(entity.no_declare),
        "no_ack": bool(entity.no_ack),
        "arguments": _arguments(arguments, entity),
        "consumer_arguments": _arguments(entity.consumer_arguments, entity),
        "alias": entity.alias,
        "shown": _shown(entity),
    }


def _shown(entity: Queue) -> dict[str, Any] | None:
    """A queue as `inspect active_queues` shows it; none where JSON cannot."""
    try:
        shown: dict[str, Any] = json.loads(json.dumps(entity.as_dict(recurse=True), default=_plain))
    except (TypeError, ValueError):
        return None
    return shown


def _bindings(entity: Queue) -> Iterator[dict[str, Any]]:
    if entity.exchange is not None and entity.exchange.name:
        yield {
            "exchange": exchange(entity.exchange),
            "routing_key": entity.routing_key or "",
            "arguments": _arguments(entity.binding_arguments, entity),
        }
    # A set in kombu: sorted, so that two workers declare alike.
    for binding in sorted(entity.bindings or (), key=lambda one: (one.exchange.name, one.routing_key or "")):
        yield {
            "exchange": exchange(binding.exchange),
            "routing_key": binding.routing_key or "",
            "arguments": _arguments(binding.arguments, entity),
        }


def exchange(entity: Exchange) -> dict[str, Any]:
    """`topology::Exchange`."""
    return {
        "name": entity.name,
        "type": entity.type or "direct",
        "durable": bool(entity.durable),
        "auto_delete": bool(entity.auto_delete),
        "passive": bool(entity.passive),
        # The broker's own exchanges are there already and must not be declared.
        "no_declare": bool(entity.no_declare) or entity.name.startswith("amq."),
        "arguments": _arguments(entity.arguments, entity),
    }


def _arguments(arguments: Mapping[str, Any] | None, entity: Queue | Exchange) -> dict[str, Any]:
    try:
        return {str(name): _plain(value) for name, value in (arguments or {}).items()}
    except TypeError as error:
        raise ladder.Refused(
            [f"{entity.name}: an argument of its declaration is {error}, which cannot be sent."]
        ) from None


# --- tasks ---


def task_policy(task: Task) -> dict[str, Any]:
    """`TaskPolicy`: what the attributes of a task say about settling and limits."""
    both = task.acks_on_failure_or_timeout
    return {
        "acks_late": bool(task.acks_late),
        # Split in 5.7; before, one attribute decided both.
        "acks_on_failure": bool(_first(getattr(task, "acks_on_failure", None), both, True)),
        "acks_on_timeout": bool(_first(getattr(task, "acks_on_timeout", None), both, True)),
        "reject_on_worker_lost": bool(task.reject_on_worker_lost),
        "retry_on_worker_lost": bool(getattr(task, "retry_on_worker_lost", False)),
        "time_limit": task.time_limit,
        "soft_time_limit": task.soft_time_limit,
        "rate_limit": rate_limit(task),
        "rate_limit_text": None if task.rate_limit is None else str(task.rate_limit),
        "ignore_result": bool(task.ignore_result),
        "send_events": bool(task.send_events),
        "hosting": ladder.hosting(task),
        "asynchronous": aio.is_async(task),
    }


def rate_limit(task: Task) -> float | None:
    """Tasks a second; none: as many as come."""
    try:
        limit: float = rate(task.rate_limit)
    except (ValueError, KeyError):
        raise ladder.Refused([f"task {task.name}: rate_limit {task.rate_limit!r} is not like '10/m'."]) from None
    return limit or None


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def accept_content(configured: Iterable[str] | None) -> list[str]:
    """MIME types that may be decoded; without a list all but those that kombu has disabled."""
    if configured is None:
        return sorted(set(registry.type_to_name) - registry._disabled_content_types)
    return sorted(prepare_accept_content(configured))


# --- the rest ---


def maybe_timedelta_seconds(value: float | timedelta | None) -> float | None:
    """Seconds: some backends keep what they were given."""
    return value.total_seconds() if isinstance(value, timedelta) else value


def backend(app: Celery, *, native: bool) -> dict[str, Any]:
    """`BackendConfig`."""
    conf = app.conf
    return {
        "url": backend_url(conf),
        "native": native,
        "transport_options": _options(conf.result_backend_transport_options),
        "expires": maybe_timedelta_seconds(app.backend.expires),
        "use_ssl": tls(conf.redis_backend_use_ssl),
        "persistent": bool(getattr(app.backend, "persistent", False)),
    }


def backend_url(conf: Any) -> str:
    """The address of the result backend. What one of Redis leaves out comes from the settings, as in Celery's backend;
    the number of the database does so for sockets only."""
    address = conf.result_backend
    if not isinstance(address, str):
        return ""
    scheme, _, rest = address.partition("://")
    if scheme not in {"redis", "rediss", "redis+socket", "socket"}:
        return address
    end = next((at for at, letter in enumerate(rest) if letter in "/?#"), len(rest))
    netloc, rest = rest[:end], rest[end:]
    userinfo, _, place = netloc.rpartition("@")
    user, _, password = userinfo.partition(":")
    user = user or quote(conf.redis_username or "", safe="")
    password = password or quote(conf.redis_password or "", safe="")
    if "socket" in scheme:
        if conf.redis_db and "virtual_host=" not in rest:
            rest += f"{'&' if '?' in rest else '?'}virtual_host={conf.redis_db}"
    else:
        has_port = ":" in place.rpartition("]")[2]
        host, port = place.rsplit(":", 1) if has_port else (place, "")
        host, port = host or conf.redis_host or "", port or conf.redis_port or ""
        place = f"{host}:{port}" if port else host
    userinfo = f"{user}:{password}" if password else user
    return f"{scheme}://{userinfo}{'@' if userinfo else ''}{place}{rest}"


def pool(worker: Worker) -> dict[str, Any]:
    """`PoolConfig`."""
    kind = ladder.pool_kind(worker.pool_cls)
    looped = bool(aio.tasks(worker.app))
    return {
        "kind": kind,
        # The solo pool runs one task at a time, whatever -c says.
        "concurrency": 1 if kind == "solo" else worker.min_concurrency,
        "max_tasks_per_child": worker.max_tasks_per_child or None,
        "max_memory_per_child": worker.max_memory_per_child or None,
        # As many loops as processes: both share the processors that -c was chosen for.
        "loops": worker.concurrency if looped else 0,
        "async_concurrency": aio.concurrency(worker) if looped else 0,
        "proc_alive_timeout": worker.app.conf.worker_proc_alive_timeout,
    }


def autoscale(worker: Worker) -> dict[str, Any] | None:
    """`AutoscaleConfig`; none where the pool has the size that it is told."""
    if not worker.autoscale:
        return None
    return {
        "max": worker.max_concurrency,
        "min": worker.min_concurrency,
        "keepalive": AUTOSCALE_KEEPALIVE,
    }


def shutdown(worker: Worker) -> dict[str, Any]:
    """`ShutdownConfig`."""
    conf = worker.app.conf
    return {
        "soft_timeout": conf.get("worker_soft_shutdown_timeout") or 0.0,
        "soft_on_idle": bool(conf.get("worker_enable_soft_shutdown_on_idle")),
        "term_is_quit": REMAP_SIGTERM == "SIGQUIT",
        "hup_restarts": not worker._isatty,
        "cancel_on_connection_loss": bool(conf.worker_cancel_long_running_tasks_on_connection_loss),
    }


def control(app: Celery) -> dict[str, Any] | None:
    """`Control`; none where remote control is off."""
    conf = app.conf
    if not conf.worker_enable_remote_control:
        return None
    return {
        "exchange": conf.control_exchange,
        "queue_ttl": conf.control_queue_ttl,
        "queue_expires": conf.control_queue_expires,
        # New in 5.6; before, the queue was neither.
        "queue_exclusive": bool(conf.get("control_queue_exclusive", False)),
        "queue_durable": bool(conf.get("control_queue_durable", False)),
        # Requests are read in whatever `accept_content` allows, replies are written in this.
        "serializer": conf.task_serializer,
    }


def timezone(app: Celery) -> str:
    """A name of the time zone database for the app's time zone."""
    zone = app.timezone
    name: str | None = getattr(zone, "key", None)
    if name:
        return name
    hours = (zone.utcoffset(datetime.now()) or timedelta()) / timedelta(hours=1)
    if hours != int(hours):
        raise ladder.Refused([f"timezone {zone} has no name of its own: set one, as 'Asia/Kolkata'."])
    # The signs of these names are those of POSIX: Etc/GMT-2 is two hours ahead.
    return f"Etc/GMT{-int(hours):+d}" if hours else "UTC"


def _options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The options that JSON can hold; where there are others the ladder does not take the native rung."""
    foreign = {name for name, _ in foreign_options(options)}
    return {str(name): _plain(value) for name, value in (options or {}).items() if name not in foreign}


def foreign_options(options: Mapping[str, Any] | None) -> Iterator[tuple[str, str]]:
    """Options that JSON cannot hold, each with what it is."""
    for name, value in (options or {}).items():
        try:
            _plain(value)
        except TypeError as error:
            yield name, str(error)


def _plain(value: Any) -> Any:
    """A value as JSON has it.

    Raises TypeError where it has none.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return float(value) if isinstance(value, float) else int(value)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(one) for one in value]
    if hasattr(value, "total_seconds"):
        return value.total_seconds()
    raise TypeError(f"a {type(value).__qualname__}")
