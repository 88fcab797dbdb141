"""What is stored of a task: its states in order, results and exceptions of every sort, under every setting for it."""

import json
import re

import pytest
from support.lines import plain
from support.outcomes import ENDED, Published, comparable, story
from support.waiting import until

VALUES = [
    "none", "text", "surrogate", "number", "float", "nan", "datetime", "date", "decimal", "uuid", "bytes", "set",
    "tuple", "pair", "keys", "bad_keys", "object", "function", "lock", "generator", "exception", "recursive",
    "signature", "huge",
]  # fmt: skip
EXCEPTIONS = [
    "custom", "keywords", "unspeakable", "unpicklable", "unencodable", "non_ascii", "surrogate", "no_arguments", "key",
    "os", "unicode", "many", "long", "stop", "group", "local", "nested",
]  # fmt: skip

# id: task, arguments, options of the call.
CALLS = {
    **{f"value-{which}": ("value", (which,), {}) for which in VALUES},
    **{f"error-{which}": ("error", (which,), {}) for which in EXCEPTIONS},
    "chained": ("chained_error", (), {}),
    "long-argument": ("length", ("x" * (1 << 20),), {"kwargs": {"schön": "☃" * 1000}}),
    "started": ("started", (), {}),
    "progress": ("progress", (), {"kwargs": {"other": "progress-other"}}),
    "success-first": ("success_first", (), {}),
    "failure-by-hand": ("failure_by_hand", (), {}),
    "bad-state": ("bad_state", (), {}),
    "ignoring": ("ignoring", (), {}),
    "ignoring-not": ("ignoring", (), {"ignore_result": False}),
    "ignored-by-call": ("started", (), {"ignore_result": True}),
    "ignored-error": ("ignoring_error", (), {}),
    "storing-errors": ("storing_errors", (), {}),
    "error-ignored-by-call": ("error", ("key",), {"ignore_result": True}),
    "reject-early": ("reject", (), {}),
    "requeue-early": ("reject", (), {"kwargs": {"requeue": True}}),
    "reject-late": ("reject_late", (), {}),
    "requeue-late": ("reject_late", (), {"kwargs": {"requeue": True}}),
    "forget": ("forget", (), {}),
    "expired": ("started", (), {"expires": -1}),
    "not-expired": ("started", (), {"expires": 600}),
    "replied": ("value", ("none",), {"reply_to": "nobody"}),
}  # fmt: skip
# These take their time, or a child with them.
SLOW = {
    "exit": ("exit", (), {}),
    "exit-3": ("exit", (3,), {}),
    "exit-text": ("exit", ("a text",), {}),
    "generator_exit": ("error", ("generator_exit",), {}),
    "soft-caught": ("soft_caught", (), {}),
    "soft": ("soft", (), {}),
    "hard": ("hard", (), {}),
    "soft-then-hard": ("soft_then_hard", (), {}),
}  # fmt: skip
HUGE = {"value-huge", "long-argument"}


# Their classes are the worker's: this process cannot unpickle them.
FOREIGN = {
    *(f"error-{which}" for which in ("custom", "keywords", "unspeakable", "nested", "local", "unpicklable")),
    *(f"value-{which}" for which in ("pair", "function", "signature", "object")),
    "chained",
}


def play(stage, *options, env=None):
    worker = stage.worker(*options, app="semantics", env=env)
    calls = {
        task_id: call
        for task_id, call in (CALLS | (SLOW if "result_expires" in stage.conf else {})).items()
        if stage.conf.get("result_serializer") != "pickle" or task_id not in FOREIGN
    }
    published = Published(stage) if stage.conf["result_backend"].startswith("redis") else None
    for task_id, (name, args, call) in calls.items():
        stage.send(f"states.{name}", *args, task_id=task_id, **call)
    # One child takes them in order: with the last one all are done.
    stage.send("states.value", "none", task_id="last")
    worker.wait_log("[last] succeeded", timeout=60)
    stage.wait_empty()
    found = {}
    for task_id in [*calls, "progress-other"]:
        told = found[task_id] = story(stage, worker, task_id)
        document = stage.app.backend.get_task_meta(task_id, cache=False)
        told["document"] = comparable(document) if document["status"] in ENDED else document["status"]
        if published:
            told["published"] = published.of(task_id)
        if task_id in HUGE and document["status"] in ENDED:
            shown = told["document"]
            told["document"] = [shown["status"], len(shown["result"])]
            told.pop("published", None)
    return found


@pytest.mark.parametrize(
    ("broker", "conf"),
    [
        ("redis", {"result_expires": 3600}),
        ("amqp", {"result_extended": True, "task_track_started": True, "task_store_errors_even_if_ignored": True}),
        ("redis", {"result_compression": "gzip", "task_ignore_result": True}),
        ("redis", {
            "result_serializer": "pickle", "result_accept_content": ["pickle", "json"], "task_remote_tracebacks": True,
        }),
    ],
    ids=["plain", "extended", "compressed", "pickled"],
)  # fmt: skip
def test_everything_that_a_task_can_return_or_raise_is_stored_alike(alike, broker, conf):
    seen = alike(play, broker, **conf)
    if "result_expires" in conf:
        assert seen["value-tuple"]["document"]["result"] == "[1, [2, 3]]"
        assert seen["value-object"]["document"]["type"] == "EncodeError"
        assert seen["progress-other"]["document"] == "ELSEWHERE"
        assert [stored["status"] for stored in seen["started"]["published"]] == ["STARTED", "SUCCESS"]
        assert seen["expired"]["document"]["type"] == "TaskRevokedError"
        assert seen["storing-errors"]["document"]["status"] == "FAILURE"


