"""Chords beyond their shape: sent again, their keys in Redis, how long results are kept."""

import uuid

import pytest
from celery import chord, group
from support import raw
from support.waiting import until


def signature(stage, op, *args, **options):
    return stage.app.signature("workflows.task", args, {"op": op, "w": "chord"}, **options)


def test_a_frozen_chord_that_is_sent_again_runs_again(alike):
    def twice(stage):
        stage.worker(app="semantics")
        # No member may end before the last one is sent: what then happens is the next test's.
        members = [signature(stage, "add", number).set(countdown=1) for number in (1, 2)]
        header = group(members, app=stage.app)
        frozen = chord(header, signature(stage, "add", 3), app=stage.app)
        frozen.freeze()
        counts = []
        for run in (1, 2):
            frozen.apply_async().get(timeout=30)
            stage.wait_journal("ran", count=3 * run)
            stage.wait_empty()
            counts.append(len(stage.journal("ran", op="add")))
        return counts

    assert alike(twice, task_acks_late=True) == [3, 6]


def member(stage, chord_of, number, task_id, **properties):
    """One message of a chord's header, as the sender puts it."""
    embed = {"chord": dict(chord_of), "callbacks": None, "errbacks": None, "chain": None}
    body = raw.body([number], {"op": "add", "w": "chord"}, embed)
    headers = raw.headers("workflows.task", task_id, group="frozen", group_index=number)
    raw.put(stage, headers, body, **properties)


@pytest.mark.ours
def test_a_member_that_ends_before_the_last_one_is_sent_again_counts(stage_on, kind):
    """Celery marks a chord as done until its last member is sent again; what ends before is forgotten there."""
    stage = stage_on(kind)
    worker = stage.worker(app="semantics")
    body = signature(stage, "add", 100, task_id="body")
    body.freeze("body")

    def ended(task_id, count):
        worker.wait_log(f"[{task_id}] succeeded", count=count)

    for run in (1, 2):
        member(stage, body, 0, "first")
        ended("first", run)
        stage.app.backend.set_chord_size("frozen", 2)
        member(stage, body, 1, "second")
        ended("second", run)
        ended("body", run)
    # A copy of a message that was delivered before is none of a new run.
    redelivered = {"exchange": "", "routing_key": stage.queue, "redelivered": True}
    stage.app.backend.client.delete("celery-taskset-meta-frozen.j")
    member(stage, body, 0, "first", delivery_info=redelivered)
    ended("first", 3)
    stage.wait_empty()
    assert not stage.app.backend.client.exists("celery-taskset-meta-frozen.j")
    assert stage.app.backend.client.get("celery-taskset-meta-frozen.c") == b"done"


def test_keys_of_chords_and_results_live_as_long_as_the_settings_say(alike):
    def lifetimes(stage):
        worker = stage.worker(app="semantics")
        client = stage.app.backend.client
        sent = {
            "success": signature(stage, "add", 1).apply_async(),
            "failure": signature(stage, "fail").apply_async(),
        }
        for result in sent.values():
            until(result.ready, worker.describe)
        # A member that is ignored leaves its chord open.
        chord_id = str(uuid.uuid4())
        header = group([signature(stage, "add", 1), signature(stage, "ignore")], app=stage.app, task_id=chord_id)
        chord(header, signature(stage, "add"), app=stage.app).apply_async()
        stage.wait_empty()
        keys = {name: f"celery-task-meta-{result.id}" for name, result in sent.items()}
        found = {name: round(client.ttl(key) / 100) for name, key in keys.items()}
        for key in client.scan_iter("celery-taskset-meta-*"):
            found[key.decode().rpartition(".")[2]] = round(client.ttl(key) / 100)
        return found

    seen = alike(
        lifetimes, task_acks_late=True, result_expires=3600, result_failure_expires=7200, result_chord_expires=1800
    )
    assert seen["success"] == 36
    assert seen["failure"] == 72
    assert seen["j"] == 18
