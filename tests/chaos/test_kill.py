"""`kill -9` at random, while tasks run with late acks: every task id is accounted for, none is lost.

CHAOS_KILLS=200      how many processes are killed (default: small)
CHAOS_SEED=7         repeats a run; the seed of each run is printed
"""

import os
import random
import signal
import time

import psutil
import pytest
from support.waiting import PATIENCE, until

KILLS = int(os.environ.get("CHAOS_KILLS", "10"))
SEED = int(os.environ.get("CHAOS_SEED", str(random.SystemRandom().randrange(2**32))))

# A dead worker's messages must run again within this, without waiting for the visibility timeout of an hour.
ORPHANS_BACK = 15.0

ROLES = ("child", "zygote", "supervisor")


def victims(worker, role):
    """Pids of the worker's processes in this role."""
    if role == "supervisor":
        return [worker.pid]
    everyone = worker.descendants()
    parents = {process.ppid() for process in everyone}
    if role == "zygote":
        return [process.pid for process in everyone if process.pid in parents and process.pid != worker.pid]
    return [process.pid for process in everyone if process.pid not in parents]


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.timeout(120 + 6 * KILLS)
@pytest.mark.parametrize("broker", ["redis", "amqp", "filesystem"])
def test_no_task_is_lost_whoever_is_killed(stage_on, kind, broker):
    if kind == "celery" and broker == "redis":
        pytest.skip("the original's messages come back after the visibility timeout only")
    if kind == "celery" and broker == "filesystem":
        pytest.skip("the original keeps what it holds in memory only")
    print(f"CHAOS_SEED={SEED} CHAOS_KILLS={KILLS}")
    chance = random.Random(f"{SEED} {broker}")
    stage = stage_on(kind, broker, "file" if broker == "filesystem" else "redis")

    def start():
        return stage.worker("--prefetch-multiplier=8", app="counting", concurrency=2)

    worker = start()
    # The original has no zygote: its supervisor forks.
    roles = ROLES if kind == "celeriac" else ("child", "supervisor")
    sent, killed = [], dict.fromkeys(roles, 0)
    while (number := sum(killed.values())) < KILLS:
        for _ in range(chance.randrange(5, 30)):
            sent.append(stage.send("count", len(sent), chance.choice([0, 0, 0.01, 0.1])))
        time.sleep(chance.uniform(0, 0.3))  # not to wait for something: the moment of the blow is the point
        role = roles[number % len(roles)] if KILLS < 30 else chance.choice(roles)
        pids = victims(worker, role)
        if pids and kill(chance.choice(sorted(pids))):
            killed[role] += 1
        # Whoever ends because another was killed is started again, as systemd would.
        if role == "supervisor":
            worker.wait()
        if worker.process.poll() is not None:
            worker.wait()
            worker = start()

    def all_ran():
        nonlocal worker
        if worker.process.poll() is not None:
            worker.wait()
            worker = start()
        return {line["number"] for line in stage.journal("ran")} >= set(range(len(sent)))

    def missing():
        ran = {line["number"] for line in stage.journal("ran")}
        return f"{sorted(set(range(len(sent))) - ran)} never ran; killed {killed}, seed {SEED}\n{worker.describe()}"

    until(all_ran, missing, timeout=max(60, 2 * KILLS))
    for result in sent:
        until(lambda r=result: r.state == "SUCCESS", lambda r=result: f"{r.id}: {r.state}, seed {SEED}")
    stage.wait_empty()
    assert worker.stop() == 0
    assert all(killed.values()), "each role was hit"
    if broker == "redis":
        assert_no_key_is_left(stage)
    again = len(stage.journal("ran")) - len(sent)
    print(f"{len(sent)} tasks, killed {killed}, {again} runs were repeated")


def assert_no_key_is_left(stage):
    """Beside results and the bindings that every worker leaves there is nothing."""
    expected = ("celery-task-meta-", "_kombu.binding")
    left = [key.decode() for key in stage.redis().keys("*")]
    assert [key for key in left if not key.startswith(expected)] == []


