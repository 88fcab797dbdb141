"""The one way in which a test waits: ask again until the answer is yes or the deadline has passed."""

import time
from collections.abc import Callable

# Generous, because it is only ever waited out by a test that fails.
PATIENCE = 30.0


def until(condition: Callable[[], object], what: str | Callable[[], str], timeout: float = PATIENCE, every=0.02):
    """Returns the first true value of `condition`; fails with `what` when there was none in time."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s: {what() if callable(what) else what}")
        time.sleep(every)
    return value


def never(condition: Callable[[], object], what: str, during: float, every=0.05):
    """Fails as soon as `condition` is true; returns when it was not for the whole time."""
    deadline = time.monotonic() + during
    while time.monotonic() < deadline:
        assert not condition(), what
        time.sleep(every)
