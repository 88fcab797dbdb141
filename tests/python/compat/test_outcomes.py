"""How each kind of task ends: state, result, traceback, log lines, hooks."""

import json
import re

import pytest
from support.lines import by_process, lines_of_task, plain
from support.outcomes import comparable, ended
from support.waiting import until

# name of the task, arguments; every one of them ends.
CALLS = [
    ("add", (4, 6)),
    ("echo", (1, "zwölf", None, [1.5, {"a": True}])),
    ("fail", ("it broke",)),
    ("fail_late", ("it broke late",)),
    ("fail_with_two_arguments", ()),
    ("fail_in_a_chain", ()),
    ("expected", ()),
    ("retry_twice", ()),
    ("retry_in_vain", ()),
    ("retry_without_cause", ()),
    ("autoretry", ()),
    ("reject", ()),
    ("reject_early", ()),
    ("requeue_once", ()),
    ("progress", ()),
    ("replaced", (21,)),
    ("unencodable", ()),
    ("wrong_arguments", ()),
    ("hooked.refuses", ()),
    ("hooked.bad_hook", ()),
    ("late_mark", (1,)),
]


def all_outcomes(stage):
    worker = stage.worker(concurrency=2)
    sent = {name: stage.send(name, *args).id for name, args in CALLS}
    documents = {
        name: until(lambda i=task_id: ended(stage, i), lambda n=name: f"{n} to end\n{worker.describe()}")
        for name, task_id in sent.items()
    }
    stage.wait_empty()
    # The line about a success is written after the result is stored.
    worker_log = until(
        lambda: worker.log if all(worker.log.count(i) >= 2 for i in sent.values()) else None,
        lambda: f"two lines for each task\n{worker.log}",
    )
    status = worker.stop()
    return {
        "documents": {name: comparable(document) for name, document in documents.items()},
        "lines": {name: by_process(lines_of_task(worker_log, task_id)) for name, task_id in sent.items()},
        "status": status,
    }


@pytest.mark.parametrize(("broker", "extended"), [("redis", False), ("redis", True), ("amqp", False)])
def test_every_kind_of_task_ends_the_same_way(alike, broker, extended):
    seen = alike(all_outcomes, broker=broker, result_extended=extended)
    documents = seen["documents"]
    assert documents["add"]["result"] == "10"
    assert documents["requeue_once"]["status"] == "SUCCESS"
    assert documents["fail"]["last"] == ["ValueError: it broke"]
    assert documents["retry_in_vain"]["type"] == "ConnectionError"
    assert documents["reject"]["status"] == "FAILURE"
    assert documents["hooked.bad_hook"]["status"] == "SUCCESS"
    assert seen["lines"]["add"] == {
        "MainProcess": [("INFO", "Task add[<id>] received")],
        "ForkPoolWorker-<n>": [("INFO", "Task add[<id>] succeeded in <time>s: 10")],
    }
    assert seen["status"] == 0


def test_what_is_stored_in_redis_is_the_same_byte_for_byte_but_for_ids_and_times(alike):
    def stored(stage):
        worker = stage.worker()
        client = stage.redis()
        found = {}
        for name, args in [("add", (4, 6)), ("fail", ("x",)), ("parent_of", ())]:
            result = stage.send(name, *args)
            until(lambda r=result: r.ready(), worker.describe)
            key = f"celery-task-meta-{result.id}"
            text = plain(client.get(key).decode())
            text = re.sub(r'"date_done": "[^"]+"', '"date_done": "<time>"', text)
            text = re.sub(r'"traceback": "(?:[^"\\]|\\.)+"', '"traceback": "<text>"', text)
            found[name] = (text, client.ttl(key) > 86000)
        return found

    seen = alike(stored)
    assert seen["add"][1], "a result expires after a day"
    assert json.loads(seen["add"][0]) == {
        "status": "SUCCESS", "result": 10, "traceback": None, "children": [], "date_done": "<time>",
        "task_id": "<id>",
    }  # fmt: skip


