"""`--http`: what `/livez`, `/readyz` and `/metrics` say of a worker.

OUTAGE=30       seconds that the broker stays away (default: no longer than it takes to be noticed)
"""

import os
import time

import pytest
from support.command import complaint, run
from support.http import Listener
from support.servers import Redis, free_port
from support.waiting import until

OUTAGE = float(os.environ.get("OUTAGE", "0"))


@pytest.fixture
def listener():
    return Listener()


def sent(stage):
    """A known mix of tasks, and how often each is counted as what."""
    for number in range(5):
        stage.send("ok", number)
    stage.send("fail", "key")
    stage.send("fail", "value")
    stage.send("fail", "value")
    stage.send("again")
    stage.send("ignored")
    stage.send("rejected")
    stage.send("late")
    stage.send("dies")
    # Before it is sent: a message that is expired may vanish in its queue.
    assert stage.app.control.revoke("unwanted", reply=True, timeout=10, limit=1)
    stage.send("ok", 1, task_id="unwanted")
    # Names from the wire must not become labels.
    stage.send("no.such.task")
    return {
        ("celery_task_received_total", "ok"): 6,
        ("celery_task_received_total", "fail"): 3,
        ("celery_task_received_total", "again"): 2,
        ("celery_task_received_total", "ignored"): 1,
        ("celery_task_received_total", "rejected"): 1,
        ("celery_task_received_total", "late"): 1,
        ("celery_task_received_total", "dies"): 1,
        ("celery_task_started_total", "ok"): 5,
        ("celery_task_started_total", "fail"): 3,
        ("celery_task_started_total", "again"): 2,
        ("celery_task_started_total", "ignored"): 1,
        ("celery_task_started_total", "rejected"): 1,
        ("celery_task_started_total", "late"): 1,
        ("celery_task_started_total", "dies"): 1,
        ("celery_task_succeeded_total", "ok"): 5,
        ("celery_task_succeeded_total", "again"): 1,
        ("celery_task_runtime_count", "ok"): 5,
        ("celery_task_runtime_count", "again"): 1,
        ("celery_task_failed_total", "fail", "KeyError"): 1,
        ("celery_task_failed_total", "fail", "ValueError"): 2,
        ("celery_task_failed_total", "late", "TimeLimitExceeded"): 1,
        ("celery_task_failed_total", "dies", "WorkerLostError"): 1,
        ("celery_task_retried_total", "again"): 1,
        ("celery_task_rejected_total", "rejected"): 1,
        ("celery_task_revoked_total", "ok"): 1,
        ("celeriac_task_ignored_total", "ignored"): 1,
    }


@pytest.mark.parametrize("broker", ["redis", "amqp"])
def test_what_is_counted_is_what_was_sent(broker, stage_on, listener):
    with stage_on("celeriac", broker) as stage:
        worker = stage.worker("--http", listener.address, app="metered", concurrency=2)
        expected = sent(stage)

        def counted():
            found = {}
            for (name, labels), value in listener.metrics().items():
                labels = dict(labels)
                if value and "name" in labels and name.endswith(("_total", "_count")):
                    assert labels["queue_name"] == stage.queue
                    assert labels["hostname"] == "here"
                    key = (name, labels["name"], *([labels["exception"]] if "exception" in labels else []))
                    found[key] = int(value)
            return found

        until(lambda: counted() == expected, lambda: f"{expected}\nthere is {counted()}\n{worker.describe()}")
        until(lambda: listener.sums().get(("celeriac_messages_unsettled",), 0) == 0, lambda: f"{listener.sums()}")
        settled = listener.sums("settlement")
        assert settled == {
            ("celeriac_settlements_total", "ack"): 14,
            ("celeriac_settlements_total", "reject"): 2,
        }
        assert listener.sums("reason") == {
            ("celeriac_messages_refused_total", "unknown"): 1,
            ("celeriac_children_ended_total", "lost"): 1,
            ("celeriac_children_ended_total", "time_limit"): 1,
        }
        assert "no.such.task" not in listener.ask("/metrics")[1]
        totals = listener.sums()
        assert totals["celeriac_broker_connections_total",] == 1
        assert totals["celery_worker_up",] == 1
        # What children stored; the parent stored those of the dead, the late, the revoked and the rejected itself.
        assert totals["celeriac_results_written_total",] == 5 + 3 + 2
        assert listener.sums("queue_name")["celery_active_worker_count", stage.queue] == 1
        assert listener.sums("concern", "rung")["celeriac_rung", "broker", "native"] == 1
        assert sum(count for (name, _), count in listener.sums("rung").items() if name == "celeriac_rung_tasks") == 9


def test_what_runs_and_what_waits_is_shown_and_the_wait_is_measured_from_the_time_stamp(stage_on, listener, tmp_path):
    with stage_on("celeriac") as stage:
        stage.worker("--http", listener.address, app="metered", concurrency=1)
        stage.send("wait", str(tmp_path / "go"), timestamp=1_000_000_000)
        stage.wait_journal("waiting")
        stage.send("ok", 1)
        stage.send("ok", 1, countdown=5)
        stage.send("ok", 1, countdown=3600)

        def gauges():
            return {
                key: value
                for key, value in listener.sums().items()
                if key[0] in {"celery_worker_tasks_active", "celeriac_tasks_reserved", "celeriac_messages_unsettled"}
            } | listener.sums("held_by")

        expected = {
            ("celery_worker_tasks_active",): 1,
            ("celeriac_tasks_reserved",): 1,
            ("celeriac_tasks_scheduled", "worker"): 1,
            ("celeriac_tasks_scheduled", "broker"): 1,
            ("celeriac_messages_unsettled",): 4,
        }
        until(lambda: gauges() == expected, lambda: f"{expected}\nthere is {gauges()}", timeout=4)
        waits = listener.sums("name")
        assert waits["celeriac_task_queue_wait_seconds_count", "wait"] == 1
        assert waits["celeriac_task_queue_wait_seconds_sum", "wait"] > 700_000_000
        (tmp_path / "go").touch()


