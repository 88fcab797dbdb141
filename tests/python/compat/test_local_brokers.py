"""Brokers without a server of their own: folders, and what kombu speaks to for us."""

import os
import signal
from pathlib import Path

import pytest
from support.servers import Redis
from support.waiting import until

RUNS = 60


def numbers(stage):
    return sorted(line["number"] for line in stage.journal("ran"))


def waiting(stage):
    """Files of the queue and those that workers hold."""
    folder = Path(stage.conf["broker_transport_options"]["data_folder_in"])
    return [path.name for path in folder.rglob("*.msg")]


def test_workers_of_both_kinds_share_folders(stage_on):
    stage = stage_on("celeriac", "filesystem", "file")
    stage.worker(app="counting", concurrency=2, kind="celeriac")
    stage.worker(app="counting", concurrency=2, kind="celery")
    # Long enough for kombu, which looks once a second, to find some.
    results = [stage.send("count", number, 0.15) for number in range(RUNS)]
    assert [result.get(timeout=60) for result in results] == list(range(RUNS))
    assert numbers(stage) == list(range(RUNS))
    assert len({line["pid"] for line in stage.journal("ran")}) > 2, "both workers had a part"
    until(lambda: not waiting(stage), lambda: f"nothing is left: {waiting(stage)}")


def test_what_a_killed_worker_held_runs_again_in_seconds(stage_on):
    stage = stage_on("celeriac", "filesystem", "file")
    victim = stage.worker(app="counting", concurrency=2)
    witness = stage.worker(app="counting", concurrency=2)
    results = [stage.send("slow", number, 0.3) for number in range(20)]
    stage.wait_journal("started", count=4)
    os.kill(victim.pid, signal.SIGKILL)
    assert [result.get(timeout=15) for result in results] == list(range(20))
    assert set(numbers(stage)) == set(range(20))
    witness.wait_log("of a worker that has died")
    witness.stop()
    assert waiting(stage) == []


def test_remote_control_reaches_workers_through_folders(stage_on):
    stage = stage_on("celeriac", "filesystem", "file")
    workers = [stage.worker(app="counting"), stage.worker(app="counting")]
    answers = stage.app.control.inspect(timeout=3).ping()
    assert answers == {"w0@here": {"ok": "pong"}, "w1@here": {"ok": "pong"}}
    for worker in workers:
        worker.stop()
    assert waiting(stage) == [], "mailboxes are gone with their workers"


def test_an_idle_worker_on_folders_does_nothing(stage_on):
    stage = stage_on("celeriac", "filesystem", "file")
    worker = stage.worker(app="counting")
    assert stage.send("count", 1).get(timeout=20) == 1

    def switches():
        status = Path(f"/proc/{worker.pid}/task").glob("*/status")
        lines = [line for path in status for line in path.read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary"))

    settled = []
    until(
        lambda: settled.append(switches()) or settled[-5:].count(settled[-1]) == 5,
        lambda: str(settled),
        every=0.2,
    )


def test_a_body_that_kombu_has_decompressed_is_not_decompressed_again(stage_on, tmp_path):
    stage = stage_on("celeriac", f"sqla+sqlite:///{tmp_path}/broker.db", "file")
    stage.worker()
    assert stage.send("add", 1, 2, compression="zlib").get(timeout=30) == 3


def test_what_kombu_delivered_and_was_not_started_goes_back(stage_on, tmp_path):
    broker = f"sqla+sqlite:///{tmp_path}/broker.db"
    stage = stage_on("celeriac", broker, "file", worker_prefetch_multiplier=4)
    first = stage.worker(app="counting")
    results = [stage.send("slow", number, 0.5) for number in range(6)]
    stage.wait_journal("started")
    first.stop()
    assert len(stage.journal("ran")) < 6
    stage.worker(app="counting")
    assert [result.get(timeout=30) for result in results] == list(range(6))
    assert numbers(stage) == list(range(6))


@pytest.fixture
def own_redis(tmp_path):
    """A server whose connections may be cut: the pools of this process keep those to the shared one."""
    (tmp_path / "redis").mkdir()
    with Redis(tmp_path / "redis") as server:
        yield server


def test_a_transport_of_the_app_runs_in_kombus_event_loop(stage_on, own_redis, tmp_path):
    (tmp_path / "own_transport.py").write_text(
        "from kombu.transport import redis\n\n\nclass Transport(redis.Transport):\n    pass\n"
    )
    stage = stage_on("celeriac", own_redis.url, own_redis.url)
    worker = stage.worker(
        app="counting",
        conf={"broker_transport": "own_transport:Transport"},
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parent.parent / 'apps'}"},
    )
    results = [stage.send("count", number) for number in range(RUNS)]
    assert [result.get(timeout=30) for result in results] == list(range(RUNS))
    assert stage.app.control.inspect(timeout=3).ping() == {"w0@here": {"ok": "pong"}}
    # A connection that is cut is made again.
    client = stage.redis()
    for connection in client.client_list():
        if connection["id"] != str(client.client_id()):
            client.client_kill_filter(_id=connection["id"])
    again = [stage.send("count", number) for number in range(RUNS)]
    assert [result.get(timeout=30) for result in again] == list(range(RUNS))
    assert worker.stop() == 0
    stage.wait_empty()
