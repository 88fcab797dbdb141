"""The harness that runs Celery's own integration suite, as processes beside the test session."""

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from support.servers import RabbitMq
from support.worker import COMMANDS

HARNESS = Path(os.environ.get("CONFORMANCE", "../shared/conformance/run-integration")).resolve()

# amqp/redis shares its broker with the one and its backend with the other: for those who have the time.
CONFIGURATIONS = os.environ.get("CONFORMANCE_ON", "redis/redis amqp/rpc").split()

FILES = os.environ.get("CONFORMANCE_FILES", "").split()

# Half of the time goes to the tests of chords, which wait for what must not happen: they have a worker of their own.
CHORDS = "test_chord"


def parts():
    """What runs side by side: a name, broker and backend, and what the harness is told to select."""
    for configuration in CONFIGURATIONS:
        if configuration.endswith("/redis") and (not FILES or "test_canvas.py" in FILES):
            yield f"{configuration} but chords", configuration, ["-k", f"not {CHORDS}"]
            yield f"{configuration} chords", configuration, ["-k", CHORDS]
        else:
            yield configuration, configuration, []


class Runs:
    """The harness, once for each part."""

    def __init__(self, cache):
        self.harness = [sys.executable, str(HARNESS), "--cache", str(cache)]
        self.cache = cache
        self.folder = tempfile.TemporaryDirectory(prefix="celeriac-conformance-")
        self.processes = {}
        self.rabbitmq = None
        self.error = None
        self.stopping = threading.Event()
        # What the harness installs at first takes a minute: nobody has to wait for it.
        self.starter = threading.Thread(target=self.start, name="conformance", daemon=True)
        self.starter.start()

    def start(self):
        try:
            subprocess.run([*self.harness, "--prepare"], check=True, timeout=600)
            for name, configuration, selection in parts():
                if self.stopping.is_set():
                    return
                self.processes[name] = self.run(configuration, selection)
        except BaseException as error:  # a missing server skips, which is no Exception
            self.error = error

    def run(self, configuration, selection):
        number = len(self.processes)
        broker, backend = configuration.split("/")
        urls = ["--broker", self.vhost(f"conformance-{number}") if broker == "amqp" else "redis://auto"]
        urls += ["--backend", "rpc://" if backend == "rpc" else "redis://auto"]
        log = Path(self.folder.name) / f"{number}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self.harness, *urls, "--worker", f"{COMMANDS['celeriac'][0]} {{globals}} worker {{options}}",
                 "--must-pass", "--out", f"{self.folder.name}/{number}", *selection, "--tests", *self.files()],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        return process, log

    def files(self):
        """Not every file exists in every version of the suite.

        test_inspect comes first: it wants to see no scheduled task, and test_canvas leaves one for three minutes.
        """
        suite = max(self.cache.glob("suite-*")) / "t" / "integration"
        names = FILES or sorted((path.name for path in suite.glob("test_*.py")), key=lambda n: n != "test_inspect.py")
        return [f"t/integration/{name}" for name in names if (suite / name).exists()]

    def vhost(self, name):
        if self.rabbitmq is None:
            folder = Path(self.folder.name) / "rabbitmq"
            folder.mkdir()
            self.rabbitmq = RabbitMq(folder)
            self.rabbitmq.start()
        return self.rabbitmq.add_vhost(name)

    def finished(self, name, timeout):
        """Exit status and output of a part."""
        self.starter.join(timeout)
        if self.error is not None:
            raise self.error
        process, log = self.processes[name]
        return process.wait(timeout), log.read_text(errors="replace")

    def stop(self):
        self.stopping.set()
        self.starter.join(600)
        for process, _ in self.processes.values():
            process.terminate()
        for process, _ in self.processes.values():
            process.wait(60)
        if self.rabbitmq is not None:
            self.rabbitmq.__exit__()
        self.folder.cleanup()