def test_held_messages_are_renewed_on_redis(stage_on, listener, tmp_path):
    options = {"broker_transport_options": {"visibility_timeout": 1}}
    with stage_on("celeriac", **options) as stage:
        stage.worker("--http", listener.address, app="metered", concurrency=1)
        stage.send("wait", str(tmp_path / "go"))
        until(lambda: listener.sums().get(("celeriac_lease_renewals_total",), 0) > 1, lambda: f"{listener.sums()}")
        (tmp_path / "go").touch()


def test_readiness_goes_and_comes_with_the_broker_and_liveness_stays(stage_on, listener, tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    with Redis(folder) as broker, stage_on("celeriac", broker=broker.url, backend="disabled://") as stage:
        worker = stage.worker("--http", listener.address, app="metered")
        lives = []

        def readiness(status):
            lives.append(listener.ask("/livez"))
            return listener.ask("/readyz")[0] == status

        until(lambda: readiness(200), worker.describe)
        broker.stop()
        until(lambda: readiness(503), worker.describe)
        end = time.monotonic() + OUTAGE
        while time.monotonic() < end:
            assert readiness(503)
            time.sleep(0.1)
        assert listener.ask("/readyz")[1] == f"not connected to the broker redis://:**@127.0.0.1:{broker.port}/0\n"
        assert listener.sums().get(("celeriac_broker_up",)) is None
        broker.start()
        until(lambda: readiness(200), worker.describe, timeout=60)
        assert set(lives) == {(200, "ok\n")}
        totals = listener.sums()
        assert totals["celeriac_broker_up",] == 1
        assert totals["celeriac_broker_connections_total",] == 2
        assert stage.send("ok", 1)
        until(lambda: ("celery_task_succeeded_total", "ok") in listener.sums("name"), worker.describe)


def test_a_worker_that_stops_is_not_ready_and_lives(stage_on, listener, tmp_path):
    with stage_on("celeriac") as stage:
        worker = stage.worker("--http", listener.address, app="metered")
        stage.send("wait", str(tmp_path / "go"))
        stage.wait_journal("waiting")
        worker.kill(15)
        until(lambda: listener.ask("/readyz") == (503, "the worker is stopping\n"), worker.describe)
        assert listener.ask("/livez") == (200, "ok\n")
        (tmp_path / "go").touch()
        assert worker.wait() == 0


def test_a_worker_without_its_broker_lives_and_says_what_it_lacks(stage_on, listener):
    port = free_port()
    with stage_on("celeriac", broker=f"redis://127.0.0.1:{port}/0", backend="disabled://") as stage:
        worker = stage.worker("--http", listener.address, app="metered", ready=False)
        until(lambda: listener.ask("/livez") == (200, "ok\n"), worker.describe)
        expected = (503, f"not connected to the broker redis://:**@127.0.0.1:{port}/0\n")
        until(lambda: listener.ask("/readyz") == expected, worker.describe)


def test_probes_are_answered_while_every_child_burns_its_processor(stage_on, listener):
    with stage_on("celeriac") as stage:
        stage.worker("--http", listener.address, app="metered", concurrency=4)
        for _ in range(4):
            stage.send("burn", 3)
        stage.wait_journal("burning", 4)
        assert [listener.ask("/livez") for _ in range(50)] == [(200, "ok\n")] * 50
        assert listener.ask("/readyz") == (200, "ready\n")


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_other_pools_are_counted_too(pool, stage_on, listener):
    with stage_on("celeriac") as stage:
        stage.worker("--http", listener.address, "-P", pool, app="metered", concurrency=2)
        stage.send("ok", 1)
        stage.send("fail", "key")
        until(lambda: ("celery_task_failed_total", "fail") in listener.sums("name"), listener.sums)
        until(lambda: ("celery_task_succeeded_total", "ok") in listener.sums("name"), listener.sums)


def test_the_second_door_takes_the_variable_and_the_option(stage_on, listener):
    with stage_on("celeriac") as stage:
        stage.worker(app="metered", kind="celery", env={"CELERIAC": "1", "CELERIAC_HTTP": listener.address})
        assert listener.ask("/readyz") == (200, "ready\n")
    other = Listener()
    with stage_on("celeriac") as stage:
        stage.worker("--http", other.address, app="metered", kind="celery", env={"CELERIAC": "1"})
        assert other.ask("/readyz") == (200, "ready\n")


def test_an_address_in_use_ends_the_worker_with_one_line_and_status_2(stage_on, redis_server):
    with stage_on("celeriac") as stage:
        address = f"127.0.0.1:{redis_server.port}"
        worker = stage.worker("--http", address, app="metered", ready=False)
        assert worker.wait() == 2
        assert f"--http {address}: cannot listen there: Address already in use" in worker.log
        assert "Traceback" not in worker.log


@pytest.mark.parametrize("env", [{}, {"CELERIAC": "1"}], ids=["first door", "second door"])
def test_what_is_no_address_is_refused_as_other_wrong_options_are(env):
    program = "celery" if env else "celeriac"
    done = run(program, "-A", "show", "worker", "--http", "9000", **env)
    assert done.returncode == 2
    assert complaint(done) == "Error: Invalid value for '--http': '9000' is not host:port or :port"
    done = run(program, "-A", "show", "worker", CELERIAC_HTTP="9000", **env)
    assert (done.returncode, "'9000' is not host:port or :port" in done.stderr) == (2, True)
