"""What follows a task: each message that continues one, with what its task sees, on both rungs."""

import pytest
from celery import chain, chord, group
from support.waiting import until

SWITCH = "CELERIAC_CONTINUATIONS"
RUNGS = [("redis", "redis", "native"), ("redis", "redis", "python"), ("amqp", "redis", "native")]


def workflows(stage):
    """Name and signature; ids are given, so that everything can be compared."""
    app = stage.app

    def s(id, name="look", *args, immutable=False, **options):
        return app.signature(name, args=args, immutable=immutable).set(task_id=id, **options)

    yield (
        "chain",
        chain(
            s("c1"),
            s("c2", "look", 2),
            s("c3", "look", "immutable", immutable=True),
            s("c4", "look").set(link=s("c4-link"), link_error=s("c4-error", "errback")),
            s("c5", "limited", 5),
            s("c6", "look", ignore_result=True),
            s("c7", "look", time_limit=9, shadow="shown", headers={"x-tenant": "a"}),
            s("c8", "look", stamped_headers=["stamp"], stamp={"a": [1]}),
            app=app,
        ),
    )
    yield "callback", s("k1").set(link=s("k2", "look", 2))
    yield "callback and chain", chain(s("b1").set(link=s("b2")), s("b3"), app=app)
    yield "values that JSON changes", chain(s("o1", "odd"), s("o2", "odd"), s("o3"), app=app)
    yield "changed", chain(s("x1", "changes"), s("x2"), s("x3"), app=app)
    yield "ended", chain(s("e1", "ends"), s("e2"), app=app)
    yield "added", s("a1", "adds")
    yield "replaced", chain(s("r1"), s("r2", "replaced"), s("r3", "look", 3), s("r4"), app=app)
    yield "prioritized", chain(s("p1", priority=6), s("p2"), s("p3", priority=3), app=app)
    yield (
        "fails",
        chain(s("f1"), s("f2"), s("f3", "fail"), s("f4"), s("f5").set(link_error=s("f6", "errback")), app=app),
    )
    yield "unknown", chain(s("u1"), s("u2", "nowhere"), app=app)
    yield "countdown", chain(s("t1"), s("t2", countdown=0.1), s("t3"), app=app)


LAST = {
    "chain": ["c8", "c4-link"],
    "callback": ["k2"],
    "callback and chain": ["b2", "b3"],
    "values that JSON changes": ["o3"],
    "changed": ["x3"],
    "added": ["added"],
    "replaced": ["r4"],
    "prioritized": ["p3"],
    "countdown": ["t3"],
}


def plain(stage, text):
    """Without what is another in each run."""
    for own, shown in ((stage.app.thread_oid, "OID"), (stage.queue, "QUEUE")):
        text = text.replace(own, shown)
    return text


def follow(rung):
    def scenario(stage):
        stage.worker(app="follows", concurrency=2, env={SWITCH: rung}, conf={"task_inherit_parent_priority": True})
        for _, signature in workflows(stage):
            signature.apply_async()
        for ids in LAST.values():
            for id in ids:
                stage.wait_journal("saw", id=id)
        state = stage.app.AsyncResult
        until(lambda: all(state(id).state == "FAILURE" for id in ("u2", "f3", "f5")), stage.logs)
        until(lambda: state("e1").ready() and state("x1").ready(), stage.logs)
        seen = {}
        for line in stage.journal("saw"):
            del line["pid"], line["time"]
            if line["reply_to"].strip("'") != stage.app.thread_oid:
                line["reply_to"] = "of the child that sent it"
            seen[line["id"]] = {key: plain(stage, str(value)) for key, value in line.items()}
        children = {
            id: [list(child.as_tuple()[0]) for child in state(id)._get_task_meta().get("children") or []]
            for id in sorted(seen)
            if id not in ("c5", "c6")
        }
        return {"seen": dict(sorted(seen.items())), "children": children, "errbacks": len(stage.journal("errback"))}

    return scenario


@pytest.mark.parametrize(("broker", "backend", "rung"), RUNGS)
def test_what_follows_a_task_is_sent_as_celery_sends_it(alike, broker, backend, rung):
    seen = alike(follow(rung), broker, backend)
    assert seen["children"]["c1"] == [["c2", None]]
    assert "e2" not in seen["seen"]
    assert seen["seen"]["x2"]["args"] == "(None, 'changed')"
    assert seen["seen"]["p2"]["delivery"].count("6")


def elsewhere(rung):
    def scenario(stage):
        other = f"{stage.queue}-other"
        stage.worker("-Q", stage.queue, app="follows", env={SWITCH: rung})
        steps = [stage.s("look").set(task_id=id) for id in ("w1", "w2", "w3")]
        chain(steps[0], steps[1].set(queue=other), steps[2].set(queue=stage.queue), app=stage.app).apply_async()
        # Nobody has declared the queue before the step is sent there.
        until(lambda: stage.app.AsyncResult("w1").ready(), stage.logs)
        stage.worker("-Q", other, app="follows", env={SWITCH: rung})
        stage.wait_journal("saw", id="w3")
        return [line["delivery"].replace(stage.queue, "QUEUE") for line in stage.journal("saw")]

    return scenario


