"""What the measurements share: the test suite's own servers and stages."""

import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: Where workers find `app.py`, and what it imports.
APPS = {"PYTHONPATH": f"{ROOT}/benches:{ROOT}/tests/python/apps"}
sys.path.insert(0, str(ROOT / "tests" / "python"))

from support.servers import Redis  # noqa: E402
from support.stage import Stage  # noqa: E402


@contextmanager
def redis():
    """A private server, and a folder that ends with it."""
    with tempfile.TemporaryDirectory() as folder, Redis(Path(folder)) as server:
        yield server, Path(folder)


def stage(kind, server, folder, backend=None):
    place = Path(tempfile.mkdtemp(dir=folder))
    return Stage(kind, place, server.url, backend or server.url, "q", {})


def quantiles(values, *which):
    values = sorted(values)
    return [values[min(int(one * len(values)), len(values) - 1)] for one in which]
