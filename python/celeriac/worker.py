"""`celeriac.worker.Worker`: Celery's own worker program with a core of ours.

Start-up (settings, signals, logging, banner, pidfile, queues, boot steps) is Celery's code, of whatever
version is installed. Its boot steps are kept but for `Pool`, which here only stands for the pool that Rust
runs, and `Consumer`, the last one, which runs the Rust core until the worker ends.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import MappingProxyType
from typing import Any

from celery import bootsteps, platforms, signals
from celery._state import _set_task_join_will_block
from celery.apps import worker as apps_worker
from celery.exceptions import ImproperlyConfigured, WorkerShutdown, WorkerTerminate
from celery.platforms import EX_FAILURE
from celery.utils.log import worker_logger as logger
from celery.worker import autoscale, components
from celery.worker.consumer import Consumer
from kombu.common import ignore_errors
from kombu.utils.imports import symbol_by_name

from celeriac import aio, config, consumers, events, gossip, green, hosting, json_lines, ladder, terminal, zygote
from celeriac.beat import EmbeddedBeat
from celeriac.delayed import DelayedDelivery
from celeriac.pooling import AutoscalerStep, PoolStandIn
from celeriac.statefile import StateFile

#: Exit status of a worker whose app asks for what celeriac cannot do; as for other usage errors.
EX_REFUSED = 2

#: Options that Celery does not have, and where they are read from when no command line was parsed.
OWN_VARIABLES = MappingProxyType({"http": "CELERIAC_HTTP", "log_format": "CELERIAC_LOG_FORMAT"})
#: All of them.
OWN_OPTIONS = frozenset({"async_concurrency", *OWN_VARIABLES})

#: How often in a row the consumer's boot steps are started where a connection error keeps one from it.
MOST_STARTS = 3

#: Handled by Rust once the core runs; until then they are noted, so that an early stop is a stop.
EARLY_SIGNALS = ("SIGTERM", "SIGINT", "SIGQUIT")


class ConsumerStandIn(hosting.Limits):
    """What boot steps and the receivers of `worker_ready` see as the consumer."""

    hub = None

    def __init__(self, worker: Worker, prefetch_count: int) -> None:
        self.app = worker.app
        self.controller = worker
        self.hostname = worker.hostname
        self.pid = os.getpid()
        self.pool = worker.pool
        self.timer = worker.timer
        self.initial_prefetch_count = prefetch_count
        self.prefetch_multiplier = worker.prefetch_multiplier
        self.disable_rate_limits = worker.disable_rate_limits
        self.strategies: dict[str, Any] = {}
        self.qos = hosting.Prefetch(worker.pool)
        self.task_consumer = hosting.TaskConsumer(worker.app, worker.pool.calls.desk)
        self.task_buckets: dict[str, Any] = defaultdict(lambda: None)
        self.on_task_message: set[Any] = set()
        self.conninfo = worker.app.connection_for_read()
        self.connection_errors = self.conninfo.connection_errors
        self.channel_errors = self.conninfo.channel_errors
        self._connection: Any = None
        self._of_thread = threading.local()
        self.event_dispatcher = events.Dispatcher(
            worker.app,
            worker.pool.calls.desk,
            worker.hostname,
            enabled=bool(
                worker.task_events
                or not worker.options.get("without_gossip")
                or not worker.options.get("without_heartbeat")
            ),
            task_events=bool(worker.task_events),
        )
        self.gossip = gossip.Gossip(self, worker, worker.pool.calls.desk)
        self.steps: list[Any] = []
        self.blueprint = ConsumerBlueprint(steps=worker.app.steps["consumer"])
        self._worker = worker
        self._was_ready = self._stopped = False
        self._delayed_delivery = DelayedDelivery(self)
        self._consumers = consumers.Consumers(self)

    @property
    def connection(self) -> Any:
        """A connection of kombu's, made when it is used; none while the core has none."""
        return getattr(self._of_thread, "connection", self._connection)

    def connection_of_thread(self, connection: Any) -> None:
        """What `connection` is to the calling thread."""
        self._of_thread.connection = connection

    def apply_steps(self, **options: Any) -> None:
        """Makes the app's own consumer steps."""
        self.blueprint.apply(self, **options)
        self.steps = [
            consumers.Aside(step, self._consumers) if isinstance(step, bootsteps.ConsumerStep) else step
            for step in self.steps
        ]

    def call_soon(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Calls it: this is the only thread that does."""
        function(*args, **kwargs)

    def update_strategies(self) -> None:
        """Tells the core of the tasks that there are now."""
        policies = {name: config.task_policy(task) for name, task in self.app.tasks.items()}
        self.pool.calls.desk.tasks(json.dumps(policies))
        self._worker.tasks_changed()

    def _update_prefetch_count(self, index: int = 0) -> None:
        """The prefetch follows the pool by itself."""

    def connected(self) -> None:
        """The core has a broker connection."""
        self._connection = self.app.connection_for_read()
        self._delayed_delivery.connected()
        if self._was_ready and not self._stopped:
            self._start_steps()

    def lost(self) -> None:
        """The core has none any more: the steps are started anew with the next, those with a connection of their own
        see to it themselves."""
        if self.blueprint.state == bootsteps.RUN:
            self.blueprint.restart(self)
            # What was stopped is not stopped again when the worker ends before there is another.
            self.blueprint.started = -1
        self._disconnect()

    def ready(self) -> None:
        """The core consumes for the first time: the app's steps are started and `worker_ready` is sent."""
        if self._stopped:
            return
        self._was_ready = True
        if self._start_steps():
            self._consumers.go()
            self._worker.ready_callback(self)

    def _start_steps(self) -> bool:
        for attempt in range(MOST_STARTS):
            try:
                self.blueprint.start(self)
                return True
            except Exception as exc:
                if attempt + 1 == MOST_STARTS or not isinstance(exc, self.connection_errors):
                    self._worker.fail(exc)
                    return False
                # Celery takes it for a lost connection, whoever it comes from, and begins anew.
                logger.warning("Boot step could not start, trying again: %r", exc)
            self.blueprint.restart(self)
            self._disconnect()
            self._connection = self.app.connection_for_read()
        return False

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            ignore_errors(connection, connection.release)

    def close(self) -> None:
        """Called by Celery when the worker begins to stop."""

    def stop(self) -> None:
        """Stops the app's consumer steps: when the worker begins to stop, as in Celery, at the latest at its end."""
        self._stopped = True
        self.blueprint.stop(self)
        self._consumers.tell()

    def shutdown(self) -> None:
        """Called by Celery when the worker has stopped."""
        self._consumers.join()
        self.blueprint.send_all(self, "shutdown")
        self._disconnect()


class ConsumerBlueprint(bootsteps.Blueprint):  # type: ignore[misc]
    """The app's consumer steps in the order of Celery's, without Celery's own."""

    name = "Consumer"
    # Only to sort by: they are what the app's steps require.
    default_steps = Consumer.Blueprint.default_steps

    def __init__(self, steps: Any = None, **options: Any) -> None:
        self._of_app = set(steps or ())
        super().__init__(steps=steps, **options)

    def _finalize_steps(self, steps: dict[str, Any]) -> Sequence[Any]:
        own = {self.load_step(step)[0] for step in self._of_app}
        return [step for step in super()._finalize_steps(steps) if step.name in own]


class TimerStep(components.Timer):  # type: ignore[misc]
    """Celery's threaded timer, its thread held back until the zygote is forked."""

    name = components.Timer.name

    def create(self, w: Worker) -> None:
        """Entries may be made at once; they are run after `release`."""
        super().create(w)
        if hasattr(w.timer, "ensure_started"):
            w.timer.ensure_started = lambda: None

    @staticmethod
    def release(timer: Any) -> None:
        """Lets the thread start, now or with the first entry."""
        if vars(timer).pop("ensure_started", None) and not timer.empty():
            timer.ensure_started()


class StateStep(components.StateDB):  # type: ignore[misc]
    """Takes the place of Celery's step for the state file, under its name."""

    name = components.StateDB.name

    def create(self, w: Worker) -> None:
        """Opens and reads the file."""
        w.state_file = StateFile(w)


class BeatStep(components.Beat):  # type: ignore[misc]
    """Celery's step for the embedded beat; the process is forked before the steps are started."""

    name = components.Beat.name

    def create(self, w: Worker) -> EmbeddedBeat:
        """Celery makes the process."""
        w.beat = EmbeddedBeat(super().create(w))
        return w.beat


class PoolStep(components.Pool):  # type: ignore[misc]
    """Takes the place of Celery's pool step, under its name."""

    name = components.Pool.name

    def create(self, w: Worker) -> None:
        """There is nothing to start: the zygote is forked before the steps, the rest is Rust's."""
        w.pool = PoolStandIn(w)
        _set_task_join_will_block(w.pool.task_join_will_block)

    def close(self, w: Worker) -> None:
        """The core closes its pool itself."""

    def terminate(self, w: Worker) -> None:
        """The core ends its pool itself."""


class ConsumerStep(components.Consumer):  # type: ignore[misc]
    """Takes the place of Celery's consumer step, under its name: the last to start."""

    name = components.Consumer.name
    last = True

    def create(self, w: Worker) -> ConsumerStandIn:
        """The stand-in, and the app's own consumer steps."""
        most = max(w.max_concurrency, 1) if w.max_concurrency else w.concurrency
        consumer = w.consumer = ConsumerStandIn(w, most * w.prefetch_multiplier)
        consumer.apply_steps(**w.options)
        return consumer

    def start(self, w: Worker) -> None:
        """Runs the core; the worker ends with it."""
        if w.early_signals:
            raise w.stopped_early()
        from celeriac import bridge

        assert w.zygote is not None, "forked in on_start"
        w.core_runs = True
        try:
            ended = bridge.run(w, w.zygote)
        except ladder.Refused as refused:
            logger.critical("%s", refused.message)
            raise WorkerShutdown(EX_REFUSED) from None
        except ImproperlyConfigured as wrong:
            # Of the core: whatever user code raises is dealt with in the hooks.
            logger.critical("%s", wrong)
            raise WorkerShutdown(EX_REFUSED) from None
        finally:
            w.core_runs = False
        # Before anything that is registered for the exit, as a restart is.
        w.save_state()
        if ended.restart:
            w.say(f"Restarting celery worker ({' '.join(sys.argv)})", sys.__stdout__)
            atexit.register(_become_new_worker)
        if w.terminating:
            raise WorkerTerminate(ended.exitcode)
        raise WorkerShutdown(ended.exitcode)


def _become_new_worker() -> None:
    """At exit this process becomes the same command again. Celery runs `sys.argv`, which is none where it began with
    `python -m`, as each worker in the background does."""
    platforms.close_open_fds([sys.__stdin__, sys.__stdout__, sys.__stderr__])
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class Worker(apps_worker.Worker):  # type: ignore[misc]
    """The worker of celeriac."""

    #: Configuration of the core, as `celeriac.config.build` makes it; there once the queues are known.
    core_config: dict[str, Any] | None = None
    #: Where the settings name one.
    state_file: StateFile | None = None
    #: What `celeriac.zygote.start` gave.
    zygote: zygote.Zygote | None = None
    #: Signals that came before the core was started, in order.
    early_signals: list[str]
    #: Whether signals reach the core.
    core_listens = False
    #: Tasks that run at a time on one event loop, as the command line says.
    async_concurrency: int | None = None
    #: Where probes and metrics are served.
    http: str | None = None
    #: How records are written: ``text``, as Celery does, or ``json``.
    log_format = "text"
    #: Whether it is there.
    core_runs = False
    #: Whether the stop began as a cold one.
    terminating = False
    #: Whether the steps were told that the stop begins.
    closed = False
    #: The embedded beat of `-B`.
    beat: EmbeddedBeat | None
    #: Called when there are other tasks than before.
    tasks_changed: Callable[[], None] = staticmethod(lambda: None)

    class Blueprint(apps_worker.Worker.Blueprint):  # type: ignore[misc]
        """Celery's worker steps and the app's, with ours in the place of five."""

        replaced = MappingProxyType(
            {
                components.Timer: TimerStep,
                components.StateDB: StateStep,
                components.Beat: BeatStep,
                components.Pool: PoolStep,
                autoscale.WorkerComponent: AutoscalerStep,
                components.Consumer: ConsumerStep,
            }
        )

        def _finalize_steps(self, steps: dict[str, Any]) -> Sequence[Any]:
            # Exchanged after sorting, so that what requires Celery's steps by name or class finds them.
            return [self.replaced.get(step, step) for step in super()._finalize_steps(steps)]

        def close(self, parent: Worker) -> None:
            """The first thing of a stop: while the core still runs, or after it where nothing else began the stop."""
            if not parent.closed:
                parent.closed = True
                super().close(parent)

    def on_before_init(self, **kwargs: Any) -> None:
        """First thing: options that cannot be served are refused before anything of the app is asked."""
        self.early_signals = []
        own = {name: kwargs.get(name) or os.environ.get(variable) or None for name, variable in OWN_VARIABLES.items()}
        self.refuse(ladder.refused_options({**kwargs, **own}))
        self._prepare_for_greenlets(kwargs.get("pool") or kwargs.get("pool_cls") or self.app.conf.worker_pool)
        self.http = own["http"]
        self.async_concurrency = kwargs.get("async_concurrency")
        self.log_format = own["log_format"] or self.log_format
        with json_lines.early() if self.log_format == "json" else contextlib.nullcontext():
            super().on_before_init(**self.prepare_args(**kwargs))
        if self.log_format == "json":
            # The banner is no record.
            self.quiet = True

    def prepare_args(self, **kwargs: Any) -> dict[str, Any]:
        """What the app is shown: Celery's options."""
        return {name: value for name, value in kwargs.items() if name not in OWN_OPTIONS}

    def setup_logging(self, colorize: bool | None = None) -> Any:
        """Celery's own, with a formatter of ours where that is asked for."""
        if self.log_format != "json":
            return super().setup_logging(colorize)
        json_lines.install(self.app.log)
        receivers = super().setup_logging(False)
        if not json_lines.has_effect():
            logger.warning(
                "--log-format json has no effect: the app has log handlers of its own, which are left alone."
            )
        return receivers

    def say(self, message: Any, stream: Any) -> None:
        """Writes to the terminal, past logging and its level, as Celery does; as a record where all that is written
        is to be one."""
        if self.log_format == "json":
            logger.handle(logger.makeRecord(logger.name, logging.INFO, __file__, 0, str(message), (), None))
        else:
            terminal.say(message, stream)

    def _prepare_for_greenlets(self, pool: Any) -> None:
        """A pool of greenlets needs a command line that its child can go through once more."""
        kind = pool if pool in green.KINDS else ladder.pool_kind(pool)
        if kind not in green.KINDS or green.line is not None:
            return
        if green.is_celery():
            # The settings have chosen it. Privileges are dropped by now, and the terminal is left.
            os.environ[green.DETACHED] = str(os.getpid())
            green.start_again()
        self.refuse(
            [
                f"the pool {kind} needs a child that finds the app as this process did, which only a command can be "
                "asked for: start the worker with `celeriac -A … worker` or `celery -A … worker`, or use -P threads."
            ]
        )

    def should_use_eventloop(self) -> bool:
        """Boot steps get Celery's threaded timer: there is no kombu event loop."""
        return False

    def on_init_blueprint(self) -> None:
        """Everything about the app is known but what `celeryd_after_setup` may change."""
        super().on_init_blueprint()
        self.refuse(ladder.refused_app(self))

    def informative_steps(self) -> Iterator[tuple[Any, Any]]:
        """Boot steps of the app that say something of themselves in `inspect stats`, each with its parent."""
        for parent, names in ((self, "worker"), (self.consumer, "consumer")):
            own = {symbol_by_name(step).name for step in self.app.steps[names]}
            for step in parent.steps:
                step = step.step if isinstance(step, consumers.Aside) else step
                if step.name in own and type(step).info is not bootsteps.Step.info:
                    yield step, parent

    def refuse(self, reasons: list[str]) -> None:
        """Ends the start-up where there is a reason to."""
        if reasons:
            raise ladder.Refused(reasons)

    def on_start(self) -> None:
        """Celery's start-up, then the fork of the zygote: before any boot step may start a thread."""
        super().on_start()
        try:
            self.refuse(ladder.refused_queues(self))
            self.core_config = config.build(self)
        except ladder.Refused as refused:
            logger.critical("%s", refused.message)
            raise WorkerShutdown(EX_REFUSED) from None
        without_effect = ladder.settings_without_effect(self)
        if without_effect:
            logger.warning("Settings without effect in celeriac yet: %s.", ", ".join(without_effect))
        aio.install(self.app)
        # Children run what is registered for the exit; this is none of theirs.
        if self.pidlock:
            atexit.unregister(self.pidlock.release)
        self.zygote = zygote.start(zygote.Plan.of(self.app, self.hostname, self.core_config))
        if self.pidlock:
            atexit.register(self.pidlock.release)
        if self.beat is not None:
            self.beat.fork()
        TimerStep.release(self.timer)
        for name in EARLY_SIGNALS:
            signal.signal(getattr(signal, name), self._note_signal)

    def _note_signal(self, number: int, frame: object) -> None:
        # Rust's handlers call this one too: once the core listens there is nothing to note.
        if not self.core_listens:
            self.early_signals.append(signal.Signals(number).name)

    def listening(self) -> None:
        """The core has its handlers: it is told what came while it started."""
        self.core_listens = True
        for name in self.early_signals:
            os.kill(os.getpid(), getattr(signal, name))

    def reload(self, modules: Iterable[str] | None = None, reload: bool = False, reloader: Any = None) -> None:
        """Loads modules here, as Celery does, and has every child replaced by one that has loaded them too."""
        names = set(self.app.loader.task_modules if modules is None else modules or ())
        list(self._reload_modules(names, force_reload=reload, reloader=reloader))
        self.consumer.update_strategies()
        self.consumer.reset_rate_limits()
        self.pool.restart(names, reload=bool(reload))

    def stats(self) -> dict[str, Any]:
        """What `inspect stats` shows."""
        shown: dict[str, Any] = self.pool.ask("stats")
        return shown

    def stopping(self, terminate: bool) -> None:
        """Nothing more is fetched, what runs may finish: what Celery stops before its pool is stopped."""
        self.terminating = terminate
        self.blueprint.close(self)
        self.consumer.stop()
        if self.beat is not None:
            self.beat.tell()

    def fail(self, exc: BaseException) -> None:
        """Something of the app's raised this where it ends Celery's worker, so it ends this one. From any thread."""
        if isinstance(exc, SystemExit):
            code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        else:
            logger.critical("Unrecoverable error: %r", exc, exc_info=exc)
            code = EX_FAILURE
        self.pool.calls.desk.stop(code)

    def stop(self, in_sighandler: bool = False, exitcode: int | None = None) -> None:
        """Celery's, once the core has ended; before, it is asked to."""
        if self.core_runs:
            self.pool.calls.desk.stop(exitcode or 0)
        else:
            super().stop(in_sighandler, exitcode)

    def terminate(self, in_sighandler: bool = False) -> None:
        """The same for a cold stop."""
        if self.core_runs:
            os.kill(os.getpid(), signal.SIGQUIT)
        else:
            super().terminate(in_sighandler)

    def save_state(self) -> None:
        """Writes the state file, where there is one."""
        if self.state_file is not None:
            self.state_file.save()

    def stopped_early(self) -> WorkerShutdown:
        """Told to stop before the core ran: it need not start. Exit statuses as the core's."""
        name = self.early_signals[0]
        how, status = ("Cold", 0) if name == "SIGQUIT" else ("Warm", 1 if name == "SIGINT" else 0)
        self.say(f"worker: {how} shutdown (MainProcess)", sys.__stdout__)
        signals.worker_shutting_down.send(sender=self.hostname, sig=name, how=how, exitcode=status)
        return WorkerShutdown(status)

    def install_platform_tweaks(self, worker: apps_worker.Worker) -> None:
        """Signals are handled in Rust, all but the one for Celery's debugger."""
        apps_worker.install_rdb_handler()
