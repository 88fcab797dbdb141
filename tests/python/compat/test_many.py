"""Many mixed tasks: the same states and results under either worker and in a fleet of both.

MANY=10000      how many (default: small)
"""

import os
import random
from collections import Counter

import pytest
from support.lines import plain
from support.waiting import until

MANY = int(os.environ.get("MANY", "400"))


def calls(count):
    """The same mixture at each run."""
    chance = random.Random(5)
    kinds = [
        ("add", lambda n: (n, n), {}),
        ("echo", lambda n: (n, "x" * (n % 100)), {}),
        ("fail", lambda n: (f"no {n % 7}",), {}),
        ("fail_late", lambda n: (f"late {n % 7}",), {}),
        ("late_mark", lambda n: (n,), {}),
        ("retry_twice", lambda n: (0.05,), {}),
        ("retry_in_vain", lambda n: (), {}),
        ("expected", lambda n: (), {}),
        ("progress", lambda n: (), {}),
        ("mark", lambda n: (n,), {"countdown": 0.5}),
        ("add", lambda n: (n, 1), {"expires": 600}),
        ("add", lambda n: (n, 2), {"serializer": "pickle"}),
    ]
    weights = [8, 4, 3, 2, 6, 1, 1, 1, 1, 2, 2, 1]
    for number in range(count):
        name, arguments, options = chance.choices(kinds, weights)[0]
        yield name, arguments(number), options


def run(stage, kinds):
    workers = [stage.worker(concurrency=2, kind=kind) for kind in kinds]
    with stage.app.producer_pool.acquire() as producer:
        sent = [stage.send(name, *args, producer=producer, **options) for name, args, options in calls(MANY)]
    client = stage.app.backend
    ended = {}

    def rest():
        for result in [r for r in sent if r.id not in ended]:
            document = client.get_task_meta(result.id, cache=False)
            if document["status"] in ("SUCCESS", "FAILURE"):
                ended[result.id] = [document["status"], plain(repr(document["result"]))]
        return len(ended) == len(sent)

    until(rest, lambda: f"{len(ended)} of {len(sent)} ended\n{stage.logs()}", timeout=60 + MANY / 20, every=0.2)
    stage.wait_empty()
    took_part = [" succeeded in " in worker.log for worker in workers]
    statuses = [worker.stop() for worker in workers]
    ran = Counter(line["number"] for line in stage.journal("ran"))
    return {
        "ends": [ended[result.id] for result in sent],
        "ran twice": [number for number, times in ran.items() if times > 1],
        "statuses": statuses,
        "took part": took_part,
    }


@pytest.mark.timeout(120 + MANY // 4)
@pytest.mark.parametrize("broker", ["redis", "amqp"])
def test_many_mixed_tasks_end_the_same_way(alike, broker):
    seen = alike(lambda stage: run(stage, [stage.kind]), broker, accept_content=["json", "pickle"])
    assert Counter(state for state, _ in seen["ends"]).keys() == {"SUCCESS", "FAILURE"}
    assert seen["ran twice"] == []


@pytest.mark.timeout(120 + MANY // 4)
@pytest.mark.parametrize("broker", ["redis", "amqp"])
def test_a_fleet_of_both_workers_does_the_same(stage_on, kinds, broker):
    if len(kinds) < 2:
        pytest.skip("a mixed fleet needs both workers")
    accept = ["json", "pickle"]
    mixed = run(stage_on(kinds[0], broker, accept_content=accept), kinds)
    alone = run(stage_on(kinds[0], broker, accept_content=accept), kinds[:1])
    assert mixed["ends"] == alone["ends"]
    assert mixed["ran twice"] == []
    assert mixed["took part"] == [True, True]
    assert mixed["statuses"] == [0, 0]
