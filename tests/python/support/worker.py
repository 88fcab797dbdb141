"""A worker as a process: started by its command line, watched through its log, stopped by signals."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import psutil

from support.waiting import until

APPS = Path(__file__).resolve().parent.parent / "apps"
BIN = Path(sys.executable).parent

# What takes the place of the word `celery`; CELERIAC_COMMAND puts another build to the test.
COMMANDS = {
    "celery": [str(BIN / "celery")],
    "celeriac": shlex.split(os.environ.get("CELERIAC_COMMAND", str(BIN / "celeriac"))),
}

# In the environment of every process that a worker started.
MARK = "CELERIAC_TEST_WORKER"


def belongs(process, mark, session):
    """Whether a process descends from a worker, however it was reparented.

    Programs that set their title overwrite the environment that others see, hence the session; one that
    detaches leaves the session, hence the mark.
    """
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return os.getsid(process.pid) == session or process.environ().get(MARK) == mark
    except (psutil.Error, OSError):  # gone, or not ours to look into
        return False


class WorkerProcess:
    def __init__(self, kind, app, options, folder: Path, env=None, before=()):
        """`before` are words that come before the command, as of `nice` or `env`."""
        self.kind = kind
        self.mark = uuid.uuid4().hex
        self.command = [*before, *COMMANDS[kind], "-A", app, "worker", *options]
        self.log_path = folder / f"worker-{self.mark[:8]}.log"
        self.env = os.environ | {"PYTHONPATH": str(APPS), "PYTHONDONTWRITEBYTECODE": "1", MARK: self.mark} | (env or {})
        self.folder = folder
        self.process = None

    def start(self, ready=True):
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.env, cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        if ready:
            self.wait_ready()
        return self

    def wait_ready(self, timeout=60):
        def is_ready():
            log = self.log
            if " ready." in log:
                return True
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.describe()}"
            return False

        until(is_ready, lambda: f"ready:\n{self.describe()}", timeout)

    @property
    def pid(self):
        return self.process.pid

    @property
    def log(self):
        return self.log_path.read_text(errors="replace")

    def wait_log(self, text, timeout=30, count=1):
        until(lambda: self.log.count(text) >= count, lambda: f"{text!r} in the log:\n{self.describe()}", timeout)

    def describe(self):
        return f"$ {shlex.join(self.command)}\n{self.log[-6000:]}"

    def processes(self):
        """Living processes of this worker, zombies left out."""
        return [process for process in psutil.process_iter() if belongs(process, self.mark, self.pid)]

    def descendants(self):
        """Living processes of this worker beside the one that was started."""
        return [process for process in self.processes() if process.pid != self.pid]

    def children_running_tasks(self):
        """Pids of the pool's children: the leaves of the tree."""
        parents = {}
        for process in self.descendants():
            with contextlib.suppress(psutil.NoSuchProcess):
                parents[process.pid] = process.ppid()
        return [pid for pid in parents if pid not in parents.values()]

    def kill(self, signum):
        self.process.send_signal(signum)

    def wait(self, timeout=30):
        """Exit status; checks that nothing of the worker is left."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not stopped within {timeout} s:\n{self.describe()}") from None
        until(lambda: not self.processes(), lambda: f"nothing left over: {self.processes()}", 10)
        return status

    def stop(self, signum=signal.SIGTERM, timeout=30):
        self.kill(signum)
        return self.wait(timeout)

    def destroy(self):
        """After a test, whatever its outcome: no process stays."""
        if self.process is None:
            return
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait(10)
