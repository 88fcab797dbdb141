"""No task waits behind a long one, however many lie ready."""

import pytest
from support.waiting import until

pytestmark = pytest.mark.ours


@pytest.mark.parametrize("broker", ["redis", "amqp"])
@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
def test_short_tasks_end_while_a_long_one_runs_whatever_lay_behind_it(stage_on, kind, broker, late):
    stage = stage_on(kind, broker, worker_prefetch_multiplier=64, task_acks_late=late)
    stage.worker(app="fairness", concurrency=2)
    flag = stage.folder / "enough"
    # It looks like a short one among many, of the same name.
    for number in range(40):
        stage.send("work", number)
    long = stage.send("work", -1, str(flag))
    for number in range(40, 140):
        stage.send("work", number)
    until(lambda: len(stage.journal("worked")) == 140, stage.logs)
    assert not long.ready()
    flag.touch()
    assert long.get(timeout=30) == -1
    numbers = sorted(line["number"] for line in stage.journal("worked"))
    assert numbers == list(range(-1, 140)), "each ran once"


def test_a_task_that_is_revoked_before_it_begins_does_not_run_though_it_lay_ready(stage_on, kind):
    stage = stage_on(kind, worker_prefetch_multiplier=64)
    worker = stage.worker(app="fairness", concurrency=1)
    flag = stage.folder / "enough"
    long = stage.send("work", -1, str(flag))
    until(lambda: stage.journal("works"), stage.logs)
    waiting = [stage.send("work", number) for number in range(20)]
    worker.wait_log(f"Task work[{waiting[-1].id}] received")
    stage.app.control.revoke([result.id for result in waiting[::2]], reply=True, timeout=5)
    flag.touch()
    until(lambda: len(stage.journal("worked")) == 11, stage.logs)
    assert long.get(timeout=30) == -1
    assert sorted(line["number"] for line in stage.journal("worked")) == [-1, *range(1, 20, 2)]