@pytest.mark.ours
def test_what_a_killed_worker_held_runs_again_within_seconds(stage_on, kind):
    stage = stage_on(kind)
    other = stage.worker(app="counting", concurrency=2)
    dies = stage.worker("--prefetch-multiplier=4", app="counting", concurrency=2)
    sent = [stage.send("slow", number, 1.0) for number in range(16)]
    stage.wait_journal("started", count=4)
    held = len(stage.unacked())
    assert held > 4, "both workers hold messages"
    dies.kill(signal.SIGKILL)
    dies.wait()
    killed_at = time.time()
    until(lambda: {line["number"] for line in stage.journal("ran")} >= set(range(16)), stage.logs, timeout=60)
    starts = [line["time"] for line in stage.journal("started") if line["time"] > killed_at]
    # Sixteen seconds of work for two children at most; the orphans' own delay must not be added to an hour.
    assert max(starts) - killed_at < ORPHANS_BACK + 8
    assert all(result.get(timeout=PATIENCE) == number for number, result in enumerate(sent))
    stage.wait_empty()
    assert other.stop() == 0


@pytest.mark.ours
def test_a_frozen_worker_that_thaws_does_no_harm(stage_on, kind):
    """Its messages went to another one; what it still says about them changes nothing."""
    stage = stage_on(kind)
    frozen = stage.worker(app="counting")
    sent = [stage.send("slow", number, 2.0) for number in range(2)]
    stage.wait_journal("started")
    processes = frozen.processes()
    for process in processes:
        process.suspend()
    other = stage.worker(app="counting")
    until(lambda: len({line["number"] for line in stage.journal("ran")}) == 2, stage.logs, timeout=60)
    for process in processes:
        process.resume()
    assert [result.get(timeout=PATIENCE) for result in sent] == [0, 1]
    stage.wait_empty()
    assert stage.send("count", 9).get(timeout=PATIENCE) == 9
    assert frozen.stop() == 0
    assert other.stop() == 0
    assert_no_key_is_left(stage)


def test_children_end_with_their_supervisor_however_it_dies(stage_on, kind):
    stage = stage_on(kind)
    worker = stage.worker(concurrency=3)
    before = worker.descendants()
    assert len(before) >= 3
    worker.kill(signal.SIGKILL)
    worker.wait()
    assert not any(psutil.pid_exists(process.pid) and process.status() != "zombie" for process in before)


@pytest.mark.ours
def test_pipes_do_not_pile_up_as_children_die(stage_on, kind):
    stage = stage_on(kind)
    worker = stage.worker(concurrency=2)

    def descriptors():
        return sum(process.num_fds() for process in worker.processes())

    stage.send("add", 1, 1).get(timeout=PATIENCE)
    before = descriptors()
    for _ in range(20):
        until(stage.send("kill_self").ready, stage.logs)
    stage.send("add", 1, 1).get(timeout=PATIENCE)
    until(lambda: descriptors() <= before + 8, lambda: f"{descriptors()} descriptors, {before} before")


def test_a_restarted_broker_is_found_again_and_no_task_is_lost(stage_on, kind, tmp_path):
    from support.servers import RabbitMq

    (tmp_path / "node").mkdir()
    with RabbitMq(tmp_path / "node") as server:
        stage = stage_on(kind, server.url, "redis")
        worker = stage.worker(app="counting", concurrency=2)
        sent = [stage.send("slow", number, 0.5) for number in range(12)]
        stage.wait_journal("ran", count=2)
        server.stop()
        worker.wait_log("onnection")
        server.start()
        until(lambda: {line["number"] for line in stage.journal("ran")} >= set(range(12)), stage.logs, 90)
        assert sorted(result.get(timeout=PATIENCE) for result in sent) == list(range(12))
        assert stage.send("count", 99).get(timeout=PATIENCE) == 99
        assert worker.stop() == 0


@pytest.mark.timeout(120)
def test_a_task_longer_than_the_visibility_timeout_runs_once(stage_on, kind):
    """Timeout 5 s, tasks of 20 s, an eta 30 s ahead, and a worker of the original on the same queue."""
    if kind == "celery":
        pytest.skip("the original runs them several times: that is what is mended")
    options = {"visibility_timeout": 5}
    stage = stage_on(kind, broker_transport_options=options)
    ours = stage.worker(app="counting", concurrency=2)
    sent = [stage.send("slow", number, 20.0) for number in range(2)]
    stage.wait_journal("started", count=2)
    far = stage.send("count", 7, countdown=30)
    until(lambda: far.id in ours.log, ours.describe)
    theirs = stage.worker(app="counting", concurrency=2, kind="celery")
    assert [result.get(timeout=60) for result in sent] == [0, 1]
    assert far.get(timeout=60) == 7
    stage.wait_empty()
    assert theirs.stop() == 0
    assert ours.stop() == 0
    ran = sorted(line["number"] for line in stage.journal("ran"))
    assert ran == [0, 1, 7]
