"""Events: what monitors see of a worker and of its tasks."""

import pytest
from support import control
from support.events import Watcher, comparable
from support.raw import body, headers, put

BROKERS = ["redis", "amqp"]

# Name, arguments and options of a task that ends by itself.
CALLS = {
    "success": ("add", (4, 6), {}),
    "late success": ("late_mark", (1,), {}),
    "shadowed": ("add", (1, 2), {"shadow": "another name"}),
    "with eta": ("add", (1, 3), {"countdown": 0.2}),
    "failure": ("fail", ("it broke",), {}),
    "expected": ("expected", (), {}),
    "two arguments": ("fail_with_two_arguments", (), {}),
    "retried": ("retry_twice", (), {}),
    "retried in vain": ("retry_in_vain", (), {}),
    "rejected": ("reject", (), {}),
    "rejected too late": ("reject_early", (), {}),
    "rejected on failure": ("fail_rejecting", (), {}),
    "requeued": ("requeue_once", (), {}),
    "unencodable": ("unencodable", (), {}),
    "wrong arguments": ("wrong_arguments", (), {}),
    "killed": ("kill_self", (), {}),
    "killed late": ("kill_self_late", (), {}),
    "killed once": ("kill_self_once", (), {}),
    "exits": ("exit_process", (), {}),
    "soft limit": ("soft_limited", (), {}),
    "unknown": ("nobody.knows.this", (1,), {}),
}  # fmt: skip


def story(watcher, task_id):
    """The events of a task, in order, its own way of moving about them left out."""
    events = watcher.ended(task_id)
    return [comparable(event) for event in events]


def kinds(events):
    return [event["type"] for event in events]


@pytest.mark.parametrize("broker", BROKERS)
def test_monitors_see_the_same_events_of_every_outcome(alike, broker):
    def outcomes(stage):
        worker = stage.worker("-E")
        with Watcher(stage) as watcher:
            watcher.listen()
            sent = {what: stage.send(name, *args, **options).id for what, (name, args, options) in CALLS.items()}
            # Past the producer, which would have RabbitMQ drop it.
            expired = headers("add", expires="2020-01-01T00:00:00+00:00")
            put(stage, expired, body([1, 2]))
            sent["expired"] = expired["id"]
            seen = {what: story(watcher, task_id) for what, task_id in sent.items()}
            ignored = stage.send("ignore").id
            story(watcher, stage.send("add", 1, 1).id)
            seen["ignored"] = [comparable(event) for event in watcher.of(ignored)]
        worker.stop()
        # The next message of a task that is retried may come before the parent has heard of its end, or after.
        for what in ("retried", "retried in vain"):
            seen[what].sort(key=lambda event: (event["type"], event.get("retries", 0)))
        return seen

    seen = alike(outcomes, broker=broker)
    orders = {what: kinds(events) for what, events in seen.items()}
    usual = ["task-received", "task-started"]
    assert orders["success"] == [*usual, "task-succeeded"]
    assert orders["late success"] == [*usual, "task-succeeded"]
    assert orders["failure"] == [*usual, "task-failed"]
    assert orders["retried"] == sorted([*usual, "task-retried"] * 2 + [*usual, "task-succeeded"])
    assert orders["rejected on failure"] == [*usual, "task-rejected", "task-failed"]
    assert orders["expired"] == ["task-revoked"]
    assert orders["ignored"] == usual
    assert orders["unknown"] == ["task-failed"]
    assert seen["shadowed"][0]["name"] == "another name"
    assert seen["success"][0]["args"] == "(4, 6)"