@pytest.mark.parametrize("pool", ["threads", "solo", "gevent", "eventlet"])
def test_other_pools_store_the_same(alike, pool):
    alike(lambda stage: play(stage, f"--pool={pool}"))


@pytest.mark.parametrize("serializer", ["yaml", "msgpack"])
def test_results_travel_in_every_serializer(alike, serializer):
    def serialized(stage):
        stage.worker(app="semantics")
        sent = {which: stage.send("states.value", which, serializer=serializer) for which in ("text", "float", "tuple")}
        sent["error"] = stage.send("states.error", "key", compression="bzip2")
        for result in sent.values():
            until(result.ready, stage.logs)
        return {
            name: comparable(stage.app.backend.get_task_meta(result.id, cache=False)) for name, result in sent.items()
        }

    accept = ["json", serializer]
    alike(serialized, result_serializer=serializer, accept_content=accept, result_accept_content=accept)


def test_a_task_that_succeeded_is_not_run_again(alike):
    def delivered_again(stage):
        worker = stage.worker(app="semantics", concurrency=2)
        from support import raw

        def deliver(task_id, redelivered):
            headers = raw.headers("states.dedupe", task_id)
            info = {"exchange": "", "routing_key": stage.queue, "redelivered": redelivered}
            raw.put(stage, headers | ({"redelivered": True} if redelivered else {}), raw.body(), delivery_info=info)

        deliver("twice", False)
        worker.wait_log("[twice] succeeded")
        deliver("twice", True)
        worker.wait_log("[twice] Task already completed successfully.")
        deliver("twice", False)
        worker.wait_log("[twice] succeeded", count=2)
        stage.wait_empty()
        return len(stage.journal("run", id="twice")), story(stage, worker, "twice")["lines"]["MainProcess"]

    assert alike(delivered_again, worker_deduplicate_successful_tasks=True)[0] == 2


def timeless(text):
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:.+]+", "<time>", text)


def test_user_code_sees_the_same_request(alike):
    differs = {"hostname", "origin", "reply_to", "eta", "expires", "correlation_id"}

    def requests(stage):
        stage.worker(app="semantics")
        calls = [
            {"args": (1, "zwölf"), "kwargs": {"a": {"b": None}}},
            {
                "headers": {"traceparent": "00-1", "x": {"y": 1}}, "shadow": "other", "priority": 3, "time_limit": 60,
                "soft_time_limit": 50, "countdown": 0.1, "expires": 600, "ignore_result": False, "retries": 1,
                "root_id": "root", "parent_id": "parent", "group_id": "group", "group_index": 2,
                "link": stage.s("states.value", "none", immutable=True),
                "link_error": stage.s("states.value", "none", immutable=True),
                "argsrepr": "(given)", "kwargsrepr": "{given}", "replaced_task_nesting": 3,
                "stamped_headers": ["stamp"], "stamp": "s1", "stamps": {"stamp": ["s1"]},
            },
            {"routing_key": stage.queue, "exchange": stage.queue, "delivery_mode": 1, "serializer": "json"},
        ]  # fmt: skip
        found = []
        for call in calls:
            call = dict(call)
            args = call.pop("args", ())
            answer = stage.app.send_task("states.everything", args, **call).get(timeout=30)
            seen = answer.pop("seen")
            properties = eval(seen.pop("properties"))
            info = eval(seen.pop("delivery_info"))
            found.append({
                **answer,
                "names": sorted(seen),
                "values": {name: plain(value) for name, value in seen.items() if name not in differs},
                "set": {name: seen[name] != "None" for name in differs if name in seen},
                "properties": timeless(plain(json.dumps(properties, sort_keys=True, default=repr))),
                "info": {name: plain(repr(value)) for name, value in info.items()},
            })  # fmt: skip
        return found

    for broker in ("redis", "amqp"):
        seen = alike(requests, broker)
        assert seen[0]["values"]["args"] == "[1, 'zwölf']"
        assert seen[1]["values"]["timelimit"] == "[60, 50]"


def test_the_request_of_a_protocol_1_message_is_the_same(alike):
    # Kept beyond what Celery keeps: the order in a chord, and what arguments look like.
    more = {"argsrepr", "kwargsrepr", "group_index", "utc"}

    def request(stage):
        stage.app.conf.task_protocol = 1
        stage.worker(app="semantics", conf={"task_protocol": 1})
        answer = stage.app.send_task(
            "states.everything", (1, "z"), {"a": {"b": 1}}, shadow="other", time_limit=50, group_id="group",
            group_index=1, root_id="root", headers={"tenant": "a"},
        ).get(timeout=30)  # fmt: skip
        differs = {"origin", "hostname", "reply_to", "correlation_id"} | more
        answer["seen"] = {name: plain(value) for name, value in answer["seen"].items() if name not in differs}
        return answer

    seen = alike(request)["seen"]
    assert seen["tenant"] == "'a'"
    assert seen["headers"] == "{'meth': None, 'tenant': 'a'}"
