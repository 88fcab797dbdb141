"""Round trips of an empty task through one child: `python tests/python/measure_pool.py [tasks]`.

Prints the CPU that the child spends on each task; the supervisor here is a Python loop and is not counted.
"""

from __future__ import annotations

import os
import sys
import time

import pool_app
import pool_driver
from celeriac import zygote


def cpu(pid: int) -> float:
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9


def measure(title: str, tasks: int, *, acks_early: bool, native: bool, **settings: object) -> None:
    app = pool_app.make(**settings)
    app.finalize()
    plan = zygote.Plan(app, "celery@measure", native_results=native)
    with pool_driver.Supervisor(plan) as supervisor:
        child = supervisor.fork()
        for number in range(1, 501):
            child.run(number, "add", 1, 2, acks_early=acks_early)
            child.outcome()
        before, start = cpu(child.pid), time.perf_counter()
        for number in range(1000, 1000 + tasks):
            child.run(number, "add", 1, 2, acks_early=acks_early)
            child.outcome()
        wall, spent = time.perf_counter() - start, cpu(child.pid) - before
        print(
            f"{title}: {spent / tasks * 1e6:.1f} µs of child CPU a task,",
            f"{wall / tasks * 1e6:.1f} µs a round trip",
        )
        child.stop()
        supervisor.exit_code(child)


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    os.environ.setdefault("CELERY_LOG_LEVEL", "30")
    measure("no results, late ack", count, acks_early=False, native=True)
    measure("no results, early ack", count, acks_early=True, native=True)
    measure(
        "results through the supervisor, early ack",
        count,
        acks_early=True,
        native=True,
        result_backend="redis://localhost:1/0",
    )
