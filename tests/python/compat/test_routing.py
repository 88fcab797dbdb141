"""Queues of every sort, routes in every form, priorities: what is declared, where messages go, what runs first."""

import json
import re

import pytest
from apps import topology
from kombu import Connection, Exchange, Queue
from support.waiting import until

PER_PROCESS = re.compile(r"^(amq\.|celeryev|reply\.|.*\.pidbox$|.*celery\.pidbox$)|^[0-9a-f-]{36}$")


def listing(rabbitmq, stage, what, *columns):
    """Entities of the stage's virtual host but those that belong to one process."""
    vhost = stage.conf["broker_url"].rsplit("/", 1)[1]
    rows = []
    for row in rabbitmq.listed(vhost, what, *columns):
        shown = {name: value if name == "arguments" else re.sub(r"^bcast\..*", "bcast.<id>", str(value))
                 for name, value in row.items()}  # fmt: skip
        if isinstance(shown.get("arguments"), list):
            shown["arguments"] = sorted(map(json.dumps, shown["arguments"]))
        if not any(PER_PROCESS.match(str(value)) for name, value in shown.items() if name != "arguments"):
            rows.append(shown)
    return sorted(rows, key=json.dumps)


def entities(rabbitmq, stage):
    return {
        "queues": listing(rabbitmq, stage, "queues", "name", "durable", "auto_delete", "exclusive", "arguments"),
        "exchanges": listing(rabbitmq, stage, "exchanges", "name", "type", "durable", "auto_delete", "arguments"),
        "bindings": listing(rabbitmq, stage, "bindings", "source_name", "destination_name", "routing_key", "arguments"),
    }


def cut(rabbitmq, stage):
    """Closes all connections to the stage's virtual host; its producer begins anew."""
    vhost = stage.conf["broker_url"].rsplit("/", 1)[1]
    rabbitmq.control("close_all_connections", "--vhost", vhost, "the test says so")
    stage.app = stage.producer()


def declare(stage, queue):
    with Connection(stage.conf["broker_url"]) as connection:
        queue(connection.default_channel).declare()


def consumers(stage, queue):
    """How many consume it; none: it is not there."""
    with Connection(stage.conf["broker_url"]) as connection:
        try:
            return connection.default_channel.queue_declare(queue, passive=True).consumer_count
        except connection.channel_errors:
            return None


def ran(stage, count):
    """What left a line, where it came from; in no order."""
    keys = ("task", "number", "exchange", "routing_key", "priority")
    lines = stage.wait_journal("ran", count)
    return sorted(json.dumps([line.get(key) for key in keys]) for line in lines)


@pytest.mark.timeout(180)
def test_queues_are_declared_bound_and_consumed_as_the_app_declares_them(alike, rabbitmq_server):
    def scenario(stage):
        topology.queues(stage.app)
        # What is never declared is taken as it is found.
        declare(stage, Queue("given", queue_arguments={"x-max-length": 99}))
        stage.worker(app="routing", env={"TOPOLOGY": "queues"}, concurrency=2)
        found = entities(rabbitmq_server, stage)
        found["consumers"] = listing(rabbitmq_server, stage, "consumers", "queue_name", "ack_required", "arguments")
        (shown,) = stage.app.control.inspect(timeout=10, limit=1).active_queues().values()
        for queue in shown:
            queue["name"] = re.sub(r"^bcast\..*", "bcast.<id>", queue["name"])
            queue["bindings"].sort(key=json.dumps)
            queue.pop("queue", None)
        found["shown"] = sorted(shown, key=json.dumps)
        for options in (
            {},
            {"queue": "ranked", "priority": 8},
            {"exchange": "news", "routing_key": "news.sport.chess"},
            {"queue": "all_news"},
            {"exchange": "news", "routing_key": "twice.x"},
            {"exchange": "marked", "routing_key": "", "headers": {"color": "red"}},
            {"exchange": "every", "routing_key": "anything"},
            {"exchange": "pair", "routing_key": "pair"},
            {"queue": "short", "expires": 100},
            {"queue": "first"},
            {"queue": "given"},
            {"exchange": "everybody", "routing_key": ""},
        ):
            stage.send("where", **options)
        # One of them is for two queues.
        found["ran"] = ran(stage, 13)
        # A broadcast is known by its name, not by that of its queue.
        found["reply"] = stage.app.control.cancel_consumer("everybody", reply=True, timeout=10, limit=1)
        (shown,) = stage.app.control.inspect(timeout=10, limit=1).active_queues().values()
        found["left"] = sorted(queue["name"] for queue in shown)
        return found

    seen = alike(scenario, "vhost")
    assert len(seen["left"]) == 10


