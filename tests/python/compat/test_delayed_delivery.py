"""Native delayed delivery: what is declared on RabbitMQ, and the way of a message that waits there."""

import json
import re
from datetime import datetime

import pytest
from apps import topology
from support.lines import lines
from support.waiting import until

#: 28 levels, each with an exchange and a queue.
LEVELS = 28


def delay_entities(rabbitmq, stage):
    """All that delays, and what it delivers to."""
    vhost = stage.conf["broker_url"].rsplit("/", 1)[1]
    queues = [
        [row["name"], row["durable"], sorted(map(json.dumps, row["arguments"]))]
        for row in rabbitmq.listed(vhost, "queues", "name", "durable", "arguments")
        if row["name"].startswith("celery_delayed")
    ]
    exchanges = [
        [row["name"], row["type"], row["durable"]]
        for row in rabbitmq.listed(vhost, "exchanges", "name", "type", "durable")
        if row["name"].startswith("celery_delayed")
    ]
    bindings = [
        list(row.values())
        for row in rabbitmq.listed(
            vhost, "bindings", "source_name", "destination_name", "destination_kind", "routing_key"
        )
        if row["source_name"] and "pidbox" not in row["source_name"]
    ]  # fmt: skip
    plain = re.sub(
        r"bcast\.[0-9a-f-]+", "bcast.<id>", json.dumps([sorted(queues), sorted(exchanges), sorted(bindings)])
    )
    return json.loads(plain)


def cut(rabbitmq, stage):
    """Closes all connections to the stage's virtual host; its producer begins anew."""
    vhost = stage.conf["broker_url"].rsplit("/", 1)[1]
    rabbitmq.control("close_all_connections", "--vhost", vhost, "the test says so")
    stage.app = stage.producer()
    topology.delayed(stage.app)


def exists(stage, queue):
    with stage.app.connection_for_write() as connection:
        try:
            connection.default_channel.queue_declare(queue, passive=True)
        except connection.channel_errors:
            return False
        return True


def way(line):
    """Where a message came from: its exchange, and its key with the bits of its delay."""
    return [line["number"], line["exchange"], line["routing_key"]]


def said(worker):
    """Lines about delays."""
    return sorted({(level, text) for level, _, text in lines(worker.log) if "direct exchange" in text.lower()})


@pytest.mark.timeout(300)
def test_delayed_messages_wait_in_the_broker_and_run_in_time(alike, rabbitmq_server):
    def scenario(stage):
        topology.delayed(stage.app)
        worker = stage.worker(app="routing", env={"TOPOLOGY": "delayed"})
        found = {"entities": delay_entities(rabbitmq_server, stage)}
        # By the producer and by a child, to the worker's queue and to a direct one, which cannot delay.
        stage.send("mark_at", "producer", countdown=2)
        stage.send("send", "mark_at", ("child",), {"countdown": 3})
        stage.send("send", "mark_at", ("direct",), {"countdown": 1, "queue": "plain"})
        stage.send("mark_at", "now")
        stage.send("mark_at", "other", exchange="elsewhere", routing_key="elsewhere.x", countdown=1)
        # A retry's delay takes the place of the last one's.
        stage.send("retry_once", "retried")
        stage.wait_journal("try", 3)
        ran = stage.wait_journal("ran", 5)
        found |= {
            "ways": sorted(map(way, ran)),
            "tries": [[*way(line), line["retries"]] for line in stage.journal("try")],
            "early": [
                line for line in ran if line["eta"] and line["at"] < datetime.fromisoformat(line["eta"]).timestamp()
            ],
            "said": said(worker),
        }
        # Nothing declares it anew but the worker, when it is connected again.
        deleted = [f"celery_delayed_{level}" for level in (0, 3, 27)]
        with stage.app.connection_for_write() as connection:
            for name in deleted:
                connection.default_channel.queue_delete(name)
                connection.default_channel.exchange_delete(name)
        cut(rabbitmq_server, stage)
        until(lambda: all(exists(stage, name) for name in deleted), worker.describe)
        until(lambda: delay_entities(rabbitmq_server, stage) == found["entities"], worker.describe, timeout=90)
        stage.send("mark_at", "after", countdown=1)
        found["after"] = way(stage.wait_journal("ran", number="after")[0])
        return found

    seen = alike(scenario, "vhost", broker_native_delayed_delivery_queue_type="classic")
    queues, exchanges, _ = seen["entities"]
    assert (len(queues), len(exchanges)) == (LEVELS, LEVELS + 1)
    assert seen["early"] == []
    keys = {number: key for number, _, key in seen["ways"]}
    for number, seconds in (("producer", 2), ("child", 3)):
        assert keys[number] == ".".join(f"{seconds:028b}") + ".jobs"
    assert keys["now"] == "jobs"
    # The second retry's key is no longer than the first's.
    assert len({len(key) for _, _, key, retries in seen["tries"] if retries}) == 1


def test_prefetch_is_counted_by_consumer_where_there_is_a_quorum_queue(alike, rabbitmq_server):
    def scenario(stage):
        stage.worker(
            app="routing", concurrency=2, conf={"task_default_queue": "main", "task_default_queue_type": "quorum"}
        )
        vhost = stage.conf["broker_url"].rsplit("/", 1)[1]
        stage.app.conf.update(task_default_queue="main", task_default_queue_type="quorum")
        stage.send("mark", 1).get(timeout=30)
        return {
            "consumers": [
                row
                for row in rabbitmq_server.listed(vhost, "consumers", "queue_name", "prefetch_count")
                if row["queue_name"] == "main"
            ],
            "channels": max(row["global_prefetch_count"] for row in rabbitmq_server.listed(
                vhost, "channels", "global_prefetch_count")),
            "queues": [row for row in rabbitmq_server.listed(vhost, "queues", "name", "type") if row["name"] == "main"],
            "delays": len(delay_entities(rabbitmq_server, stage)[0]),
        }  # fmt: skip

    seen = alike(scenario, "vhost", broker_native_delayed_delivery_queue_type="classic")
    assert seen["delays"] == LEVELS
    assert seen["channels"] == 0


def test_a_kind_of_queue_that_cannot_delay_ends_the_start(alike):
    def scenario(stage):
        conf = {"broker_native_delayed_delivery_queue_type": "odd"}
        worker = stage.worker(app="routing", conf=conf, env={"TOPOLOGY": "delayed"}, ready=False)
        return {"failed": worker.wait() != 0, "says": "'odd'" in worker.log}

    assert alike(scenario, "vhost") == {"failed": True, "says": True}
