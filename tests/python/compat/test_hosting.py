"""Tasks with `Request` and `Strategy` classes of the app's own: every hook as under Celery."""

import signal

import pytest
from support.raw import body, headers, put
from support.servers import Redis
from support.waiting import until


def hooks(stage, task_id):
    """What the task's hooks said so far, by process: there is no order between processes."""
    said = {"parent": [], "child": []}
    for line in stage.journal("hook", id=task_id):
        child = line["hook"] == "task_failure" and not line["about"][0]
        said["child" if child else "parent"].append([line["hook"], *line["about"]])
    return said


def names(said):
    return [name for name, *_ in said["parent"]]


def wait_for(stage, hook, result):
    stage.wait_journal("hook", hook=hook, id=result.id)


def fence(stage):
    """One child runs one task after the other: once this one is accepted those before it are accounted for."""
    wait_for(stage, "accepted", stage.send("add", 0))


@pytest.mark.parametrize(("broker", "backend"), [("redis", "redis"), ("amqp", "rpc")])
def test_every_hook_of_a_request_is_called_in_celerys_order(alike, broker, backend):
    def observed(stage):
        stage.worker(app="request_app")
        sent = {
            "success": stage.send("add", 1, kwargs={"y": 2}),
            "late success": stage.send("late", "fine"),
            "late failure": stage.send("late", "fail"),
            "ignored": stage.send("late", "ignore"),
            "rejected": stage.send("late", "reject"),
            "unpicklable": stage.send("late", "big"),
            "retried": stage.send("retry"),
            "eta": stage.send("add", 5, countdown=0.3),
            "shadowed": stage.send("add", 6, shadow="another name"),
            "of no class": stage.send("plain", 7),
        }
        # Past the producer, which would have RabbitMQ drop it.
        expired = headers("add", expires="2020-01-01T00:00:00+00:00")
        put(stage, expired, body([1]))
        results = [sent[what].get(timeout=30) for what in ("success", "late success", "retried", "eta", "of no class")]
        fence(stage)
        stage.wait_empty()
        said = {what: hooks(stage, result.id) for what, result in sent.items()}
        said["expired"] = hooks(stage, expired["id"])
        # The second message may come before the parent has heard of the first one's end, or after.
        said["retried"]["parent"].sort(key=repr)
        return said | {"results": results}

    seen = alike(observed, broker, backend)
    assert seen["results"] == [3, "fine", "done", 5, 7]
    # Celery's strategy derives from the class, and overrides `execute_using_pool` and `on_success` itself.
    assert names(seen["success"]) == ["init", "task_received", "accepted", "acknowledge"]
    assert names(seen["late success"]) == ["init", "task_received", "accepted", "acknowledge"]
    assert names(seen["late failure"]) == ["init", "task_received", "accepted", "failure", "acknowledge"]
    assert names(seen["rejected"])[-2:] == ["task_failure", "reject"]
    assert names(seen["retried"]).count("retry") == 1
    assert names(seen["retried"]).count("acknowledge") == 2
    assert names(seen["expired"]) == ["init", "acknowledge", "task_revoked"]
    assert names(seen["of no class"]) == ["task_received"]


def test_limits_and_lost_children_reach_the_hooks(alike):
    def observed(stage):
        stage.worker(app="request_app")
        sent = {what: stage.send(what) for what in ("soft", "hard", "killed")} | {"left": stage.send("late", "leave")}
        for result in sent.values():
            until(result.ready, stage.logs)
        twice = stage.send("requeued")
        assert twice.get(timeout=30) == "the second time"
        limited = sorted(stage.send("limited", number).get(timeout=30) for number in range(3))
        fence(stage)
        seen = {what: hooks(stage, result.id) | {"state": result.state} for what, result in sent.items()}
        return seen | {"requeued": hooks(stage, twice.id), "limited": limited}

    seen = alike(observed)
    assert ["timeout", True, 1] in seen["soft"]["parent"]
    # Both hooks, in billiard's order: the failure before the limit itself.
    assert [name for name in names(seen["hard"]) if name in ("failure", "timeout")] == ["failure", "timeout"]
    assert seen["killed"]["state"] == "FAILURE"
    assert names(seen["requeued"]).count("reject") == 1
    assert names(seen["requeued"]).count("init") == 2


def test_remote_control_terminates_and_revokes_through_the_request(alike):
    def observed(stage):
        worker = stage.worker(app="request_app")
        busy = stage.send("sleep", 60)
        stage.wait_journal("begun")
        later = stage.send("add", 1, countdown=1.5)
        wait_for(stage, "task_received", later)
        inspect = stage.app.control.inspect(destination=["w0@here"])
        (active,) = inspect.active()["w0@here"]
        (scheduled,) = inspect.scheduled()["w0@here"]
        stage.app.control.revoke(later.id)
        stage.app.control.revoke(busy.id, terminate=True)
        wait_for(stage, "failure", busy)
        wait_for(stage, "task_revoked", later)
        stage.wait_empty()
        return {
            "active": [active[key] for key in ("name", "args", "acknowledged", "hostname")],
            "right ones": [active["id"] == busy.id, scheduled["request"]["id"] == later.id],
            "in a child": active["worker_pid"] not in (None, worker.pid),
            "terminated": hooks(stage, busy.id),
            "discarded": hooks(stage, later.id),
            "states": [busy.state, later.state],
            "after": stage.send("add", 2).get(timeout=30),
        }

    seen = alike(observed)
    assert seen["states"] == ["REVOKED", "REVOKED"]
    assert ["task_revoked", True, 15, False] in seen["terminated"]["parent"]
    assert ["task_revoked", False, None, False] in seen["discarded"]["parent"]


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_other_pools_call_the_hooks_too(stage_on, kind, pool):
    stage = stage_on(kind)
    stage.worker("-P", pool, app="request_app", concurrency=2)
    good, bad = stage.send("add", 1), stage.send("late", "fail")
    assert good.get(timeout=30) == 1
    wait_for(stage, "failure", bad)
    wait_for(stage, "acknowledge", bad)
    assert names(hooks(stage, good.id)) == ["init", "task_received", "accepted", "acknowledge"]
    said = [name for name in names(hooks(stage, bad.id)) if name != "task_failure"]
    assert said == ["init", "task_received", "accepted", "failure", "acknowledge"]


