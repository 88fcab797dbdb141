"""What arrives on a queue, good and bad: protocol 1 and 2, and everything that is neither."""

import json
import os
import pickle
import uuid

import pytest
from support import raw
from support.lines import lines
from support.waiting import until


def settled(stage, worker):
    """The queue goes on: a good task sent after the bad message runs, and nothing is left unsettled."""
    good = stage.send("add", 2, 2)
    assert good.get(timeout=30) == 4
    # Its two lines come after all that was said about the bad one, in the parent and in the child.
    worker.wait_log(good.id, count=2)
    stage.wait_empty()
    return worker.process.poll() is None


BAD = {
    "unknown task": lambda i: (raw.headers("not_there", i), raw.body(), {}),
    "body not JSON": lambda i: (raw.headers("add", i), b"{not json", {}),
    "no header, body not JSON": lambda i: ({}, b"{not json", {}),
    "no header, body not a task": lambda i: ({}, b'{"hello": 1}', {}),
    "no header, body a number": lambda i: ({}, b"7", {}),
    "content type refused": lambda i: (
        raw.headers("add", i), pickle.dumps([[], {}, {}]),
        {"content_type": "application/x-python-serialize", "content_encoding": "binary"},
    ),
    "content type unknown": lambda i: (raw.headers("add", i), b"x", {"content_type": "application/x-nobody-knows"}),
    "eta unreadable": lambda i: (raw.headers("add", i, eta="tomorrow"), raw.body((1, 1)), {}),
    "expires unreadable": lambda i: (raw.headers("add", i, expires="never"), raw.body((1, 1)), {}),
    "already expired": lambda i: (
        raw.headers("add", i, expires="2020-01-01T00:00:00+00:00"), raw.body((1, 1)), {}
    ),
    "wrong arguments": lambda i: (raw.headers("add", i), raw.body((1, 1, 1, 1)), {}),
    "unknown type in JSON": lambda i: (
        raw.headers("add", i), raw.body(({"__type__": "nobody", "__value__": 1}, 1)), {}
    ),
    "compression broken": lambda i: (raw.headers("add", i, compression="application/x-gzip"), b"not gzip", {}),
}  # fmt: skip


# Those that leave a result.
STORED = {"unknown task", "already expired", "wrong arguments"}


def ended(stage, task_id):
    document = stage.app.backend.get_task_meta(task_id, cache=False)
    return document if document["status"] != "PENDING" else None


@pytest.mark.parametrize("broker", ["redis", "amqp"])
def test_bad_messages_are_logged_and_settled_as_ever(alike, broker):
    """One worker meets all of them, each followed by a good task."""

    def meet(stage):
        worker = stage.worker()
        found = {}
        for name, make in BAD.items():
            before = len(worker.log)
            task_id = str(uuid.uuid4())
            head, body, more = make(task_id)
            raw.put(stage, head, body, **more)
            alive = settled(stage, worker)
            said = [
                # What a decoder says in detail is its own affair.
                (level, process, text[: 26 if text.startswith("Can't decode") else 60])
                for level, process, text in lines(worker.log[before:])
                if "Task add[<id>] received" not in text and "succeeded in" not in text
            ]
            state = stage.app.backend.get_task_meta(task_id, cache=False)
            if name in STORED:
                state = until(lambda i=task_id: ended(stage, i), lambda n=name: f"{n} stored\n{worker.log}")
            found[name] = {
                "alive": alive,
                "said": said,
                "state": state["status"],
                "result": repr(state["result"])[:60],
            }
        return found

    seen = alike(meet, broker)
    assert all(case["alive"] for case in seen.values())
    assert seen["unknown task"]["state"] == "FAILURE"
    assert seen["already expired"]["state"] == "REVOKED"
    assert seen["body not JSON"]["said"][0][0] == "CRITICAL"
    assert seen["wrong arguments"]["state"] == "FAILURE"