@pytest.mark.parametrize("broker", BROKERS)
def test_a_task_that_is_revoked_limited_or_lost_ends_with_the_same_events(alike, broker):
    def ends(stage):
        worker = stage.worker("-E", concurrency=2)
        control.listens(stage)
        with Watcher(stage) as watcher:
            watcher.listen()
            running = stage.send("sleep", 60)
            stage.wait_journal("started")
            waiting = stage.send("add", 1, 2, countdown=60)
            watcher.wait(lambda event: event["type"] == "task-received" and event["uuid"] == waiting.id)
            stage.app.control.revoke(running.id, terminate=True, signal="KILL")
            seen = {"terminated": story(watcher, running.id)}
            dead = stage.send("add", 1, 2, task_id="5f0c1cf2-0000-4000-8000-000000000001", countdown=3)
            watcher.wait(lambda event: event["type"] == "task-received" and event["uuid"] == dead.id)
            stage.app.control.revoke(dead.id)
            seen["revoked"] = story(watcher, dead.id)
            limited = stage.send("hard_limited")
            # The original tells of it twice.
            seen["limited"] = story(watcher, limited.id)[:3]
            requeued = watcher.ended(stage.send("hard_limited_requeued").id, {"task-succeeded"})
            # The original tells of a failure of which it stores nothing.
            seen["requeued"] = [comparable(event) for event in requeued if event["type"] != "task-failed"]
        worker.stop()
        return {what: [(event["type"], event) for event in events] for what, events in seen.items()}

    seen = alike(ends, broker=broker)
    assert seen["terminated"][-1][1]["terminated"]
    assert seen["terminated"][-1][1]["signum"] == 9
    assert [kind for kind, _ in seen["limited"]] == ["task-received", "task-started", "task-failed"]


@pytest.mark.parametrize("broker", [*BROKERS, "filesystem"])
def test_a_worker_tells_of_itself_from_start_to_stop_and_of_tasks_only_when_asked(alike, broker):
    def life(stage):
        seen = {}
        with Watcher(stage) as watcher:
            first = stage.worker("-n", "first@here", "--heartbeat-interval", "1")
            watcher.listen("first@here")
            worker = stage.worker("--heartbeat-interval", "1")
            control.listens(stage)
            watcher.listen("w1@here")

            def events(count=1, **fields):
                fields = {"hostname": "w1@here", **fields}
                return watcher.wait(lambda event: fields.items() <= event.items(), count)

            seen["online"] = comparable(events(type="worker-online")[0])
            seen["heartbeat"] = comparable(events(2, type="worker-heartbeat")[-1])
            quiet = stage.send("add", 1, 1)
            quiet.get(timeout=30)
            there = {"destination": ["w1@here"], "reply": True, "timeout": 10, "limit": 1}
            broadcast = stage.app.control.broadcast
            seen["enabled"] = [broadcast("enable_events", **there), broadcast("enable_events", **there)]
            seen["asked"] = broadcast("heartbeat", **there)
            seen["by request"] = comparable(events(freq=5)[0])
            first.stop()
            stage.send("fail", "x")
            failed = events(type="task-failed")[0]
            seen["failed"] = kinds(watcher.of(failed["uuid"]))
            seen["disabled"] = [broadcast("disable_events", **there), broadcast("disable_events", **there)]
            after = stage.send("add", 1, 1)
            after.get(timeout=30)
            seen["lines"] = [line for line in worker.log.splitlines() if "Events of group" in line]
            seen["lines"] = [line[line.index("Events") :] for line in seen["lines"]]
            worker.stop()
            seen["offline"] = comparable(events(type="worker-offline")[0])
            seen["after"] = len(watcher.of(after.id))
        return seen

    seen = alike(life, broker=broker)
    assert seen["online"]["sw_ident"] == "py-celery"
    assert seen["by request"]["freq"] == 5
    assert seen["lines"] == ["Events of group {task} enabled by remote.", "Events of group {task} disabled by remote."]


