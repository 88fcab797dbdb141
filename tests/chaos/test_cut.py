"""The worker's connections are cut at random while it works: consuming resumes, and no finished work runs again.

CHAOS_CUTS=100       how often (default: small)
CHAOS_SEED=7         repeats a run; the seed of each run is printed
"""

import os
import random
import time

import pytest
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