HOSTILE = {
    "no id": lambda: ({"task": "add"}, raw.body((1, 1)), {}),
    "body of two": lambda: (raw.headers("add"), b"[[], {}]", {}),
    "body of four": lambda: (raw.headers("add"), b"[[], {}, {}, {}]", {}),
    "body a number": lambda: (raw.headers("add"), b"7", {}),
    "body null": lambda: (raw.headers("add"), b"null", {}),
    "body deep": lambda: (raw.headers("add"), b"[" * 100_000 + b"]" * 100_000, {}),
    "kwargs a list": lambda: (raw.headers("add"), b"[[1, 1], [], {}]", {}),
    "args a number": lambda: (raw.headers("add"), b"[1, {}, {}]", {}),
    "embed a list": lambda: (raw.headers("add"), b"[[1, 1], {}, []]", {}),
    "id a number": lambda: (raw.headers("add", "x") | {"id": 7}, raw.body((1, 1)), {}),
    "id a list": lambda: (raw.headers("add", "x") | {"id": [1]}, raw.body((1, 1)), {}),
    "task a number": lambda: (raw.headers("add") | {"task": 7}, raw.body((1, 1)), {}),
    "eta a list": lambda: (raw.headers("add", eta=[1]), raw.body((1, 1)), {}),
    "eta in the year 9999": lambda: (raw.headers("add", eta="9999-12-31T23:59:59-12:00"), raw.body((1, 1)), {}),
    "retries text": lambda: (raw.headers("add", retries="many"), raw.body((1, 1)), {}),
    "timelimit a number": lambda: (raw.headers("add", timelimit=7), raw.body((1, 1)), {}),
    "nothing at all": lambda: ({}, b"", {}),
    "bytes": lambda: ({}, bytes(range(256)), {"content_type": "application/data", "content_encoding": "binary"}),
}  # fmt: skip


@pytest.mark.ours
@pytest.mark.parametrize("broker", ["redis", "amqp"])
def test_messages_that_end_the_original_are_settled(stage_on, kind, broker):
    """The original ends with status 1 on several of these, and the message is there again at the next start."""
    stage = stage_on(kind, broker)
    worker = stage.worker()
    for name, make in HOSTILE.items():
        before = len(worker.log)
        head, body, more = make()
        raw.put(stage, head, body, **more)
        assert settled(stage, worker), f"{name}:\n{worker.describe()}"
        text = worker.log[before:]
        assert "panicked" not in text, f"{name}:\n{text}"
    assert worker.stop() == 0


@pytest.mark.ours
def test_what_lies_in_redis_that_is_no_envelope_is_logged_and_gone(stage_on, kind):
    stage = stage_on(kind)
    worker = stage.worker()
    for junk in (
        b"",
        b"junk",
        b"[]",
        b"7",
        b'{"body": 7}',
        b"\xff\xfe",
        b'{"body": "x", "properties": null}',
    ):
        before = len(worker.log)
        stage.redis().lpush(stage.queue, junk)
        assert settled(stage, worker), f"{junk}:\n{worker.describe()}"
        assert lines(worker.log[before:]), junk


def test_protocol_1_runs(alike):
    def old(stage):
        worker = stage.worker()
        stage.app.conf.task_protocol = 1
        with_link = stage.send("add", 1, 2, link=stage.s("mark"))
        failing = stage.send("fail", "old")
        delayed = stage.send("add", 3, 4, countdown=0.5)
        assert with_link.get(timeout=30) == 3
        assert delayed.get(timeout=30) == 7
        stage.wait_journal("ran", number=3)
        until(failing.ready, worker.describe)
        stage.wait_empty()
        return [failing.state, repr(failing.result), delayed.state]

    assert alike(old) == ["FAILURE", "ValueError('old')", "SUCCESS"]


class Deadly:
    """Whoever unpickles it ends."""

    def __reduce__(self):
        return os._exit, (3,)


PICKLED = {"content_type": "application/x-python-serialize", "content_encoding": "binary"}

# Protocol 1 that only a child may decode: what it finds in it.
OLD = {
    "not a task": {"hello": 1},
    "a number": 7,
    "kwargs a list": {"task": "add", "id": "1", "args": (1, 1), "kwargs": [1]},
    "unknown task": {"task": "not_there", "id": "2", "args": (), "kwargs": {}},
    "expired": {"task": "add", "id": "3", "args": (1, 1), "kwargs": {}, "expires": "2020-01-01T00:00:00+00:00"},
}


def test_bad_messages_of_protocol_1_are_logged_and_settled_as_ever(alike):
    def meet(stage):
        worker = stage.worker()
        found = {}
        for name, body in OLD.items():
            before = len(worker.log)
            raw.put(stage, {}, pickle.dumps(body), **PICKLED)
            alive = settled(stage, worker)
            found[name] = [alive] + [
                (level, text[:40])
                for level, _, text in lines(worker.log[before:])
                if "Task add[<id>] received" not in text and "succeeded in" not in text
            ]
        return found

    seen = alike(meet, accept_content=["json", "pickle"])
    assert all(seen[name][1][1].startswith("Received and deleted unknown") for name in ("not a task", "a number"))
    assert "invalid" in seen["kwargs a list"][1][1]


