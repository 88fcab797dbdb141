"""The harness that runs Celery's own integration suite."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from support.worker import COMMANDS

HARNESS = Path(os.environ.get("CONFORMANCE", "../shared/conformance/run-integration")).resolve()

# amqp/redis shares its broker with the one and its backend with the other: for those who have the time.
CONFIGURATIONS = os.environ.get("CONFORMANCE_ON", "redis/redis amqp/rpc").split()

FILES = os.environ.get("CONFORMANCE_FILES", "").split()

# Half of the time goes to the tests of chords, which wait for what must not happen: they have a worker of their own.
CHORDS = "test_chord"


def parts():
    """What can run side by side: a name, broker and backend, and what the harness is told to select."""
    for configuration in CONFIGURATIONS:
        broker, backend = configuration.split("/")
        if backend == "redis" and (not FILES or "test_canvas.py" in FILES):
            yield f"{configuration} but chords", broker, backend, ["-k", f"not {CHORDS}"]
            yield f"{configuration} chords", broker, backend, ["-k", CHORDS]
        else:
            yield configuration, broker, backend, []


class Harness:
    def __init__(self, cache: Path):
        self.cache = cache
        self.command = [sys.executable, str(HARNESS), "--cache", str(cache)]

    def prepare(self):
        """What it installs at first, once for all processes of the session."""
        self.cache.mkdir(parents=True, exist_ok=True)
        with (self.cache / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            subprocess.run([*self.command, "--prepare"], check=True, timeout=600)

    def run(self, broker, backend, selection, folder, timeout):
        """Exit status and output."""
        done = subprocess.run(
            [*self.command, "--broker", broker, "--backend", backend,
             "--worker", f"{COMMANDS['celeriac'][0]} {{globals}} worker {{options}}",
             "--must-pass", "--out", str(folder), *selection, "--tests", *self.files()],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            encoding="utf-8", errors="replace", timeout=timeout,
        )  # fmt: skip
        return done.returncode, done.stdout

    def files(self):
        """Not every file exists in every version of the suite.

        test_inspect comes first: it wants to see no scheduled task, and test_canvas leaves one for three minutes.
        """
        suite = max(self.cache.glob("suite-*")) / "t" / "integration"
        names = FILES or sorted((path.name for path in suite.glob("test_*.py")), key=lambda n: n != "test_inspect.py")
        return [f"t/integration/{name}" for name in names if (suite / name).exists()]