@pytest.mark.parametrize("broker", BROKERS)
def test_the_state_that_exporters_keep_is_built_from_our_events(stage_on, kind, broker):
    """As celery-exporter does it: every event goes into the state, and what is counted is read from it."""
    stage = stage_on(kind, broker=broker)
    state = stage.app.events.State()
    stage.worker("-E", "--heartbeat-interval", "1")
    with Watcher(stage, state=state) as watcher:
        watcher.listen()
        good, bad = stage.send("add", 4, 6), stage.send("fail", "it broke")
        watcher.ended(good.id)
        watcher.ended(bad.id)
        [(name, worker)] = state.workers.items()
        before = len(watcher.events)
        # One that was made after both.
        watcher.wait(lambda event: event.get("processed", 0) >= 2 and event in watcher.events[before:])
    succeeded, failed = state.tasks[good.id], state.tasks[bad.id]
    assert (succeeded.name, succeeded.state, succeeded.result) == ("add", "SUCCESS", "10")
    assert succeeded.runtime >= 0
    assert succeeded.received <= succeeded.started <= succeeded.succeeded
    assert succeeded.worker.hostname == "w0@here"
    assert (failed.name, failed.state) == ("fail", "FAILURE")
    assert failed.exception.split("(", 1)[0] == "ValueError"
    assert failed.traceback.rstrip().endswith("ValueError: it broke")
    assert name == "w0@here"
    assert worker.alive
    assert (worker.active, worker.processed >= 2, len(worker.loadavg)) == (0, True, 3)
    assert [clock for clock, *_ in state._taskheap] == sorted(clock for clock, *_ in state._taskheap)


@pytest.mark.parametrize("serializer", ["pickle", "yaml"])
def test_events_are_written_in_the_serializer_of_the_app(alike, serializer):
    accept = ["json", serializer]

    def written(stage):
        stage.worker("-E")
        with Watcher(stage) as watcher:
            watcher.listen()
            return story(watcher, stage.send("add", 1, 2).id)

    seen = alike(written, event_serializer=serializer, accept_content=accept)
    assert kinds(seen) == ["task-received", "task-started", "task-succeeded"]


def test_tasks_of_the_apps_own_request_class_and_its_own_events_are_sent_too(alike):
    def hosted(stage):
        stage.worker("-E", app="request_app")
        with Watcher(stage) as watcher:
            watcher.listen()
            sent = {
                "success": stage.send("add", 1, kwargs={"y": 2}),
                "late success": stage.send("late", "fine"),
                "late failure": stage.send("late", "fail"),
                "ordinary": stage.send("plain", 7),
            }
            return {what: story(watcher, result.id) for what, result in sent.items()}

    seen = alike(hosted)
    assert kinds(seen["success"]) == ["task-received", "task-started", "task-succeeded"]
    assert kinds(seen["late failure"])[-1] == "task-failed"


def test_a_task_without_events_sends_none(alike):
    def silent(stage):
        stage.worker("-E", app="told")
        with Watcher(stage) as watcher:
            watcher.listen()
            quiet = stage.send("quiet")
            quiet.get(timeout=30)
            loud = story(watcher, stage.send("loud", 2).id)
            # Of the worker: what its producer sends of a task is not looked at here.
            loud = [event for event in loud if event["type"] != "task-sent"]
            quiet = [event for event in watcher.of(quiet.id) if event["type"] != "task-sent"]
            [news, *_] = watcher.wait(lambda event: event["type"] == "custom-news")
            return {"quiet": len(quiet), "loud": loud, "custom": comparable(news)}

    seen = alike(silent, task_send_sent_event=True)
    assert seen["quiet"] == 0
    assert kinds(seen["loud"]).count("task-half-way") == 1
    assert seen["custom"]["worth"] == 7


def test_without_heartbeat_and_gossip_nothing_is_sent_of_the_worker(alike):
    def still(stage):
        with Watcher(stage) as watcher:
            quiet = stage.worker("--without-heartbeat")
            stage.worker("-n", "loud@here", "--heartbeat-interval", "1")
            watcher.listen("loud@here")
            control.answer(stage, "enable_events")
            quiet.stop()
            watcher.wait(lambda event: event["type"] == "worker-heartbeat", count=3)
            return sorted({event["hostname"] for event in watcher.events})

    assert alike(still) == ["loud@here"]