@pytest.mark.ours
def test_a_message_of_protocol_1_that_kills_who_decodes_it_is_given_up(stage_on, kind):
    stage = stage_on(kind, accept_content=["json", "pickle"])
    worker = stage.worker()
    raw.put(stage, {}, pickle.dumps({"task": "add", "id": "1", "args": (Deadly(),)}), **PICKLED)
    assert settled(stage, worker), worker.describe()
    assert "the child that decoded it was lost: exitcode 3" in worker.log
    assert worker.stop() == 0


@pytest.mark.parametrize("protocol", [2, 1])
@pytest.mark.parametrize("broker", ["redis", "amqp"])
def test_every_serializer_with_every_compression_arrives_and_returns(alike, broker, protocol):
    serializers = ["json", "pickle", "yaml", "msgpack"]
    compressions = [None, "gzip", "bzip2", "lzma"]
    value = ["zwölf", 12, 1.5, None, True, {"a": [1, 2]}]

    def matrix(stage):
        stage.worker(concurrency=2)
        stage.app.conf.task_protocol = protocol
        sent = {
            f"{serializer} {compression}": stage.send(
                "echo", value, kwargs={"k": "v"}, serializer=serializer, compression=compression
            )
            for serializer in serializers
            for compression in compressions
        }
        found = {name: result.get(timeout=30) for name, result in sent.items()}
        stage.wait_empty()
        return json.loads(json.dumps(found))

    seen = alike(matrix, broker, accept_content=serializers)
    assert len(seen) == 16
    assert all(returned == [[value], {"k": "v"}] for returned in seen.values())


@pytest.mark.parametrize("serializer", ["pickle", "yaml", "msgpack"])
def test_results_are_written_with_the_serializer_of_the_results(alike, serializer):
    def written(stage):
        stage.worker()
        good = stage.send("echo", 1, kwargs={"a": [2]})
        bad = stage.send("fail_with_two_arguments")
        answer = good.get(timeout=30)
        until(bad.ready, stage.logs)
        return [[list(answer[0]), answer[1]], bad.state, type(bad.result).__name__]

    seen = alike(written, result_serializer=serializer, result_accept_content=[serializer])
    assert seen[0] == [[1], {"a": [2]}]
    assert seen[1] == "FAILURE"


def test_types_beyond_json_travel(alike):
    from datetime import date, datetime, time, timezone
    from decimal import Decimal

    values = [
        datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=timezone.utc), date(2026, 1, 2), time(3, 4),
        Decimal("1.50"), uuid.UUID(int=7), b"bytes", b"\xff\x00",
    ]  # fmt: skip

    def travelled(stage):
        stage.worker()
        return repr(stage.send("echo", *values).get(timeout=30))

    assert alike(travelled) == repr([values, {}])


def test_eta_countdown_and_expiry_are_kept(alike):
    def timed(stage):
        worker = stage.worker()
        soon = stage.send("mark", 1, countdown=1.0)
        now = stage.send("mark", 2)
        too_late = stage.send("mark", 3, countdown=1.0, expires=0.2)
        soon.get(timeout=30)
        now.get(timeout=30)
        until(too_late.ready, worker.describe)
        stage.wait_empty()
        return [[line["number"] for line in stage.journal("ran")], too_late.state, repr(too_late.result)]

    assert alike(timed) == [[2, 1], "REVOKED", "TaskRevokedError('expired')"]


def test_priorities_order_what_waits(alike):
    def ordered(stage):
        for number, priority in enumerate([9, 0, 6, 3, 0, 9]):
            stage.send("mark", number, priority=priority)
        stage.worker(conf={"worker_prefetch_multiplier": 1})
        stage.wait_journal("ran", count=6)
        return [line["number"] for line in stage.journal("ran")]

    # On Redis a small number goes first.
    assert alike(ordered) == [1, 4, 3, 2, 0, 5]


def test_revoked_tasks_do_not_run(alike):
    def revoked(stage):
        worker = stage.worker()
        stage.send("sleep", 1.5)
        stage.wait_journal("started")
        victim = stage.send("mark", 1)
        until(lambda: victim.id in worker.log, worker.describe)
        stage.app.control.revoke(victim.id)
        until(lambda: victim.state == "REVOKED", worker.describe)
        running = stage.send("sleep", 60)
        stage.wait_journal("started", count=2)
        stage.app.control.revoke(running.id, terminate=True)
        until(lambda: running.state == "REVOKED", worker.describe)
        assert stage.send("add", 1, 1).get(timeout=30) == 2
        return [stage.journal("ran", number=1), repr(victim.result), repr(running.result)]

    assert alike(revoked) == [[], "TaskRevokedError('revoked')", "TaskRevokedError('terminated')"]
