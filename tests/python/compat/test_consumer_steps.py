"""Boot steps of the app: those that consume messages of their own, and when each method of a step is called."""

import signal

import pytest
from kombu import Exchange, Queue
from support.control import answer, start
from support.lines import lines as log_lines
from support.servers import RabbitMq, Redis

APP = "own_consumers"


def post(stage, queue, *bodies):
    """Messages that are no tasks."""
    with stage.producer().connection_for_write() as connection, connection.Producer() as producer:
        target = Queue(queue, Exchange(queue), routing_key=queue)
        for body in bodies:
            producer.publish(body, exchange=target.exchange, routing_key=queue, declare=[target], serializer="json")


def calls(stage, *steps):
    """(step, method) in order, of all steps or these."""
    lines = stage.journal("step")
    return [(line["step"], line["method"]) for line in lines if not steps or line["step"] in steps]


@pytest.mark.parametrize("broker", ["redis", "vhost", "filesystem"])
def test_messages_that_are_no_tasks_are_consumed_and_acknowledged_beside_tasks(alike, broker):
    def consume(stage):
        worker = stage.worker(app=APP)
        post(stage, "orders", *range(20))
        post(stage, "invoices", {"sum": 5})
        stage.wait_journal("order", count=20)
        stage.wait_journal("invoice")
        ran = stage.send("add", 2, 2).get(timeout=30)
        status = worker.stop()
        # What was acknowledged does not come to the next worker, what was not does.
        post(stage, "orders", "keep", "last")
        second = stage.worker(app=APP)
        stage.wait_journal("kept")
        stage.wait_journal("order", body="last")
        status2 = second.stop()
        return {
            "ran": ran,
            "statuses": [status, status2],
            "orders": sorted(str(line["body"]) for line in stage.journal("order")),
            "in the worker's process": {line["pid"] for line in stage.journal("order")} == {worker.pid, second.pid},
            "connected": [line.get("connected") for line in stage.journal("step", step="Invoices")],
        }

    seen = alike(consume, broker, "redis" if broker != "filesystem" else "file")
    assert seen["in the worker's process"]
    assert seen["statuses"] == [0, 0]


@pytest.mark.parametrize("broker", ["redis", "vhost"])
def test_a_message_that_was_not_acknowledged_goes_back_when_the_worker_stops(alike, broker):
    def keep(stage):
        first = stage.worker(app=APP)
        post(stage, "orders", "keep")
        stage.wait_journal("kept")
        assert first.stop() == 0
        stage.worker(app=APP)
        stage.wait_journal("kept", count=2)
        return len(stage.journal("kept"))

    assert alike(keep, broker) == 2


@pytest.mark.parametrize(("how", "status"), [(signal.SIGTERM, 0), (signal.SIGQUIT, 0)])
def test_the_methods_of_steps_are_called_in_order(alike, how, status):
    def life(stage):
        worker = stage.worker(app=APP)
        stage.wait_journal("step", step="Invoices")
        assert worker.stop(how) == status
        return calls(stage, "OfWorker", "First", "Second", "Invoices", "Unwanted")

    seen = alike(life)
    assert seen[:4] == [("OfWorker", "start"), ("First", "start"), ("Second", "start"), ("Invoices", "start")]
    assert ("OfWorker", "terminate" if how == signal.SIGQUIT else "stop") in seen


def test_steps_say_something_of_themselves_in_the_stats(alike):
    def stats(stage):
        worker = start(stage, app=APP)
        shown = answer(stage, "stats")
        assert worker.stop() == 0
        return {name: shown[name] for name in shown if name in ("ofworker", "first", "second", "unwanted")} | {
            "pool": shown["pool"]["max-concurrency"]
        }

    assert alike(stats) == {"ofworker": "here", "first": "here", "second": "here", "pool": 1}


@pytest.mark.parametrize("broker", ["redis", "vhost"])
def test_a_control_command_of_the_app_adds_and_cancels_queues(alike, broker):
    def queues(stage):
        worker = start(stage, app=APP)
        said = [answer(stage, "feed", queue="extra"), answer(stage, "feed", queue="extra")]
        ran = stage.send("add", 1, 1, queue="extra").get(timeout=30)
        found = [sorted(queue["name"] for queue in answer(stage, "active_queues"))]
        said.append(answer(stage, "starve", queue="extra"))
        found.append(sorted(queue["name"] for queue in answer(stage, "active_queues")))
        assert worker.stop() == 0
        lines = [text for _, _, text in log_lines(worker.log) if "onsuming from" in text or "Canceling" in text]
        return {"said": said, "ran": ran, "queues": [["extra" in names] for names in found], "lines": lines[:1]}

    seen = alike(queues, broker)
    assert seen["queues"] == [[True], [False]]


def test_a_control_command_may_end_the_worker(alike):
    def leave(stage):
        worker = start(stage, app=APP)
        stage.app.control.broadcast("leave")
        return worker.wait()

    assert alike(leave) == 6


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [("leave", 7, None), ("break", 1, "Unrecoverable error: RuntimeError('an order')")],
)
def test_an_exception_of_a_callback_ends_the_worker(alike, body, status, line):
    def end(stage):
        worker = stage.worker(app=APP)
        post(stage, "orders", body)
        return {"status": worker.wait(), "said": line is None or line in worker.log}

    assert alike(end) == {"status": status, "said": True}


@pytest.mark.parametrize("step", ["First", "OfWorker"])
def test_a_step_that_cannot_start_ends_the_worker(alike, step):
    def end(stage):
        worker = stage.worker(app=APP, env={"BROKEN_STEP": step}, ready=False)
        return {"status": worker.wait(), "said": "Unrecoverable error: RuntimeError('broken')" in worker.log}

    assert alike(end) == {"status": 1, "said": True}


def test_steps_are_started_anew_after_a_lost_connection(kinds, stage_on, tmp_path_factory):
    for kind in kinds:
        with Redis(tmp_path_factory.mktemp("redis")) as server:
            stage = stage_on(kind, server.url, "cache+memory://")
            stage.worker(app=APP)
            stage.wait_journal("consumers")
            server.stop()
            stage.wait_journal("step", step="First", method="stop")
            server.start()
            stage.wait_journal("consumers", count=2)
            stage.wait_journal("step", count=2, step="First", method="start")
            post(stage, "orders", "again")
            stage.wait_journal("order", body="again")
            stage.workers[0].stop()


def test_consumers_of_steps_come_back_after_rabbitmq_closes_their_connection(kinds, stage_on, tmp_path_factory):
    for kind in kinds:
        with RabbitMq(tmp_path_factory.mktemp("rabbitmq")) as server:
            stage = stage_on(kind, server.url, "cache+memory://")
            stage.worker(app=APP)
            stage.wait_journal("consumers")
            server.control("close_all_connections", "a test")
            stage.wait_journal("consumers", count=2)
            post(stage, "orders", "again")
            stage.wait_journal("order", body="again")
            assert stage.workers[0].stop() == 0
