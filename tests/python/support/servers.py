"""Private servers on free ports with folders of their own, stopped when the test session ends."""

import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import redis
from kombu import Connection

from support.waiting import until


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def find(command):
    """Path of a server, or a skipped test; with CI=true a failed one."""
    path = shutil.which(command, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/lib/rabbitmq/bin")
    if path is None:
        missing = f"{command} is not installed: `make test` installs it"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return path


class Server:
    """A process that listens on a port of 127.0.0.1."""

    stop_signal = signal.SIGTERM

    def __init__(self, folder: Path):
        self.folder = folder
        self.port = free_port()
        self.log = folder / "server.log"
        self.process = None

    def command(self):
        raise NotImplementedError

    def environment(self):
        return dict(os.environ)

    def answers(self):
        raise NotImplementedError

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), env=self.environment(), cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        until(self._is_up, lambda: f"{type(self).__name__} to start:\n{self.log.read_text()}", timeout=90)
        return self

    def _is_up(self):
        assert self.process.poll() is None, f"{type(self).__name__} ended:\n{self.log.read_text()}"
        return self.answers()

    def stop(self, how=None):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, how or self.stop_signal)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(10)

    def __enter__(self):
        return self.start()

    def __exit__(self, *_):
        self.stop()


class Redis(Server):
    def command(self):
        return [find("redis-server"), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
                "--appendonly", "no", "--dir", str(self.folder)]  # fmt: skip

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self):
        return redis.Redis(port=self.port, decode_responses=True)

    def answers(self):
        try:
            return self.client().ping()
        except redis.ConnectionError:
            return False


class RabbitMq(Server):
    """A node with its own name, cookie, folders and epmd, so that it meets no other node of the machine."""

    def __init__(self, folder):
        super().__init__(folder)
        self.epmd_port = free_port()
        self.dist_port = free_port()
        self.epmd = None

    def environment(self):
        return os.environ | {
            "HOME": str(self.folder),
            "ERL_EPMD_PORT": str(self.epmd_port),
            "RABBITMQ_NODENAME": f"celeriac-{self.port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self.dist_port),
            "RABBITMQ_MNESIA_BASE": str(self.folder / "data"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(self.folder / "none"),
            "RABBITMQ_CONF_ENV_FILE": str(self.folder / "none"),
            "RABBITMQ_PID_FILE": str(self.folder / "pid"),
            # One scheduler that does not spin: the tests need the processors themselves.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none",
        }

    def command(self):
        # Debian's command in sbin starts the node as another user; the script behind it does not.
        script = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
        found = find("rabbitmq-server")
        return [str(script) if script.exists() else found]

    def start(self):
        (self.folder / "plugins").write_text("[].\n")
        find("rabbitmq-server")
        if self.epmd is None:
            self.epmd = subprocess.Popen(
                [find("epmd"), "-address", "127.0.0.1", "-port", str(self.epmd_port)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        return super().start()

    def __exit__(self, *_):
        self.stop()
        if self.epmd:
            self.epmd.terminate()
            self.epmd.wait(10)

    @property
    def url(self):
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def add_vhost(self, name):
        """A virtual host of its own, for those whose queues have the same names as another's; its URL."""
        for words in (["add_vhost", name], ["set_permissions", "-p", name, "guest", ".*", ".*", ".*"]):
            self.control(*words)
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{name}"

    def control(self, *words):
        """What `rabbitmqctl` prints."""
        script = Path("/usr/lib/rabbitmq/bin/rabbitmqctl")
        command = [str(script) if script.exists() else find("rabbitmqctl"), "-q", *words]
        done = subprocess.run(
            command, env=self.environment(), cwd=self.folder, check=True, timeout=60, stdout=subprocess.PIPE
        )
        return done.stdout

    def listed(self, vhost, what, *columns):
        """Rows of `rabbitmqctl list_…`."""
        return json.loads(self.control(f"list_{what}", "-p", vhost, "--formatter", "json", *columns))

    def answers(self):
        try:
            with Connection(self.url, connect_timeout=5) as connection:
                connection.connect()
            return True
        except Exception:  # whatever a node that is half up answers
            return False


class Memcached(Server):
    def command(self):
        user = ["-u", "nobody"] if os.geteuid() == 0 else []
        return [find("memcached"), "-l", "127.0.0.1", "-p", str(self.port), "-U", "0", *user]

    @property
    def url(self):
        return f"cache+memcached://127.0.0.1:{self.port}/"

    def answers(self):
        try:
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        except OSError:
            return False
