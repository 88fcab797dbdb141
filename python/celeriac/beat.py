"""Beat inside the worker: Celery's own embedded beat process, in the supervisor's charge.

It is forked with the zygote, before the supervisor has threads, and told to stop when the worker begins to stop. Beyond
Celery it never outlives the worker, and a worker whose beat has ended says so.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from billiard.common import human_status
from billiard.util import set_pdeathsig

__all__ = ["EmbeddedBeat"]

logger = logging.getLogger("celery.beat")

#: How long after beat the worker may be told to stop for it to be one stop.
ORDER = 2.0

#: How long the schedule may take to be saved once beat was told to stop.
PATIENCE = 10.0


class EmbeddedBeat:
    """What Celery's `Beat` boot step starts and stops as `worker.beat`."""

    def __init__(self, process: Any) -> None:
        #: Celery's process object; its `service` is the parent's copy.
        self.process = process
        self._told = threading.Event()

    def fork(self) -> None:
        """Starts the process. To be called before the supervisor has threads, and after the zygote is forked: whoever
        is forked later would inherit billiard's list of children, and wait for this one as it exits."""
        supervisor = os.getpid()
        self.process.run = functools.partial(_run, self.process, self.process.run, supervisor)
        self.process.start()
        # Celery does not stop boot steps when one of them fails to start.
        atexit.register(self.stop)

    def start(self) -> None:
        """It runs already; from now on it is noticed when it ends."""
        threading.Thread(target=self._watch, name="beat-watch", daemon=True).start()

    def tell(self) -> None:
        """Tells it to stop; does not wait."""
        if self.process.pid is not None and not self._told.is_set():
            self._told.set()
            self.process.stop()

    def stop(self) -> None:
        """Tells it to stop and waits until the schedule is saved."""
        atexit.unregister(self.stop)
        self.tell()
        if self.process.pid is None or self._ends(PATIENCE):
            return
        logger.error("beat (pid %s) did not stop within %d seconds and is killed.", self.process.pid, PATIENCE)
        os.kill(self.process.pid, signal.SIGKILL)
        self._ends(PATIENCE)

    def _ends(self, timeout: float) -> bool:
        # Billiard's own `join` knows no time limit for this process: it closes what that would wait for.
        deadline = time.monotonic() + timeout
        while self.process.exitcode is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.process.exitcode is not None

    def _watch(self) -> None:
        with contextlib.suppress(ChildProcessError):
            # It stays a zombie for the main thread to see.
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        # A service manager that stops the worker tells every process of it, in any order.
        if not self._told.wait(ORDER):
            logger.error(
                "beat (pid %s) ended with %s: nothing is scheduled until the worker is started again.",
                self.process.pid,
                human_status(self.process.exitcode),
            )


def _run(process: Any, run: Callable[[], None], supervisor: int) -> None:
    """The life of the process: Celery's, but that it ends with the supervisor, as by any other stop."""
    # Ctrl+C reaches the whole group; the supervisor decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_pdeathsig(signal.SIGTERM)
    service = process.service
    service.start = functools.partial(_start, service, service.start)
    service.sync = functools.partial(_save, service.sync)
    if os.getppid() == supervisor:
        run()


def _start(service: Any, start: Callable[..., None], **options: Any) -> None:
    """Celery's handler raises `SystemExit`, which is lost where no exception can get out, as in a destructor: beat
    would go on for ever. Its loop looks at a mark too."""
    leave = signal.getsignal(signal.SIGTERM)

    def told(number: int, frame: Any) -> None:
        service._is_shutdown.set()
        if callable(leave):
            leave(number, frame)

    if callable(leave):
        signal.signal(signal.SIGTERM, told)
    start(**options)


def _save(sync: Callable[[], None]) -> None:
    """The last thing: whoever tells it to stop once more must not keep it from saving."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sync()
