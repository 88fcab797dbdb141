"""Celery's own suite runs beside all other tests: started when these begin, because nearly all of its time is waiting,
and collected when they are through.
"""

import os
from pathlib import Path

import pytest
from support.conformance import HARNESS, Runs

RUNS = pytest.StashKey[Runs]()


def pytest_collection_finish(session):
    here = Path(__file__).parent
    if session.config.option.collectonly or not any(item.path.parent == here for item in session.items):
        return
    if HARNESS.exists():
        cache = os.environ.get("CELERY_CONFORMANCE_CACHE", session.config.rootpath / ".cache" / "conformance")
        session.config.stash[RUNS] = Runs(Path(cache))


def pytest_unconfigure(config):
    if RUNS in config.stash:
        config.stash[RUNS].stop()


@pytest.fixture
def runs(request):
    if RUNS not in request.config.stash:
        pytest.skip(f"{HARNESS} is absent: Celery's own suite is not run")
    return request.config.stash[RUNS]
