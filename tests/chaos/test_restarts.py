"""Restarts as a deployment makes them, under load: nothing is lost, and what had finished runs no second time.

RESTARTS=100     how many (default: small)
CHAOS_SEED=7     repeats a run; the seed of each run is printed
"""

import os
import random
import signal
import threading
import time

import pytest
from support.waiting import PATIENCE, until

RESTARTS = int(os.environ.get("RESTARTS", "6"))
SEED = int(os.environ.get("CHAOS_SEED", str(random.SystemRandom().randrange(2**32))))

#: Most messages on their way: enough for both workers to be busy and to hold prefetched ones.
IN_FLIGHT = 60


class Load:
    """Sends tasks for as long as it is entered, never more than the workers keep up with."""

    def __init__(self, stage, chance):
        self.stage = stage
        self.chance = chance
        self.results = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.send, name="sender", daemon=True)

    def send(self):
        while not self.over.is_set():
            if len(self.results) - len(self.stage.journal("ran")) < IN_FLIGHT:
                for _ in range(20):
                    seconds = self.chance.choice([0, 0, 0.01, 0.05, 0.3])
                    self.results.append(self.stage.send("count", len(self.results), seconds))
            time.sleep(0.05)  # the pace of a producer

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join(PATIENCE)


# The original may not end at all when it is stopped under load on RabbitMQ.
@pytest.mark.ours
@pytest.mark.timeout(120 + 10 * RESTARTS)
@pytest.mark.parametrize("broker", ["redis", "amqp"])
def test_rolling_restarts_lose_nothing_and_repeat_nothing(stage_on, kind, broker):
    print(f"CHAOS_SEED={SEED} RESTARTS={RESTARTS}")
    chance = random.Random(f"{SEED} {broker}")
    stage = stage_on(kind, broker)

    def start():
        return stage.worker("--prefetch-multiplier=8", app="counting", concurrency=2)

    workers = [start(), start()]
    with Load(stage, chance) as load:
        for number in range(RESTARTS):
            before = len(stage.journal("ran"))
            until(lambda n=before: len(stage.journal("ran")) > n + 10, stage.logs)
            old = workers[number % 2]
            assert old.stop() == 0, old.describe()
            workers[number % 2] = start()
    numbers = set(range(len(load.results)))
    until(lambda: {line["number"] for line in stage.journal("ran")} >= numbers, stage.logs, timeout=60)
    for number, result in enumerate(load.results):
        assert result.get(timeout=PATIENCE) == number
    stage.wait_empty()
    for worker in workers:
        assert worker.stop() == 0
    ran = sorted(line["number"] for line in stage.journal("ran"))
    assert ran == sorted(numbers), "each ran once"
    print(f"{len(ran)} tasks over {RESTARTS} restarts")


# The original gives them back once the running task has ended.
@pytest.mark.ours
@pytest.mark.parametrize("broker", ["redis", "amqp"])
def test_a_warm_stop_gives_a_thousand_messages_back_while_the_running_task_goes_on(stage_on, kind, broker):
    stage = stage_on(kind, broker)
    worker = stage.worker("--prefetch-multiplier=1200", app="counting")
    release = stage.folder / "release"
    stage.send("hold", 0, str(release))
    for number in range(1, 1001):
        stage.send("count", number)
    stage.wait_journal("started")
    until(lambda: stage.depth() == 0, lambda: f"{stage.depth()} messages were not fetched")
    told = time.monotonic()
    worker.kill(signal.SIGTERM)
    until(lambda: stage.depth() == 1000, lambda: f"{stage.depth()} messages are back")
    print(f"1,000 messages were back {time.monotonic() - told:.3f} s after TERM")
    assert not stage.journal("ran"), "the running task holds nothing up"
    release.touch()
    assert worker.wait() == 0
    assert [line["number"] for line in stage.journal("ran")] == [0]
    assert stage.depth() == 1000
