"""Children that take more memory than they may, or are killed for it: what only celeriac does about them."""

import contextlib
import os
import signal
import threading
from pathlib import Path

import pytest
from billiard.exceptions import WorkerLostError
from support.cgroup import limited
from support.control import answer, start
from support.waiting import until

pytestmark = pytest.mark.ours

LEAK = 5_000_000
LIMIT_KIB = 60 * 1024


def private(pid):
    """Bytes that a process has for itself; none when it is gone."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return 0


class Sampler:
    """Looks all the time at how much memory the processes have that left a line in the journal."""

    def __init__(self, stage):
        self.stage = stage
        self.most = 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self):
        while not self.over.wait(0.005):
            for pid in {line["pid"] for line in self.stage.journal()}:
                self.most = max(self.most, private(pid))

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


def test_a_task_that_leaks_passes_the_limit_by_no_more_than_one_leak_and_delays_nobody(stage_on, kind):
    stage = stage_on(kind)
    worker = start(stage, f"--max-memory-per-child={LIMIT_KIB}", app="leaking", concurrency=2)
    with Sampler(stage) as sampler:
        leaks, ticks = [], []
        for number in range(60):
            leaks.append(stage.send("leak", LEAK))
            ticks.append(stage.send("tick", number))
        pids = {leak.get(timeout=60) for leak in leaks}
        assert [tick.get(timeout=60) for tick in ticks] == list(range(60))
    assert LIMIT_KIB * 1024 - 2 * LEAK < sampler.most < LIMIT_KIB * 1024 + 1.05 * LEAK
    assert len(pids) > 2
    told = [line for line in worker.log.splitlines() if "exceeding memory limit" in line]
    assert told
    leaked = {f"leak[{leak.id}]" for leak in leaks}
    for line in told:
        assert any(task in line for task in leaked), line
        assert f"KiB / {LIMIT_KIB}KiB)" in line
        assert " bytes " in line
    assert worker.stop() == 0


def test_a_child_that_is_too_large_ends_its_task_while_another_is_ready_in_its_place(stage_on, kind):
    stage = stage_on(kind)
    worker = start(stage, f"--max-memory-per-child={LIMIT_KIB}", app="leaking", concurrency=1)
    flag = stage.folder / "enough"
    large = stage.send("swell", LIMIT_KIB * 1100, str(flag))
    worker.wait_log("it is replaced when the task has ended")
    [line] = [line for line in worker.log.splitlines() if "exceeding memory limit" in line]
    assert f"swell[{large.id}]" in line
    [old] = answer(stage, "stats")["pool"]["processes"]
    until(lambda: len(worker.children_running_tasks()) == 2, stage.logs)
    [spare] = set(worker.children_running_tasks()) - {old}
    # It is there and takes nothing yet: the pool runs one task at a time.
    waiting = stage.send("leak", 1)
    until(lambda: answer(stage, "reserved"), stage.logs)
    assert not waiting.ready()
    flag.touch()
    assert large.get(timeout=30) == old
    assert waiting.get(timeout=30) == spare
    assert worker.stop() == 0


@pytest.mark.parametrize("options", [["--max-tasks-per-child=1"], ["--max-tasks-per-child=7"]])
def test_children_that_have_run_their_tasks_are_replaced_and_none_runs_more(stage_on, kind, options):
    stage = stage_on(kind)
    worker = start(stage, *options, app="leaking", concurrency=2)
    pids = [stage.send("leak", 1) for _ in range(40)]
    pids = [result.get(timeout=60) for result in pids]
    most = int(options[0].partition("=")[2])
    assert max(pids.count(pid) for pid in pids) <= most
    assert worker.stop() == 0


def test_a_child_that_somebody_kills_is_reported_with_its_task_and_its_memory(stage_on, kind):
    stage = stage_on(kind)
    worker = start(stage, app="leaking")
    victim = stage.send("swell", LEAK, str(stage.folder / "never"))
    [line] = stage.wait_journal("swollen", id=victim.id)
    os.kill(line["pid"], signal.SIGKILL)
    worker.wait_log(f"Task swell[{victim.id}]; it had up to ")
    [line] = [line for line in worker.log.splitlines() if "; it had up to " in line]
    assert f"pid:{stage.journal('swollen')[0]['pid']} " in line
    assert int(line.partition("up to ")[2].split()[0]) > LEAK
    assert stage.send("tick", 1).get(timeout=30) == 1
    assert worker.stop() == 0


def test_a_child_that_the_kernel_kills_for_lack_of_memory_is_reported_with_its_task_and_its_memory(stage_on, kind):
    stage = stage_on(kind)
    limit = 400_000_000
    with limited(stage.queue, limit) as inside:
        worker = start(stage, app="leaking", before=inside)
        victim = stage.send("swell", limit, str(stage.folder / "never"))
        with pytest.raises(WorkerLostError):
            victim.get(timeout=60)
        [line] = [line for line in worker.log.splitlines() if "; it had up to " in line]
        assert "Out of memory: the kernel killed process 'ForkPoolWorker-" in line
        assert f" with Task swell[{victim.id}]; it had up to " in line
        assert int(line.partition("up to ")[2].split()[0]) > limit / 2
        assert f", of {limit // 4096 * 4096} that its control group may have." in line
        assert stage.send("tick", 1).get(timeout=30) == 1
        assert worker.stop() == 0