def test_hooks_of_custom_task_classes_run_in_order_and_after_the_result_is_stored(alike):
    def hooks(stage):
        stage.worker()
        sent = {
            "succeed": stage.send("hooked.succeed", 21),
            "fail": stage.send("hooked.fail", "no"),
            "retry": stage.send("hooked.retry"),
            "counting": stage.send("hooked.counting"),
            "again": stage.send("hooked.counting"),
            "by_class": stage.send("hooked.by_class", 1),
            "refuses": stage.send("hooked.refuses"),
            "bad_hook": stage.send("hooked.bad_hook"),
        }
        found = {}
        for name, result in sent.items():
            stage.wait_journal("after_return", id=result.id)
            found[name] = [
                {key: value for key, value in line.items() if key not in ("pid", "time", "id")}
                for line in stage.journal(id=result.id)
            ]
        return found

    seen = alike(hooks)
    assert [line["event"] for line in seen["succeed"]] == [
        "before_start",
        "body",
        "on_success",
        "after_return",
    ]
    assert seen["succeed"][2]["stored"] == "SUCCESS"
    assert [line["event"] for line in seen["fail"]] == ["before_start", "on_failure", "after_return"]
    assert seen["fail"][1]["stored"] == "FAILURE"
    assert [line["event"] for line in seen["retry"]] == [
        "before_start", "on_retry", "before_start", "on_success", "after_return",
    ]  # fmt: skip
    assert seen["again"][1]["runs"] == 2, "one instance a process keeps its state"


def test_a_task_that_ignores_its_result_stores_nothing(alike):
    def silence(stage):
        worker = stage.worker()
        by_task = stage.send("silent")
        by_call = stage.send("add", 1, 1, ignore_result=True)
        ignored = stage.send("ignore")
        worker.wait_log(f"ignore[{ignored.id}] ignored")
        stage.wait_journal("ran", number="silent")
        worker.wait_log("succeeded", count=2)
        stage.wait_empty()
        return [stage.app.backend.get_task_meta(result.id)["status"] for result in (by_task, by_call, ignored)]

    assert alike(silence) == ["PENDING", "PENDING", "SEEN"]


def test_the_request_that_a_task_sees_is_the_same(alike):
    volatile = {
        "hostname",
        "origin",
        "reply_to",
        "eta",
        "expires",
        "properties",
        "delivery_info",
        "correlation_id",
    }

    def request(stage):
        stage.worker()
        plain_call = stage.send("request_attributes", 1, kwargs={"a": 2}).get(timeout=30)
        loaded = stage.send(
            "request_attributes", headers={"traceparent": "00-1"}, shadow="other", priority=3, time_limit=60,
            soft_time_limit=50, countdown=0.1, expires=600,
        ).get(timeout=30)  # fmt: skip
        return [
            {key: plain(value) for key, value in seen.items() if key not in volatile}
            | {"keys": sorted(seen), "properties": sorted(eval(seen["properties"]))}
            | {"delivery_info": {k: plain(repr(v)) for k, v in eval(seen["delivery_info"]).items()}}
            for seen in (plain_call, loaded)
        ]

    seen = alike(request)
    assert seen[0]["args"] == "[1]"
    assert seen[1]["headers"] == "{'traceparent': '00-1'}"
    assert seen[1]["timelimit"] == "[60, 50]"


def test_a_child_looks_like_one_of_billiards(alike):
    def identity(stage):
        stage.worker(concurrency=2)
        seen = stage.send("whoami").get(timeout=30)
        return {**seen, "pid": seen["pid"] > 1, "name": plain(seen["name"]), "index": seen["index"] in (0, 1)}

    assert alike(identity) == {
        "pid": True, "name": "ForkPoolWorker-<n>", "index": True, "daemon": True, "same": True,
    }  # fmt: skip


def test_prints_and_task_loggers_reach_the_log(alike):
    def spoken(stage):
        worker = stage.worker()
        stage.send("speak").get(timeout=30)
        worker.wait_log("logged")
        return list(lines_of_task(worker.log, "printed") + lines_of_task(worker.log, "logged"))

    seen = alike(spoken)
    assert next((level, text) for level, _, text in seen) == ("WARNING", "printed")
