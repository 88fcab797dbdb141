"""Chains, groups, chords, links: the worker publishes what comes next."""

from functools import partial

import pytest
from celery import chain, chord, group
from support.waiting import until


def add(stage, *args):
    return stage.s("add", *args)


def play(stage, rung="native"):
    stage.worker(concurrency=2, env={"CELERIAC_CONTINUATIONS": rung})
    chained = chain(add(stage, 1, 1), add(stage, 2), add(stage, 3), app=stage.app).apply_async()
    grouped = group([add(stage, i, i) for i in range(5)], app=stage.app).apply_async()
    body = chord([add(stage, i, i) for i in range(5)], stage.s("total"), app=stage.app).apply_async()
    chord_in_chain = chain(
        add(stage, 1, 1),
        group([add(stage, 10), add(stage, 20)], app=stage.app),
        stage.s("total"),
        app=stage.app,
    ).apply_async()
    broken_chain = chain(
        add(stage, 1, 1), stage.s("fail").set(immutable=True), add(stage, 1), app=stage.app
    ).apply_async()
    broken_chord = chord([add(stage, 1, 1), stage.s("fail")], stage.s("total"), app=stage.app).apply_async()
    retried_chord = chord([stage.s("retry_twice"), add(stage, 1, 1)], stage.s("total"), app=stage.app).apply_async()
    several = stage.send("add", 1, 1, link=[add(stage, 1), add(stage, 2)])
    linked = stage.send("fail", "linked", link_error=[stage.s("errback"), stage.s("old_errback", immutable=False)])
    until(broken_chain.ready, stage.logs, 60)
    until(broken_chord.ready, stage.logs, 60)
    stage.wait_journal("errback", task=linked.id)
    stage.wait_journal("old_errback", task=linked.id)
    return {
        "chain": chained.get(timeout=60),
        "group": grouped.get(timeout=60),
        "chord": body.get(timeout=60),
        "chord in chain": chord_in_chain.get(timeout=60),
        "broken chain": [broken_chain.state, broken_chain.parent.state, broken_chain.parent.parent.state],
        "broken chord": [broken_chord.state, type(broken_chord.result).__name__],
        "retried chord": retried_chord.get(timeout=60),
        "several callbacks": several.get(timeout=60),
        "their results": sorted(value for child in several.children for value in child.get(timeout=60)),
        "errbacks": [len(stage.journal("errback")), len(stage.journal("old_errback"))],
    }


@pytest.mark.parametrize(
    ("broker", "backend", "rung"),
    [
        ("redis", "redis", "native"),
        ("redis", "redis", "python"),
        ("amqp", "redis", "native"),
        ("filesystem", "file", "native"),
        ("redis", "sqlite", "native"),
    ],
)
def test_workflows_complete(alike, broker, backend, rung):
    seen = alike(partial(play, rung=rung), broker, backend, result_chord_retry_interval=0.2)
    assert seen["chain"] == 7
    assert seen["group"] == [0, 2, 4, 6, 8]
    assert seen["chord"] == 20
    assert seen["chord in chain"] == 34
    assert seen["broken chain"] == ["FAILURE", "FAILURE", "SUCCESS"]
    assert seen["broken chord"] == ["FAILURE", "ChordError"]
    assert seen["retried chord"] == 4
    assert seen["errbacks"] == [1, 1]
    assert seen["their results"] == [3, 4]


def test_a_chord_whose_member_was_killed_completes_once(alike):
    def completed(stage):
        stage.worker(concurrency=2)
        body = chord(
            [stage.s("kill_self_once"), *(stage.s("late_mark", i) for i in range(5))],
            stage.s("echo"),
            app=stage.app,
        ).apply_async()
        return body.get(timeout=60)

    assert alike(completed) == [[["second time", 0, 1, 2, 3, 4]], {}]
