"""The state file (`--statedb`, `worker_state_db`): what is revoked, and the logical clock, from one start to the next.

Celery's own class reads and writes it, so that either worker goes on where the other stopped.
"""

from __future__ import annotations

import atexit
import os
from typing import TYPE_CHECKING

from celeriac import ladder

if TYPE_CHECKING:
    from celeriac.worker import Worker

__all__ = ["StateFile"]


class StateFile:
    """An open state file. What it says is in `celery.worker.state` once it is open."""

    def __init__(self, worker: Worker) -> None:
        state = worker.state
        try:
            self._persistent = worker._persistence = state.Persistent(state, worker.statedb, worker.app.clock)
        except Exception as error:
            # A damaged file fails in dbm, zlib, pickle or in what was pickled: each has its own exceptions.
            raise ladder.Refused(
                [
                    f"the state file {worker.statedb} cannot be read ({type(error).__name__}: {error}): stop the "
                    "worker that uses it, or move it away to start without the revoked tasks in it."
                ]
            ) from None
        self._owner = os.getpid()
        self._saved = False
        atexit.register(self.save)

    def save(self) -> None:
        """Writes and closes the file, once.

        Children run what is registered for the exit too, and leave the file alone.
        """
        if self._owner == os.getpid() and not self._saved:
            self._saved = True
            self._persistent.save()
