"""Log lines: settings of logging, redirected output, files, colours."""

import json
import os
import pty
import re
import subprocess

import pytest
from support.lines import lines, plain
from support.waiting import until
from support.worker import WorkerProcess

APP = "chatty"


def of_task(stage, *options, text=None, **worker):
    """What the worker writes about one task that prints and logs, made comparable."""
    # Who logs to a file, or little, does not say that it is ready.
    stage.worker(*options, app=APP, ready=False, **worker)
    stage.send("chat").get(timeout=30)
    end = stage.send("fail")
    end.get(timeout=30, propagate=False)
    assert stage.workers[-1].stop() == 0
    return text(stage) if text else stage.workers[-1].log


def kept(log):
    """Lines that come of the tasks; the terminal's own lines have no head and no process."""
    words = ("printed", "complained", "noted", "whispered", "warned", "Task chat", "Task fail")
    return sorted(plain(line) for line in stamped(log).splitlines() if any(word in line for word in words))


def stamped(log):
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", "<time>", log)


@pytest.mark.parametrize(
    "conf",
    [
        {},
        {"worker_redirect_stdouts": False},
        {"worker_redirect_stdouts_level": "ERROR"},
        {"worker_log_format": "LINE %(levelname)s %(name)s %(process)d %(message)s"},
        {"worker_log_format": "LINE %(levelname)-8s %(name)s %(message)s"},
        {"worker_task_log_format": "TASK %(task_name)s %(levelname)s %(message)s"},
        {"worker_log_color": True},
        {"worker_log_color": False},
    ],
    ids=str,
)
def test_settings_of_logging_shape_the_lines_of_parent_and_child(alike, conf):
    def chat(stage):
        log = of_task(stage)
        return [re.sub(r"(LINE \w+ [\w.]+) \d+", r"\1 <pid>", line) for line in kept(log)]

    seen = alike(chat, **conf)
    assert any("warned" in line for line in seen)
    assert any("Task chat[<id>] received" in line for line in seen)


@pytest.mark.parametrize("hijack", [True, False])
def test_a_root_handler_of_the_app_is_kept_where_it_is_not_to_be_hijacked(alike, hijack):
    def chat(stage):
        return kept(of_task(stage, env={"OWN_HANDLER": "1"}))

    seen = alike(chat, worker_hijack_root_logger=hijack)
    assert any(line.startswith("OWN ") for line in seen) is not hijack


@pytest.mark.parametrize("level", ["debug", "warning", "ERROR"])
def test_the_level_holds_in_parent_and_child(alike, level):
    def chat(stage):
        return kept(of_task(stage, f"--loglevel={level}"))

    seen = alike(chat)
    assert any("whispered" in line for line in seen) is (level == "debug")


@pytest.mark.parametrize("name", ["%n.log", "%n%I.log", "%n-%i.log", "%h-%d.log"])
def test_the_name_of_the_log_file_is_filled_in_for_each_process(alike, name):
    def chat(stage):
        def text(stage):
            files = {path.name: path.read_text() for path in stage.folder.glob("*.log") if "worker-" not in path.name}
            return {file: sorted({process for _, process, _ in lines(log)}) for file, log in files.items()}

        return of_task(stage, f"--logfile={stage.folder}/{name}", text=text)

    seen = alike(chat)
    assert len(seen) == (2 if "i" in name.lower() else 1)


def test_a_log_file_that_was_moved_away_is_written_anew_by_parent_and_child(alike):
    def rotate(stage):
        file = stage.folder / "rotated.log"
        worker = stage.worker(f"--logfile={file}", app=APP, ready=False)
        stage.send("chat").get(timeout=30)
        until(lambda: "Task chat" in file.read_text() and "succeeded" in file.read_text(), file.read_text)
        file.rename(f"{file}.1")
        stage.send("chat").get(timeout=30)
        stage.send("nothing")
        assert worker.stop() == 0
        return [line for line in kept(file.read_text()) if "KeyError" not in line]

    seen = alike(rotate)
    for part in ("MainProcess] Task chat[<id>] received", "Worker-<n>] Task chat[<id>] succeeded", "noted", "printed"):
        assert any(part in line for line in seen), seen


def test_only_a_terminal_gets_colours(kinds, stage_on):
    shown = {}
    for kind in kinds:
        stage = stage_on(kind)
        terminal, theirs = pty.openpty()
        worker = OnTerminal(kind, stage, theirs)
        stage.workers.append(worker)
        worker.start(ready=False)
        os.close(theirs)
        output = b""
        stage.send("fail")
        while b"Traceback" not in output:
            output += os.read(terminal, 4096)
        assert worker.stop() == 0
        os.close(terminal)
        line = next(line for line in output.decode().splitlines() if "raised unexpected" in line)
        shown[kind] = re.sub(r"pid:\d+", "", plain(stamped(line)))
    assert len(set(shown.values())) == 1, shown
    assert "\x1b[1;31m" in next(iter(shown.values()))


class OnTerminal(WorkerProcess):
    """A worker whose standard error is a terminal."""

    def __init__(self, kind, stage, terminal):
        env = {"APP_CONF": json.dumps(stage.conf), "JOURNAL": str(stage.journal_path), "C_FORCE_ROOT": "1"}
        options = ["-l", "INFO", "-c", "1", "--without-mingle", "--without-gossip", "-n", "w@here"]
        super().__init__(kind, APP, options, stage.folder, env)
        self.terminal = terminal

    def start(self, ready=True):
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.env, cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=log, stderr=self.terminal, start_new_session=True,
            )  # fmt: skip
        return self