@pytest.mark.parametrize("broker", ["vhost", "redis"])
def test_routes_in_every_form_lead_to_their_queues(alike, broker):
    """From a child, whose app has the routes."""

    def scenario(stage):
        worker = stage.worker(
            "-Q", "main,a,b,c,everybody,made", app="routing", env={"TOPOLOGY": "routes"},
            conf={"task_default_queue": "main", "task_default_priority": 3},
        )  # fmt: skip
        stage.app.conf.task_default_queue = "main"
        # On Redis nobody knows of a fanout exchange that the sender has not declared, and Celery does not for these.
        names = [name for name in topology.ROUTES if (broker, name) != ("redis", "by.broadcast")]
        for name in names:
            stage.send("send", name, queue="main").get(timeout=30)
        stage.send("send", "where", (), {"queue": "c", "routing_key": "key-of-c"}, queue="main").get(timeout=30)
        every = Exchange("everybody", type="fanout")
        stage.send("where", exchange="everybody", exchange_type="fanout", routing_key="main", declare=[every])
        found = ran(stage, len(names) + 2)
        return {"ran": found, "status": worker.stop()}

    alike(scenario, broker)


@pytest.mark.parametrize("broker", ["vhost", "redis"])
def test_messages_of_a_higher_priority_run_first(alike, broker):
    def scenario(stage):
        topology.priorities(stage.app)
        declare(stage, stage.app.amqp.queues["main"])
        numbers = [0, 9, 5, 3, 7, 1]
        for number in numbers:
            stage.send("late_mark", number, priority=number)
        stage.send("late_mark", "default")
        worker = stage.worker(
            "--prefetch-multiplier=1",
            app="routing",
            env={"TOPOLOGY": "priorities"},
            conf={"task_default_queue": "main"},
        )
        lines = stage.wait_journal("ran", len(numbers) + 1)
        # A child's priority is its parent's, where it has none of its own.
        stage.send("send", "mark", ("child",), priority=6).get(timeout=30)
        stage.send("send", "mark", ("own",), {"priority": 1}, priority=6).get(timeout=30)
        stage.wait_journal("ran", len(numbers) + 3)
        return {
            "order": [line["number"] for line in lines],
            "children": sorted((line["number"], line["priority"]) for line in stage.journal("ran")[len(lines) :]),
            "status": worker.stop(),
        }

    seen = alike(scenario, broker)
    # The first may be taken before the others are looked at; kombu's steps on Redis are 0, 3, 6 and 9.
    assert seen["children"] == [("child", 6), ("own", 1)]


def test_queues_are_chosen_left_out_and_missing_ones_made(alike, rabbitmq_server):
    def scenario(stage):
        conf = {
            "task_create_missing_queue_type": "quorum",
            "task_create_missing_queue_exchange_type": "topic",
            "task_default_queue": "main",
        }
        worker = stage.worker(
            "-Q", "main,new", "-X", "main", app="routing", env={"TOPOLOGY": "selectable"}, conf=conf
        )  # fmt: skip
        found = entities(rabbitmq_server, stage)
        stage.app.conf.update(conf)
        stage.send("mark", 1, queue="new")
        return {**found, "ran": ran(stage, 1), "status": worker.stop()}

    alike(scenario, "vhost")


def test_without_missing_queues_an_unknown_one_ends_the_worker_and_the_call(alike):
    def scenario(stage):
        conf = {"task_create_missing_queues": False, "task_default_queue": "main"}
        wrong = stage.worker("-Q", "unknown", app="routing", env={"TOPOLOGY": "selectable"}, conf=conf, ready=False)
        status = wrong.wait()
        complaint = [line for line in wrong.log.splitlines() if "unknown" in line][-1:]
        worker = stage.worker("-Q", "main", app="routing", env={"TOPOLOGY": "selectable"}, conf=conf)
        refused = stage.send("send", "mark", (1,), {"queue": "unknown"}, queue="main")
        error = refused.get(timeout=30, propagate=False)
        # Where the queue is named by a command it is made all the same.
        reply = stage.app.control.add_consumer("unknown", reply=True, timeout=10, limit=1)
        worker.wait_log("Started consuming from unknown")
        return {
            "status": status,
            "complaint": complaint,
            "error": [type(error).__name__, str(error)],
            "reply": reply,
            "end": worker.stop(),
        }

    seen = alike(scenario)
    assert seen["status"] != 0
    assert seen["error"][0] == "QueueNotFound"


