"""`celeriac.worker.Worker`: Celery's own worker program with a core of ours.

Start-up (settings, signals, logging, banner, pidfile, queues, boot steps) is Celery's code, of whatever
version is installed. Its boot steps are kept but for `Pool`, which here only stands for the pool that Rust
runs, and `Consumer`, the last one, which runs the Rust core until the worker ends.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from celery import bootsteps, signals
from celery._state import _set_task_join_will_block
from celery.apps import worker as apps_worker
from celery.exceptions import WorkerShutdown
from celery.utils.log import worker_logger as logger
from celery.worker import components
from celery.worker.consumer import Consumer

from celeriac import aio, config, hosting, ladder, zygote
from celeriac.delayed import DelayedDelivery
from celeriac.statefile import StateFile

#: Exit status of a worker whose app asks for what celeriac cannot do; as for other usage errors.
EX_REFUSED = 2

TERM = signal.SIGTERM

#: Handled by Rust once the core runs; until then they are noted, so that an early stop is a stop.
EARLY_SIGNALS = ("SIGTERM", "SIGINT", "SIGQUIT")


class PoolStandIn:
    """What boot steps and signal handlers see as `worker.pool`; the pool itself is run by Rust."""

    signal_safe = True
    is_green = False
    task_join_will_block = True

    def __init__(self, worker: Worker) -> None:
        self.app = worker.app
        self.limit: int = worker.concurrency
        #: Process ids of the children, kept by the bridge.
        self.pids: list[int] = []
        self.calls = hosting.Calls()
        self._worker = worker

    def apply_async(
        self,
        target: Callable[..., Any],
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> hosting.Applied:
        """Has a child run a function that can be pickled; limits and callbacks as in Celery's pools."""
        return self.calls.post(target, args, kwargs, options)

    def terminate_job(self, pid: int, signal: int | None = None) -> None:
        """Kills a child, if it runs what came through `apply_async`."""
        self.calls.terminate(pid, signal or TERM)

    @property
    def num_processes(self) -> int:
        """Children: as many as were asked for, more once the pool was told to grow."""
        return max(len(self.pids), self.limit)

    @property
    def info(self) -> dict[str, Any]:
        """As `inspect stats` shows it."""
        worker = self._worker
        return {
            "implementation": ladder.name_of(worker.pool_cls),
            "max-concurrency": self.limit,
            "processes": list(self.pids),
            "max-tasks-per-child": worker.max_tasks_per_child or "N/A",
            "put-guarded-by-semaphore": False,
            "timeouts": [worker.soft_time_limit or 0, worker.time_limit or 0],
        }


class ConsumerStandIn(hosting.Limits):
    """What boot steps and the receivers of `worker_ready` see as the consumer."""

    hub = None
    task_consumer = None
    gossip = None

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
        self.qos = hosting.Prefetch()
        self.task_buckets: dict[str, Any] = defaultdict(lambda: None)
        self.on_task_message: set[Any] = set()
        self.conninfo = worker.app.connection_for_read()
        self.connection_errors = self.conninfo.connection_errors
        self.channel_errors = self.conninfo.channel_errors
        self.connection: Any = None
        self.event_dispatcher = worker.app.events.Dispatcher(hostname=worker.hostname, enabled=False)
        self.steps: list[Any] = []
        self.blueprint = ConsumerBlueprint(steps=worker.app.steps["consumer"])
        self._worker = worker
        self._was_ready = False
        self._delayed_delivery = DelayedDelivery(self)

    def apply_steps(self, **options: Any) -> None:
        """Makes the app's own consumer steps."""
        self.blueprint.apply(self, **options)

    def connected(self) -> None:
        """The core has a broker connection. Steps get a connection of kombu's, made when it is used."""
        if self.connection is None:
            self.connection = self.app.connection_for_read()
        self._delayed_delivery.connected()

    def ready(self) -> None:
        """The core consumes: the first time the app's steps are started and `worker_ready` is sent."""
        if self._was_ready:
            return
        self._was_ready = True
        self.blueprint.start(self)
        self._worker.ready_callback(self)

    def close(self) -> None:
        """Called by Celery when the worker begins to stop."""

    def stop(self) -> None:
        """Stops the app's consumer steps."""
        self.blueprint.stop(self)

    def shutdown(self) -> None:
        """Called by Celery when the worker has stopped."""
        self.blueprint.send_all(self, "shutdown")
        if self.connection is not None:
            self.connection.release()
            self.connection = None


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
        consumer = w.consumer = ConsumerStandIn(w, w.concurrency * w.prefetch_multiplier)
        consumer.apply_steps(**w.options)
        return consumer

    def start(self, w: Worker) -> None:
        """Runs the core; the worker ends with it."""
        if w.early_signals:
            raise w.stopped_early()
        from celeriac import bridge

        assert w.zygote is not None, "forked in on_start"
        try:
            ended = bridge.run(w, w.zygote)
        except ladder.Refused as refused:
            logger.critical("%s", refused.message)
            raise WorkerShutdown(EX_REFUSED) from None
        # Before anything that is registered for the exit, as a restart is.
        w.save_state()
        if ended.restart:
            # Celery's own way of restarting on SIGHUP: at exit this process becomes a new worker.
            apps_worker.safe_say(f"Restarting celery worker ({' '.join(sys.argv)})", sys.__stdout__)
            atexit.register(apps_worker._reload_current_worker)
        raise WorkerShutdown(ended.exitcode)


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

    class Blueprint(apps_worker.Worker.Blueprint):  # type: ignore[misc]
        """Celery's worker steps and the app's, with ours in the place of four."""

        replaced = MappingProxyType(
            {
                components.Timer: TimerStep,
                components.StateDB: StateStep,
                components.Pool: PoolStep,
                components.Consumer: ConsumerStep,
            }
        )

        def _finalize_steps(self, steps: dict[str, Any]) -> Sequence[Any]:
            # Exchanged after sorting, so that what requires Celery's steps by name or class finds them.
            return [self.replaced.get(step, step) for step in super()._finalize_steps(steps)]

    def on_before_init(self, **kwargs: Any) -> None:
        """First thing: options that cannot be served are refused before anything of the app is asked."""
        self.early_signals = []
        self.refuse(ladder.refused_options(kwargs))
        super().on_before_init(**kwargs)

    def should_use_eventloop(self) -> bool:
        """Boot steps get Celery's threaded timer: there is no kombu event loop."""
        return False

    def on_init_blueprint(self) -> None:
        """Everything about the app is known but what `celeryd_after_setup` may change."""
        super().on_init_blueprint()
        self.refuse(ladder.refused_app(self))

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
        self.zygote = zygote.start(zygote.Plan.of(self.app, self.hostname, self.core_config))
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

    def save_state(self) -> None:
        """Writes the state file, where there is one."""
        if self.state_file is not None:
            self.state_file.save()

    def stopped_early(self) -> WorkerShutdown:
        """Told to stop before the core ran: it need not start. Exit statuses as the core's."""
        name = self.early_signals[0]
        how, status = ("Cold", 0) if name == "SIGQUIT" else ("Warm", 1 if name == "SIGINT" else 0)
        apps_worker.safe_say(f"worker: {how} shutdown (MainProcess)", sys.__stdout__)
        signals.worker_shutting_down.send(sender=self.hostname, sig=name, how=how, exitcode=status)
        return WorkerShutdown(status)

    def install_platform_tweaks(self, worker: apps_worker.Worker) -> None:
        """Signals are handled in Rust, all but the one for Celery's debugger."""
        apps_worker.install_rdb_handler()
