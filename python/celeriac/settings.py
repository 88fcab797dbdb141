"""Every setting of Celery: who reads it under celeriac, and what it does there.

One table. `docs/settings.md` is made from it, with types and defaults as the installed Celery has them; a test compares
them and finds settings that have no row. What Celery's documentation says of a setting holds unless a row says
otherwise.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from celery.app.defaults import NAMESPACES, flatten

#: Who reads a setting.
READERS = {
    "supervisor": "the Rust core, which gets it once at the start",
    "start": "Celery's start-up code in the main process",
    "children": "Celery's code in the children: the tracer, result backends, everything that a task sends",
    "producers": "whoever sends a task; children do when a task sends another",
    "beat": "`celery beat`, and beat in the worker",
    "monitors": "`celery inspect`, `celery control`, `celery events`, Flower",
}


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    #: Its name, or a pattern for those of one backend.
    name: str
    #: Keys of `READERS`, with commas.
    readers: str
    #: What it does here.
    effect: str

    @property
    def is_pattern(self) -> bool:
        """Whether it stands for several settings."""
        return "*" in self.name


#: Sections of the reference, each with its rows.
SETTINGS: dict[str, list[Setting]] = {
    "General": [
        Setting(
            "accept_content", "supervisor,children", "Content types that may be decoded; others are refused unread."
        ),
        Setting("result_accept_content", "children,producers", "The same for results."),
        Setting("enable_utc", "start,children,beat,producers", "Times in messages and schedules are UTC."),
        Setting("timezone", "supervisor,children,beat,producers", "The zone of times that name none."),
        Setting("imports", "start", "Modules imported before the zygote is forked."),
        Setting("include", "start", "The same; `-I` adds to it."),
    ],
    "Broker": [
        Setting("broker_url", "supervisor,children,producers", "Address, list of addresses, or several with `;`."),
        Setting("broker_read_url", "supervisor", "Where tasks are consumed from, if not from `broker_url`."),
        Setting(
            "broker_write_url",
            "children,producers",
            "Where tasks are sent to. If it is not `broker_read_url`, rpc results and what follows a task are sent by "
            "the children.",
        ),
        Setting("broker_transport", "supervisor,children,producers", "Its name wins over the scheme of the address."),
        Setting(
            "broker_transport_options",
            "supervisor,children,producers",
            "Options of the transport, as kombu has them. A Python object among them: kombu's bridge.",
        ),
        Setting("broker_use_ssl", "supervisor,children,producers", "TLS, and its options."),
        Setting("broker_connection_timeout", "supervisor,children,producers", "Longest attempt to connect, seconds."),
        Setting("broker_connection_retry", "supervisor", "Whether a lost connection is made anew."),
        Setting("broker_connection_retry_on_startup", "supervisor", "The same for the first one."),
        Setting("broker_connection_max_retries", "supervisor", "Attempts before the worker ends; `None`: no end."),
        Setting(
            "broker_channel_error_retry",
            "",
            "No effect: a channel that RabbitMQ closes is always opened again, its deliveries come again.",
        ),
        Setting(
            "broker_failover_strategy", "supervisor,producers", "`round-robin`, `shuffle`; a function: kombu's bridge."
        ),
        Setting("broker_heartbeat", "supervisor", "AMQP heartbeat, seconds, negotiated with the server."),
        Setting(
            "broker_heartbeat_checkrate",
            "start",
            "For the connection of consumer boot steps; the core's looks twice an interval.",
        ),
        Setting("broker_login_method", "supervisor,producers", "SASL mechanism of AMQP."),
        Setting("broker_native_delayed_delivery_queue_type", "start", "Kind of RabbitMQ's delay queues."),
        Setting("broker_pool_limit", "children,producers", "Connections that a process keeps for sending."),
        Setting("broker_pool_acquire_timeout", "children,producers", "Longest wait for one of them, seconds."),
        Setting("broker_host", "supervisor,children,producers", "Used where no address is set."),
        Setting("broker_port", "supervisor,children,producers", "Fills in what the address leaves out."),
        Setting("broker_user", "supervisor,children,producers", "The same."),
        Setting("broker_password", "supervisor,children,producers", "The same; a function: kombu's bridge."),
        Setting("broker_vhost", "supervisor,children,producers", "The same."),
    ],
    "Tasks": [
        Setting("task_acks_late", "supervisor", "Acknowledge after the result is stored instead of at the start."),
        Setting(
            "task_acks_on_failure_or_timeout", "supervisor", "Whether late acks happen after failures and time-outs."
        ),
        Setting("task_acks_on_failure", "supervisor", "The same for failures alone."),
        Setting("task_acks_on_timeout", "supervisor", "The same for hard time limits alone."),
        Setting(
            "task_reject_on_worker_lost", "supervisor", "A late-acked task whose child dies goes back to its queue."
        ),
        Setting("task_retry_on_worker_lost", "supervisor", "A task whose child dies is retried."),
        Setting("task_soft_time_limit", "supervisor,start", "Seconds; counted from the acceptance by the child."),
        Setting("task_time_limit", "supervisor,start", "The same; the child is killed and replaced."),
        Setting("task_default_rate_limit", "supervisor", "Tasks a second, minute or hour, per worker."),
        Setting("task_annotations", "start", "Changes attributes of tasks before the worker reads them."),
        Setting("task_queues", "supervisor,producers", "Queues that are declared and consumed."),
        Setting("task_create_missing_queues", "start,producers", "Whether `-Q` may name unknown queues."),
        Setting("task_create_missing_queue_type", "start,producers", "Kind of such queues."),
        Setting("task_create_missing_queue_exchange_type", "start,producers", "Kind of their exchanges."),
        Setting("task_queue_max_priority", "supervisor,producers", "`x-max-priority` of queues that have none."),
        Setting("task_default_queue", "supervisor,producers", "The queue where nothing else is said."),
        Setting("task_default_queue_type", "supervisor,producers", "`classic` or `quorum`."),
        Setting("task_default_exchange", "supervisor,producers", "Its exchange."),
        Setting("task_default_exchange_type", "supervisor,producers", "Kind of that exchange."),
        Setting("task_default_routing_key", "supervisor,producers", "Its key."),
        Setting("task_default_delivery_mode", "producers", "Whether messages outlive a restart of RabbitMQ."),
        Setting("task_default_priority", "producers", "Priority of messages that have none."),
        Setting("task_inherit_parent_priority", "children", "What a task sends has its priority."),
        Setting(
            "task_routes",
            "children,producers",
            "Which task goes where. Functions: what follows is sent by the children.",
        ),
        Setting("task_protocol", "children,producers", "2, or 1 for receivers of Celery 3."),
        Setting("task_serializer", "supervisor,children,producers", "Of messages, and of replies to remote control."),
        Setting("task_compression", "children,producers", "Of messages."),
        Setting("task_publish_retry", "children,producers", "Whether sending is tried again."),
        Setting(
            "task_publish_retry_policy",
            "children,producers",
            "How often; what the supervisor sends is tried until the broker has it.",
        ),
        Setting("task_ignore_result", "children,producers", "No results."),
        Setting("task_store_errors_even_if_ignored", "children", "But failures."),
        Setting("task_track_started", "children", "The state STARTED is stored."),
        Setting("task_repr_maxlevels", "producers", "Depth of `argsrepr`."),
        Setting("task_remote_tracebacks", "producers", "`get()` raises with the task's traceback."),
        Setting("task_send_sent_event", "producers", "The event `task-sent`."),
        Setting("task_always_eager", "producers", "Tasks run where they are sent."),
        Setting("task_eager_propagates", "producers", "And raise there."),
        Setting("task_store_eager_result", "producers", "And store their results."),
        Setting(
            "task_allow_error_cb_on_chord_header",
            "children,producers",
            "Errbacks of a chord belong to its members, too.",
        ),
    ],
    "Results": [
        Setting("result_backend", "supervisor,children,producers", "Where results go; `doctor` says who writes them."),
        Setting("result_expires", "supervisor,children,beat", "How long results are kept."),
        Setting("result_failure_expires", "children", "The same for failures; sent along with each result."),
        Setting("result_chord_expires", "children", "The same for the keys of chords."),
        Setting("result_extended", "children", "Results carry name, arguments, worker, retries and queue."),
        Setting("result_serializer", "children", "Of results."),
        Setting("result_compression", "children", "Of results; set, the children write them themselves."),
        Setting("result_cache_max", "producers", "Results that a client keeps."),
        Setting("result_persistent", "supervisor", "rpc results outlive a restart of RabbitMQ."),
        Setting("result_exchange", "", "No effect, as in Celery: rpc uses the default exchange."),
        Setting("result_exchange_type", "", "No effect, as in Celery."),
        Setting("result_backend_transport_options", "supervisor,children,producers", "Options of the backend."),
        Setting("result_chord_join_timeout", "children", "Longest wait of a chord for one member's result, seconds."),
        Setting("result_chord_retry_interval", "children", "Seconds between looks of `celery.chord_unlock`."),
        Setting(
            "result_backend_always_retry",
            "children",
            "For what children write. The supervisor always goes on until a result is stored.",
        ),
        Setting("result_backend_max_retries", "children", "For what children write."),
        Setting("result_backend_base_sleep_between_retries_ms", "children", "For what children write."),
        Setting("result_backend_max_sleep_between_retries_ms", "children", "For what children write."),
    ],
    "Result backends": [
        Setting("redis_host", "supervisor,children,producers", "Fills in what the address leaves out."),
        Setting("redis_port", "supervisor,children,producers", "The same."),
        Setting("redis_username", "supervisor,children,producers", "The same."),
        Setting("redis_password", "supervisor,children,producers", "The same."),
        Setting("redis_db", "supervisor,children,producers", "The same, for Unix sockets."),
        Setting("redis_backend_use_ssl", "supervisor,children,producers", "TLS, and its options."),
        Setting("redis_max_connections", "children,producers", "Of a process; the supervisor has one."),
        Setting("redis_socket_timeout", "children,producers", "Of their connections; the supervisor waits 30 s."),
        Setting(
            "redis_socket_connect_timeout", "children,producers", "Of their connections; the supervisor waits 5 s."
        ),
        Setting("redis_socket_keepalive", "children,producers", "Of their connections."),
        Setting("redis_retry_on_timeout", "children,producers", "Of their connections; the supervisor always does."),
        Setting("database_*", "children,producers", "`db+…://`."),
        Setting("cache_*", "children,producers", "`cache+…://`."),
        Setting("mongodb_*", "children,producers", "`mongodb://`."),
        Setting("cassandra_*", "children,producers", "`cassandra`."),
        Setting("elasticsearch_*", "children,producers", "`elasticsearch`."),
        Setting("s3_*", "children,producers", "`s3`."),
        Setting("azureblockblob_*", "children,producers", "`azureblockblob`."),
        Setting("gcs_*", "children,producers", "`gs`."),
        Setting("couchbase_*", "children,producers", "`couchbase`."),
        Setting("arangodb_*", "children,producers", "`arangodb`."),
        Setting("cosmosdbsql_*", "children,producers", "`cosmosdbsql`."),
    ],
    "Worker": [
        Setting("worker_concurrency", "start,supervisor", "Tasks that run at a time; `-c`."),
        Setting("worker_pool", "start,supervisor", "Kind of pool; `-P`."),
        Setting(
            "worker_pool_start_method",
            "start",
            "`fork`. `spawn` is refused: celeriac forks from a process that has no threads.",
        ),
        Setting("worker_pool_putlocks", "", "No effect: a task is only handed to an idle child."),
        Setting("worker_pool_restarts", "start", "Allows `pool_restart`."),
        Setting("worker_proc_alive_timeout", "supervisor", "A child that is not up after so many seconds is replaced."),
        Setting(
            "worker_prefetch_multiplier", "supervisor", "Messages that are held for each task that may run; 0: all."
        ),
        Setting("worker_disable_prefetch", "supervisor", "A message is fetched when a child is idle (Redis)."),
        Setting("worker_eta_task_limit", "supervisor", "Most tasks with an `eta` that are held."),
        Setting(
            "worker_enable_prefetch_count_reduction",
            "",
            "No effect: what runs across a lost connection is counted, not guessed.",
        ),
        Setting("worker_detect_quorum_queues", "", "No effect: RabbitMQ's quorum queues are always seen."),
        Setting("worker_max_tasks_per_child", "supervisor", "A child is replaced after so many tasks."),
        Setting("worker_max_memory_per_child", "supervisor", "A child is replaced above so many KiB."),
        Setting("worker_lost_wait", "", "No effect: a child's death is known at once."),
        Setting("worker_soft_shutdown_timeout", "supervisor", "Seconds that running tasks have at a soft shutdown."),
        Setting("worker_enable_soft_shutdown_on_idle", "supervisor", "Also when nothing runs."),
        Setting(
            "worker_cancel_long_running_tasks_on_connection_loss",
            "supervisor",
            "Late-acked tasks are killed when the broker is lost.",
        ),
        Setting("worker_deduplicate_successful_tasks", "children", "A redelivered task that has succeeded is skipped."),
        Setting("worker_disable_rate_limits", "supervisor", "No rate limits."),
        Setting("worker_direct", "start,producers", "A queue for this worker alone."),
        Setting("worker_enable_remote_control", "supervisor", "Remote control."),
        Setting("worker_send_task_events", "supervisor", "Task events; `-E`."),
        Setting("worker_state_db", "start", "File in which revoked tasks are remembered."),
        Setting("worker_autoscaler", "start", "Celery's own; any other class is refused."),
        Setting("worker_consumer", "start", "Celery's own; any other class is refused."),
        Setting("worker_agent", "start", "Refused when it is set."),
        Setting(
            "worker_timer",
            "start",
            "Class of the timer that boot steps see; it must have a thread, as Celery's default has.",
        ),
        Setting("worker_timer_precision", "start", "Its longest sleep, seconds."),
        Setting("worker_hijack_root_logger", "start,children", "Handlers of the root logger are removed."),
        Setting("worker_log_format", "start,children", "Lines of the log."),
        Setting("worker_task_log_format", "start,children", "Lines that tasks write."),
        Setting("worker_log_datefmt", "start,children", "Times in the log."),
        Setting("worker_task_log_datefmt", "start,children", "Times in lines that tasks write."),
        Setting("worker_log_color", "start,children", "Colours; by default on a terminal."),
        Setting("worker_redirect_stdouts", "start,children", "What is printed becomes lines of the log."),
        Setting("worker_redirect_stdouts_level", "start,children", "Their level."),
    ],
    "Events and remote control": [
        Setting("event_exchange", "supervisor,monitors", "Exchange of events."),
        Setting("event_serializer", "supervisor,monitors", "Of events."),
        Setting("event_queue_prefix", "supervisor,monitors", "Queues of those who listen."),
        Setting(
            "event_queue_expires", "supervisor,monitors", "Such a queue is deleted when unused for so long, seconds."
        ),
        Setting("event_queue_ttl", "supervisor,monitors", "Events in it are dropped after so long, seconds."),
        Setting("event_queue_exclusive", "supervisor,monitors", "It belongs to one connection."),
        Setting("event_queue_durable", "supervisor,monitors", "It outlives a restart of RabbitMQ."),
        Setting("control_exchange", "supervisor,monitors", "Exchange of remote control."),
        Setting("control_queue_ttl", "supervisor,monitors", "Commands are dropped after so long, seconds."),
        Setting(
            "control_queue_expires", "supervisor,monitors", "The queue is deleted when unused for so long, seconds."
        ),
        Setting("control_queue_exclusive", "supervisor,monitors", "It belongs to one connection."),
        Setting("control_queue_durable", "supervisor,monitors", "It outlives a restart of RabbitMQ."),
    ],
    "Beat": [
        Setting("beat_*", "beat", "Read by Celery's beat, which celeriac leaves as it is."),
    ],
    "Security": [
        Setting("security_*", "start,children,producers", "Keys and certificates of `app.setup_security()`."),
    ],
}


def rows() -> Iterator[Setting]:
    """All rows."""
    for section in SETTINGS.values():
        yield from section


def find(name: str) -> Setting | None:
    """The row of a setting: its own, or the pattern that it matches."""
    of_its_own = next((row for row in rows() if row.name == name), None)
    return of_its_own or next((row for row in rows() if row.is_pattern and fnmatch.fnmatch(name, row.name)), None)


def reference() -> str:
    """`docs/settings.md`."""
    known = {name.lower(): option for name, option in flatten(NAMESPACES)}
    out = [
        "# Settings",
        "",
        "Made from `python/celeriac/settings.py` (`make docs`); a test compares them. Names, types and defaults are",
        "Celery's, and so is the meaning, unless the last column says otherwise. Who reads a setting:",
        "",
        *(f"- *{name}*: {who};" for name, who in READERS.items()),
        "- *nobody*: the setting has no effect, for the reason given.",
    ]
    for title, section in SETTINGS.items():
        out += ["", f"## {title}", "", "| setting | type | default | read by | here |", "|---|---|---|---|---|"]
        for row in section:
            kind, default = ("", "") if row.is_pattern else _option(known.get(row.name))
            readers = ", ".join(row.readers.split(",")) if row.readers else "nobody"
            out.append(f"| `{row.name}` | {kind} | {default} | {readers} | {row.effect} |")
    return "\n".join(out) + "\n"


def _option(option: Any) -> tuple[str, str]:
    """Type and default of a setting."""
    if option is None:
        return "", ""
    kind = {"string": "text", "any": "any"}.get(option.type, getattr(option.type, "__name__", str(option.type)))
    default = "" if option.default is None else f"`{option.default!r}`"
    return kind, default.replace("|", "\\|")
