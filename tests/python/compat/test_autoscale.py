"""The size of the pool: by the number of tasks, by the processors there are, by remote control."""

import re

import pytest
from celery.utils import sysinfo
from support.control import answer, start
from support.lines import plain
from support.waiting import until


def scaled(worker, way):
    """Processes that the log says were added, or taken away."""
    return sum(int(count) for count in re.findall(rf"Scaling {way} (\d+) processes\.", worker.log))


def processes(stage, count):
    until(lambda: len(answer(stage, "stats")["pool"]["processes"]) == count, stage.logs)


def test_the_pool_follows_the_number_of_tasks_between_two_bounds(alike):
    def followed(stage):
        worker = start(stage, "--autoscale=3,1", app="controlled", env={"AUTOSCALE_KEEPALIVE": "2"})
        found = {"at first": answer(stage, "stats")["autoscaler"]}
        found["prefetch"] = answer(stage, "stats")["prefetch_count"]
        found["banner"] = "concurrency: {min=1, max=3} (prefork)" in worker.log
        running = [stage.send("hold", 3) for _ in range(5)]
        stage.wait_journal("started", 3)
        processes(stage, 3)
        found["at work"] = answer(stage, "stats")["autoscaler"]
        found["up"] = scaled(worker, "up")
        found["results"] = [result.get(timeout=30) for result in running]
        processes(stage, 1)
        found["at rest"] = answer(stage, "stats")["autoscaler"]
        found["down"] = scaled(worker, "down")
        return found | {"status": worker.stop()}

    seen = alike(followed)
    assert seen["at first"] == {"max": 3, "min": 1, "current": 1, "qty": 0}
    assert seen["at work"] == {"max": 3, "min": 1, "current": 3, "qty": 5}
    assert (seen["up"], seen["down"], seen["prefetch"], seen["status"]) == (2, 2, 12, 0)


def test_the_bounds_are_changed_from_afar_and_the_size_is_not(alike):
    def changed(stage):
        worker = start(stage, "--autoscale=3,1", app="controlled")
        found = {
            "grow": answer(stage, "pool_grow", n=1),
            "shrink": answer(stage, "pool_shrink"),
            "asked": answer(stage, "autoscale"),
            "more": answer(stage, "autoscale", max=5, min=4),
        }
        processes(stage, 4)
        found["shown"] = answer(stage, "stats")["autoscaler"]
        found["prefetch"] = answer(stage, "stats")["prefetch_count"]
        found["less"] = answer(stage, "autoscale", max=2, min=1)
        processes(stage, 2)
        found["then"] = answer(stage, "stats")["autoscaler"]
        found["scaled"] = [scaled(worker, "up"), scaled(worker, "down")]
        return found | {"status": worker.stop()}

    seen = alike(changed)
    assert seen["more"] == {"ok": "autoscale now max=5 min=4"}
    assert "not supported with autoscale" in seen["grow"]["error"]
    assert (seen["prefetch"], seen["scaled"]) == (20, [3, 2])


@pytest.mark.ours
def test_a_pool_of_no_processes_grows_with_the_first_task(stage_on, kind):
    """The original lets the first task wait for a second."""
    stage = stage_on(kind)
    worker = start(stage, "--autoscale=2", app="controlled", concurrency=0)
    assert answer(stage, "stats")["autoscaler"] == {"max": 2, "min": 0, "current": 0, "qty": 0}
    assert stage.send("mark", 7).get(timeout=30) == 7
    assert answer(stage, "stats")["autoscaler"]["current"] == 1
    assert worker.stop() == 0


@pytest.mark.skipif(not hasattr(sysinfo, "cpu_budget"), reason="before Celery 5.7 there is no `auto`")
@pytest.mark.parametrize(
    ("own", "quotas"),
    [
        ("0::/pod/one\n", {"pod/one/cpu.max": "max 100000", "pod/cpu.max": "150000 100000"}),
        ("3:cpu,cpuacct:/job\n", {"cpu/job/cpu.cfs_quota_us": "50000", "cpu/job/cpu.cfs_period_us": "100000"}),
        ("0::/\n", {}),
    ],
)
def test_the_automatic_size_is_that_of_the_control_group(alike, own, quotas):
    def sized(stage):
        box = stage.folder / "box"
        box.mkdir()
        (box / "own").write_text(own)
        for name, text in quotas.items():
            (box / name).parent.mkdir(parents=True, exist_ok=True)
            (box / name).write_text(text + "\n")
        worker = stage.worker(app="boxed", concurrency="auto", env={"BOX": str(box)})
        lines = [line.partition("] ")[2] for line in worker.log.splitlines() if "worker_concurrency='auto'" in line]
        [banner] = re.findall(r"concurrency: (.*)", worker.log)
        return [plain(repr(lines)), banner, worker.stop()]

    assert "resolved to" in alike(sized)[0]
