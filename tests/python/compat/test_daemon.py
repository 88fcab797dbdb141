"""The worker as a service: pidfiles, `multi`, `--detach`, titles of processes."""

import os
import re
import signal
import stat
from pathlib import Path

import psutil
import pytest
from support.command import run
from support.waiting import until

CHILDREN = "/proc/{0}/task/{0}/children"

# The ways to a worker that runs in the background: Celery's own, and the two doors.
DOORS = {
    "celery": ("celery", {}),
    "celeriac": ("celeriac", {}),
    "celeriac, the other door": ("celery", {"CELERIAC": "1"}),
}


@pytest.fixture(params=DOORS)
def door(request, tmp_path, kinds):
    """Runs commands in the test's folder; workers that are left over are killed."""
    program, env = DOORS[request.param]
    if request.param.split(",")[0] not in kinds:
        pytest.skip("not asked for")

    def go(*words, **more):
        return run(program, *words, cwd=tmp_path, **env, **more)

    go.folder = tmp_path
    go.worker = "celeriac.worker" if request.param != "celery" else "celery.apps.worker"
    yield go
    for pidfile in tmp_path.glob("*.pid"):
        pid = pidfile.read_text().strip()
        if pid.isdigit() and Path(f"/proc/{pid}").exists():
            os.kill(int(pid), signal.SIGKILL)


def text(file):
    return file.read_text() if file.exists() else ""


def is_ready(door, name, count=1):
    log = door.folder / f"{name}.log"
    until(lambda: text(log).count(" ready.") >= count, lambda: text(log) or f"no {log}")
    return int((door.folder / f"{name}.pid").read_text())


def gone(door, *pids):
    alive = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    until(
        lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids),
        lambda: f"{alive} are gone\n" + "\n".join(text(log) for log in door.folder.glob("*.log")),
    )


def test_multi_starts_restarts_and_stops_workers_of_the_door(door):
    files = [f"--pidfile={door.folder}/%n.pid", f"--logfile={door.folder}/%n.log"]
    words = ["m1", "m2", "-A", "living", "-l", "INFO", "-c", "1", "-Q:m2", "other", *files]
    done = door("multi", "start", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    first = [is_ready(door, name) for name in ("m1", "m2")]
    for name in ("m1", "m2"):
        assert f"CLASS {door.worker}" in text(door.folder / f"{name}.log")
    done = door("multi", "restart", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    second = [is_ready(door, name, count=2) for name in ("m1", "m2")]
    assert not set(first) & set(second)
    gone(door, *first)
    assert door("multi", "stopwait", "m1", "m2", *files).returncode == 0
    gone(door, *second)
    assert not list(door.folder.glob("*.pid"))


def test_a_detached_worker_has_the_python_and_the_mask_it_was_given(door):
    python = door.folder / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {door.folder}/executed\nexec {os.sys.executable} "$@"\n')
    python.chmod(0o755)
    options = ["-l", "INFO", "-c", "1", "-f", "%n.log", "--pidfile", "%n.pid", "-n", "bg@h"]
    done = door("-A", "living", "worker", "-D", *options, "--executable", str(python), "--umask", "027")
    assert done.returncode == 0, done.stderr
    pid = is_ready(door, "bg")
    assert "-A living worker" in text(door.folder / "executed")
    assert stat.S_IMODE((door.folder / "bg.log").stat().st_mode) == 0o640
    assert os.getsid(pid) != os.getsid(0)
    assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
    os.kill(pid, signal.SIGTERM)
    gone(door, pid)
    assert not (door.folder / "bg.pid").exists()


def test_a_detached_worker_restarts_on_hangup_with_the_same_pid(door):
    if door.worker == "celery.apps.worker":
        pytest.skip("becomes `python celery/__main__.py`, which ends with an ImportError")
    options = ["-l", "INFO", "-c", "1", "-f", "%n.log", "--pidfile", "%n.pid", "-n", "bg@h"]
    assert door("-A", "living", "worker", "-D", *options).returncode == 0
    pid = is_ready(door, "bg")
    children = Path(CHILDREN.format(pid)).read_text()
    os.kill(pid, signal.SIGHUP)
    assert is_ready(door, "bg", count=2) == pid
    assert Path(CHILDREN.format(pid)).read_text() != children
    os.kill(pid, signal.SIGTERM)
    gone(door, pid)
    assert not (door.folder / "bg.pid").exists()


@pytest.mark.parametrize(
    "content", ["999999999\n", "nonsense\n", "12", ""], ids=["stale", "no number", "no line", "empty"]
)
def test_a_pidfile_of_no_process_is_taken_over(alike, content):
    def take_over(stage):
        pidfile = stage.folder / "w.pid"
        pidfile.write_text(content)
        worker = stage.worker(f"--pidfile={pidfile}")
        mine = pidfile.read_text() == f"{worker.pid}\n"
        said = [line for line in worker.log.splitlines() if "pidfile" in line]
        assert worker.stop() == 0
        return {"mine": mine, "said": said, "left": pidfile.exists()}

    assert alike(take_over)["mine"]


def test_the_pidfile_outlives_the_children(alike):
    def outlive(stage):
        pidfile = stage.folder / "w.pid"
        worker = stage.worker(f"--pidfile={pidfile}", "--max-tasks-per-child=1")
        for number in range(3):
            stage.send("add", number, 1).get(timeout=30)
        stage.send("kill_self").get(timeout=30, propagate=False)
        stage.send("add", 1, 1).get(timeout=30)
        there = pidfile.exists()
        assert worker.stop() == 0
        return [there, pidfile.exists()]

    assert alike(outlive) == [True, False]


def test_processes_have_the_titles_that_operators_look_for(alike):
    pytest.importorskip("setproctitle") if not os.environ.get("CI") else __import__("setproctitle")

    def titles(stage):
        worker = stage.worker("-B", "-s", f"{stage.folder}/due", concurrency=2)
        worker.wait_log("beat: Starting...")
        until(lambda: len(shown(worker)) >= 4, lambda: f"{shown(worker)}")
        seen = shown(worker)
        assert worker.stop() == 0
        # One more process than Celery has.
        # One more process than Celery has, where beat takes a number from the children.
        return sorted(
            re.sub(r"Worker-\d+", "Worker-<n>", title)
            for title in seen
            if not title.startswith("[celeryd: w0@here:zygote]")
        )

    seen = [title.split(" worker ")[0].replace("(worker", "(") for title in alike(titles)]
    assert [title.split("]")[0] for title in seen] == [
        "[celery beat",
        "[celeryd: w0@here:ForkPoolWorker-<n>",
        "[celeryd: w0@here:ForkPoolWorker-<n>",
        "[celeryd: w0@here:MainProcess",
    ]


def shown(worker):
    """The titles of all processes of the worker that have set theirs."""
    pids = [worker.pid, *(child.pid for child in psutil.Process(worker.pid).children(recursive=True))]
    lines = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip() for pid in pids]
    return [line.replace(str(worker.folder), "…") for line in lines if line.startswith("[")]