@pytest.mark.parametrize(("broker", "backend", "rung"), RUNGS)
def test_a_step_may_go_to_a_queue_that_others_consume(alike, broker, backend, rung):
    assert len(alike(elsewhere(rung), broker, backend)) == 3


def chords(rung):
    def scenario(stage):
        stage.worker(app="follows", concurrency=2, env={SWITCH: rung})
        s, app = stage.s, stage.app

        def members(*values):
            return [s("number", value) for value in values]

        plain_chord = chord(members(*range(20)), s("total"), app=app).apply_async()
        in_chain = chain(s("number", 1), group([s("number"), s("number")], app=app), s("total"), s("look"), app=app)
        in_chain = in_chain.apply_async()
        nested = chord(
            [chord(members(1, 2), s("total"), app=app), *members(3), group(members(4, 5), app=app)],
            s("look").set(task_id="nested"),
            app=app,
        ).apply_async()
        failing = chord([*members(1), s("fail")], s("total").on_error(s("errback")), app=app).apply_async()
        until(failing.ready, stage.logs)
        return {
            "plain": plain_chord.get(timeout=30),
            "in chain": in_chain.get(timeout=30),
            "nested": nested.get(timeout=30),
            "nested saw": stage.wait_journal("saw", id="nested")[0]["args"],
            "failing": [failing.state, type(failing.result).__name__],
            "left": sorted(
                key.decode().rpartition(".")[2]
                for key in app.backend.client.keys("celery-taskset-meta-*.*")
                if not key.endswith(b".o")
            ),
        }

    return scenario


@pytest.mark.parametrize(("broker", "backend", "rung"), RUNGS)
def test_chords_end_as_with_celery_and_leave_the_same_keys(alike, broker, backend, rung):
    seen = alike(chords(rung), broker, backend)
    assert seen["plain"] == 190
    assert seen["failing"] == ["FAILURE", "ChordError"]


def member(stage, group_id, index, value, body="body"):
    """A member of a chord, sent as if its message had been delivered (again)."""
    signature = dict(stage.s("look").set(task_id=body, reply_to="oid"))
    return stage.send(
        "number", value, task_id=f"{group_id}-{index}", group_id=group_id, group_index=index, chord=signature
    )


def redelivered(rung):
    def scenario(stage):
        stage.worker(app="follows", env={SWITCH: rung})
        stage.app.backend.set_chord_size("g", 3)
        # The first comes twice, the second time with another result; the last comes again when all is over.
        for index, value in ((0, 1), (0, 2), (1, 3), (1, 3), (2, 4)):
            member(stage, "g", index, value).get(timeout=30)
        stage.wait_journal("saw", id="body")
        for index, value in ((2, 4), (2, 5), (0, 6)):
            member(stage, "g", index, value)
        stage.send("look", task_id="after")
        stage.wait_journal("saw", id="after")
        return [line["args"] for line in stage.journal("saw", id="body")]

    return scenario


@pytest.mark.parametrize("rung", ["native", "python"])
@pytest.mark.parametrize("ordered", [True, False])
def test_a_member_of_a_chord_counts_once_and_the_body_is_sent_once(alike, rung, ordered):
    options = {"result_chord_ordered": ordered}
    assert alike(redelivered(rung), result_backend_transport_options=options) == ["([1, 3, 4],)"]


@pytest.mark.ours
@pytest.mark.parametrize("rung", ["native", "python"])
def test_a_member_whose_worker_died_before_it_sent_the_body_sends_it_when_it_comes_again(kind, stage_on, rung):
    stage = stage_on(kind)
    stage.worker(app="follows", env={SWITCH: rung})
    backend, client = stage.app.backend, stage.app.backend.client
    for group_id, told in (("own", "own-1:1"), ("others", "others-0:0")):
        backend.set_chord_size(group_id, 2)
        key = "celery-taskset-meta-" + group_id
        member(stage, group_id, 0, 1, f"body of {group_id}")
        # Its result is there before it is counted.
        until(lambda key=key: client.scard(f"{key}.d") == 1, stage.logs)
        # As if another worker had counted the last member, and died.
        client.sadd(f"{key}.d", f"{group_id}-1:1")
        client.zadd(f"{key}.j", {backend.encode([1, f"{group_id}-1", "SUCCESS", 2]): 1})
        client.set(f"{key}.c", "token", ex=60)
        client.set(f"{key}.o", told, ex=60)
        member(stage, group_id, 1, 3, f"body of {group_id}")
    assert stage.wait_journal("saw", id="body of own")[0]["args"] == "([1, 2],)"
    # Whoever was told to send it has its time to do so.
    stage.send("look", task_id="after")
    stage.wait_journal("saw", id="after")
    assert not stage.journal("saw", id="body of others")
    client.delete("celery-taskset-meta-others.c")
    member(stage, "others", 1, 3, "body of others")
    stage.wait_journal("saw", id="body of others")
    stage.wait_empty()
    assert client.get("celery-taskset-meta-own.c") == b"done"
    assert not client.keys("celery-taskset-meta-*.j")