def test_queues_are_added_and_cancelled_by_command_and_outlive_a_lost_connection(alike, rabbitmq_server):
    def scenario(stage):
        worker = stage.worker(
            "-Q", "main", app="routing", env={"TOPOLOGY": "selectable"}, conf={"task_default_queue": "main"}
        )  # fmt: skip
        ask = {"reply": True, "timeout": 10, "limit": 1}
        # One that the app declares, with its arguments, and one that it does not.
        replies = [stage.app.control.add_consumer("ranked", **ask)]
        worker.wait_log("Started consuming from ranked")
        replies.append(
            stage.app.control.add_consumer("news", exchange="news", exchange_type="topic", routing_key="news.#", **ask)
        )
        worker.wait_log("Started consuming from news")
        replies.append(stage.app.control.add_consumer("ranked", **ask))
        found = entities(rabbitmq_server, stage)
        cut(rabbitmq_server, stage)
        worker.wait_log("Connection to broker lost")
        stage.send("mark", 1, queue=Queue("ranked", no_declare=True), exchange="ranks", routing_key="rank")
        stage.send("mark", 2, exchange="news", exchange_type="topic", routing_key="news.today")
        found["ran"] = ran(stage, 2)
        replies.append(stage.app.control.cancel_consumer("ranked", **ask))
        worker.wait_log("Canceling queue ranked")
        (shown,) = stage.app.control.inspect(timeout=10, limit=1).active_queues().values()
        return {**found, "replies": replies, "queues": sorted(queue["name"] for queue in shown)}

    seen = alike(scenario, "vhost", backend="disabled://")
    assert seen["queues"] == ["main", "news"]


def test_a_queue_deleted_while_it_is_consumed_is_declared_and_consumed_again(alike):
    def scenario(stage):
        worker = stage.worker(
            app="routing", env={"TOPOLOGY": "selectable"}, conf={"task_default_queue": "main"}
        )  # fmt: skip
        # The original may miss what comes before its loop turns.
        stage.send("mark", 0, queue="main")
        stage.wait_journal("ran", 1)
        with Connection(stage.conf["broker_url"]) as connection:
            connection.default_channel.queue_delete("ranked")
        worker.wait_log("Connection to broker lost")
        until(lambda: consumers(stage, "ranked") == 1, worker.describe)
        ranked = Queue("ranked", no_declare=True)
        stage.send("mark", 1, queue=ranked, exchange="ranks", routing_key="rank")
        return {"ran": ran(stage, 2), "status": worker.stop()}

    alike(scenario, "vhost", backend="disabled://")


@pytest.mark.ours
@pytest.mark.parametrize("transport", ["amqp", "kombu.transport.pyamqp:Transport"], ids=["native", "kombu"])
def test_a_queue_that_the_broker_refuses_is_told_to_who_asked_and_never_asked_for_again(
    kind, stage_on, rabbitmq_server, transport
):
    """The original answers that all is well, and ends."""
    stage = stage_on(kind, "vhost", "disabled://")
    declare(stage, Queue("other", queue_arguments={"x-max-length": 5}))
    conf = {"task_default_queue": "main", "broker_transport": transport}
    worker = stage.worker(
        "-Q", "main", app="routing", env={"TOPOLOGY": "selectable"}, conf=conf
    )  # fmt: skip
    ask = {"reply": True, "timeout": 10, "limit": 1}
    (reply,) = stage.app.control.add_consumer("other", **ask)
    (answer,) = reply.values()
    assert answer["error"].startswith(("ChannelError(", "OperationalError("))
    assert "PRECONDITION_FAILED" in answer["error"]
    stage.send("mark", 1, queue="main")
    stage.wait_journal("ran", 1)
    cut(rabbitmq_server, stage)
    until(lambda: worker.log.count("Connected to") == 2, worker.describe)
    stage.send("mark", 2, queue="main")
    stage.wait_journal("ran", 2)
    assert worker.stop() == 0


@pytest.mark.parametrize("broker", ["amqp", "redis"])
def test_tasks_see_the_same_properties(alike, broker):
    def scenario(stage):
        stage.worker(app="routing")
        headers = {"mine": [1, {"deep": "x"}], "tenant": "blue"}
        seen = stage.send("properties", headers=headers, priority=2).get(timeout=30)
        shown = seen["application_headers"] or {}
        for name in ("id", "root_id", "origin"):
            shown.pop(name, None)
        return seen

    seen = alike(scenario, broker)
    assert (seen["application_headers"] is not None) == (broker == "amqp")