def test_bad_messages_for_a_request_are_settled(stage_on, kind):
    stage = stage_on(kind)
    worker = stage.worker(app="request_app")
    put(stage, headers("add"), b"{nothing")
    worker.wait_log("Can't decode message body")
    put(stage, headers("add"), body(), content_type="application/x-python-serialize", content_encoding="binary")
    worker.wait_log("Refusing to deserialize")
    stage.wait_empty()
    assert stage.send("add", 1).get(timeout=30) == 1


def test_a_strategy_decides_about_each_message(alike):
    def observed(stage):
        stage.worker(app="strategy_app")
        kept = [stage.send("picky", verdict) for verdict in ("keep", "drop", "reject", "keep")]
        results = [kept[0].get(timeout=30), kept[3].get(timeout=30)]
        later = stage.send("picky", "keep", countdown=0.2).get(timeout=30)
        for words in (("a", "b"), ("c", "fail")):
            for word in words:
                stage.send("pair", word)
        stage.wait_journal("done")
        stage.wait_journal("failed")
        stage.send("tick")
        stage.wait_journal("ticked")
        stage.wait_empty()
        return {
            "results": results,
            "later": later,
            "dropped": [kept[1].state, kept[2].state],
            "verdicts": [line["verdict"] for line in stage.journal("strategy")],
            "together": [line["messages"] for line in stage.journal("together")],
            "accepted": [line["child"] for line in stage.journal("accepted")],
            "done": [line["answer"] for line in stage.journal("done")],
            "failed": [line["error"] for line in stage.journal("failed")],
            "ticked": [line["hostname"] for line in stage.journal("ticked")],
        }

    seen = alike(observed)
    assert seen["verdicts"] == ["keep", "drop", "reject", "keep", "keep"]
    assert seen["together"] == [["a", "b"], ["c", "fail"]]
    assert seen["done"] == [2]
    assert seen["failed"] == ["ValueError"]


def test_what_a_strategy_still_holds_goes_back_at_a_warm_stop(alike):
    def observed(stage):
        worker = stage.worker(app="strategy_app")
        # The second of a pair never comes.
        stage.send("pair", "alone")
        until(stage.unacked, stage.logs)
        return [worker.stop(), stage.depth(), len(stage.unacked())]

    assert alike(observed) == [0, 1, 0]


@pytest.mark.parametrize(("how", "seconds", "left"), [(signal.SIGQUIT, 60, 1), (signal.SIGTERM, 1, 0)])
def test_a_late_acked_request_goes_back_at_a_cold_stop_and_ends_at_a_warm_one(alike, how, seconds, left):
    def observed(stage):
        worker = stage.worker(app="request_app")
        running = stage.send("sleep", seconds)
        stage.wait_journal("begun")
        status = worker.stop(how)
        return [status, stage.depth(), len(stage.unacked()), names(hooks(stage, running.id))[-1]]

    assert alike(observed)[:3] == [0, left, 0]


def test_an_early_acked_request_that_is_killed_at_a_cold_stop_says_so(alike):
    def observed(stage):
        worker = stage.worker(app="request_app")
        running = stage.send("early_sleep", 60)
        stage.wait_journal("begun")
        status = worker.stop(signal.SIGQUIT)
        return [status, stage.depth(), len(stage.unacked()), running.state]

    assert alike(observed)[:3] == [0, 0, 0]


@pytest.mark.ours
def test_a_strategy_that_cannot_be_hosted_is_refused_at_start(stage_on, kind):
    stage = stage_on(kind)
    worker = stage.worker(app="strategy_app", env={"WITH_BROKEN": "1"}, ready=False)
    assert worker.wait() == 2
    refusal = "task broken: its Strategy strategy_app:broken cannot be hosted (AttributeError: 'NoneType' object"
    assert refusal in worker.log
    assert "run `celery worker` without CELERIAC for this app" in worker.log


@pytest.fixture
def own_redis(tmp_path):
    """A server whose connections may be cut: the pools of this process keep those to the shared one."""
    (tmp_path / "redis").mkdir()
    with Redis(tmp_path / "redis") as server:
        yield server


@pytest.mark.ours
def test_a_lost_connection_costs_no_hosted_work(stage_on, kind, own_redis):
    stage = stage_on(kind, own_redis.url, own_redis.url)
    worker = stage.worker(app="request_app", concurrency=2)
    running = stage.send("sleep", 1.0)
    stage.wait_journal("begun")
    waiting = stage.send("add", 3, countdown=1.5)
    wait_for(stage, "task_received", waiting)
    client = stage.redis()
    for connection in client.client_list():
        if connection["id"] != str(client.client_id()):
            client.client_kill_filter(_id=connection["id"])
    worker.wait_log("Connection to broker lost")
    assert waiting.get(timeout=30) == 3
    wait_for(stage, "acknowledge", running)
    stage.wait_empty()
    assert len(stage.journal("begun")) == 1
    assert names(hooks(stage, waiting.id)) == ["init", "task_received", "accepted", "acknowledge"]
