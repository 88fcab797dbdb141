"""The worker's connections are cut at random while it works: consuming resumes, and no finished work runs again.

CHAOS_CUTS=100       how often (default: small)
CHAOS_SEED=7         repeats a run; the seed of each run is printed
"""

import os
import random
import signal
import time

import pytest
from support.servers import Redis
from support.waiting import PATIENCE, until

CUTS = int(os.environ.get("CHAOS_CUTS", "15"))
SEED = int(os.environ.get("CHAOS_SEED", str(random.SystemRandom().randrange(2**32))))


def cut(redis, worker, chance):
    """Closes some of the connections that the worker's processes have to Redis, results included."""
    port = redis.connection_pool.connection_kwargs["port"]
    for process in worker.processes():
        for connection in process.net_connections("tcp"):
            if connection.raddr and connection.raddr.port == port and chance.random() < 0.7:
                redis.execute_command(
                    "CLIENT", "KILL", "ADDR", f"{connection.laddr.ip}:{connection.laddr.port}", "SKIPME", "yes"
                )


@pytest.mark.ours
@pytest.mark.timeout(120 + 4 * CUTS)
def test_a_cut_connection_costs_no_task_and_repeats_none(stage_on, kind):
    print(f"CHAOS_SEED={SEED} CHAOS_CUTS={CUTS}")
    chance = random.Random(SEED)
    stage = stage_on(kind)
    worker = stage.worker("--prefetch-multiplier=8", app="counting", concurrency=2)
    redis = stage.redis()
    sent = []
    for _ in range(CUTS):
        for _ in range(chance.randrange(5, 30)):
            countdown = chance.choice([None, None, None, 0.5, 5])
            sent.append(stage.send("count", len(sent), chance.choice([0, 0, 0.01, 0.2]), countdown=countdown))
        time.sleep(chance.uniform(0, 0.5))  # not to wait for something: the moment of the cut is the point
        cut(redis, worker, chance)

    def missing():
        ran = {line["number"] for line in stage.journal("ran")}
        return f"{sorted(set(range(len(sent))) - ran)} never ran, seed {SEED}\n{worker.describe()}"

    until(lambda: {line["number"] for line in stage.journal("ran")} >= set(range(len(sent))), missing, timeout=90)
    assert [result.get(timeout=PATIENCE) for result in sent] == list(range(len(sent)))
    stage.wait_empty()
    assert stage.app.control.ping(timeout=5), "remote control answers again"
    assert worker.stop() == 0
    ran = sorted(line["number"] for line in stage.journal("ran"))
    assert ran == list(range(len(sent))), f"repeated: {sorted(n for n in set(ran) if ran.count(n) > 1)}, seed {SEED}"
    print(f"{len(sent)} tasks")


@pytest.mark.ours
@pytest.mark.timeout(180)
@pytest.mark.parametrize("outage", ["frozen", "restarted"])
def test_an_outage_of_the_server_repeats_nothing(stage_on, kind, tmp_path, outage):
    """Two workers; neither takes the other for dead because the server was away."""
    folder = tmp_path / "redis"
    folder.mkdir()
    with Redis(folder) as server:
        stage = stage_on(kind, server.url, server.url)
        workers = [stage.worker("--prefetch-multiplier=4", app="counting", concurrency=2) for _ in range(2)]
        sent = [stage.send("slow", number, 3.0) for number in range(12)]
        stage.wait_journal("started", count=4)
        if outage == "frozen":
            os.killpg(server.process.pid, signal.SIGSTOP)
        else:
            stage.redis().save()
            server.stop(signal.SIGKILL)
        for worker in workers:
            worker.wait_log("onnection to broker lost", timeout=60)
        if outage == "frozen":
            os.killpg(server.process.pid, signal.SIGCONT)
        else:
            server.start()
        until(lambda: {line["number"] for line in stage.journal("ran")} >= set(range(12)), stage.logs, 90)
        assert [result.get(timeout=PATIENCE) for result in sent] == list(range(12))
        stage.wait_empty()
        assert [worker.stop() for worker in workers] == [0, 0]
        assert sorted(line["number"] for line in stage.journal("ran")) == list(range(12))
