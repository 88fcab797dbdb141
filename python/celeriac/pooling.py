"""The pool and the autoscaler as boot steps, signal handlers and the app's own commands see them.

Both are run by Rust; what is called here is asked of it as the remote control command that does it.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from celery.worker import autoscale

from celeriac import hosting, ladder

if TYPE_CHECKING:
    from celeriac.worker import Worker

__all__ = ["AutoscalerStandIn", "AutoscalerStep", "PoolStandIn"]

TERM = signal.SIGTERM


class PoolStandIn:
    """What boot steps and signal handlers see as `worker.pool`; the pool itself is run by Rust."""

    signal_safe = True
    is_green = False

    def __init__(self, worker: Worker) -> None:
        self.app = worker.app
        self.task_join_will_block = worker.pool_cls.task_join_will_block
        self.limit: int = worker.min_concurrency
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

    def ask(self, command: str, **arguments: Any) -> Any:
        """The reply of the worker to one of its remote control commands; RuntimeError where that fails."""
        reply = json.loads(self.calls.desk.ask(command, json.dumps(arguments)))
        if isinstance(reply, dict) and set(reply) == {"error"}:
            raise RuntimeError(reply["error"])
        return reply

    def grow(self, n: int = 1) -> None:
        """Adds children, and prefetch for them."""
        self.ask("pool_grow", n=n)

    def shrink(self, n: int = 1) -> None:
        """Takes children away, and their prefetch."""
        self.ask("pool_shrink", n=n)

    def restart(self, modules: Iterable[str] = (), *, reload: bool = False) -> None:
        """Replaces every child after what it runs, by one that has loaded the modules."""
        self.calls.desk.restart(json.dumps({"modules": sorted(modules), "reload": reload}))

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


class AutoscalerStandIn:
    """What boot steps and commands see as `worker.autoscaler`."""

    keepalive = autoscale.AUTOSCALE_KEEPALIVE

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.pool = worker.pool

    def update(self, max: int | None = None, min: int | None = None) -> tuple[int, int]:
        """Changes the bounds; gives what they then are."""
        self.pool.ask("autoscale", max=max, min=min)
        return self.max_concurrency, self.min_concurrency

    def info(self) -> dict[str, int]:
        """As `inspect stats` shows it."""
        shown: dict[str, int] = self.pool.ask("stats")["autoscaler"]
        return shown

    @property
    def max_concurrency(self) -> int:
        """Most processes."""
        return self.info()["max"]

    @property
    def min_concurrency(self) -> int:
        """Fewest processes."""
        return self.info()["min"]

    @property
    def processes(self) -> int:
        """Processes now."""
        return self.info()["current"]

    @property
    def qty(self) -> int:
        """Tasks that the worker has taken up."""
        return self.info()["qty"]


class AutoscalerStep(autoscale.WorkerComponent):  # type: ignore[misc]
    """Takes the place of Celery's step, under its name: the core scales."""

    name = autoscale.WorkerComponent.name

    def create(self, w: Worker) -> None:
        """There is nothing to start."""
        w.autoscaler = AutoscalerStandIn(w)

    def start(self, w: Worker) -> None:
        """The core looks at each task that comes."""
