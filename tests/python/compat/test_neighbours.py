"""Workers among each other: mingle, gossip and elections, also between the original and ours."""

import uuid

import pytest
from support import control
from support.events import Watcher
from support.waiting import until

BROKERS = ["redis", "amqp"]
PAIRS = [("celery", "celeriac"), ("celeriac", "celery"), ("celeriac", "celeriac")]

TALKING = {"quiet": (), "app": "party"}


def pair(stage, kinds):
    """Two workers that know of each other."""
    first = stage.worker("-n", "first@here", "--heartbeat-interval=1", "--loglevel=DEBUG", kind=kinds[0], **TALKING)
    control.listens(stage)
    return first, lambda: stage.worker(
        "-n", "second@here", "--heartbeat-interval=1", "--loglevel=DEBUG", kind=kinds[1], **TALKING
    )


@pytest.mark.ours
@pytest.mark.parametrize("broker", BROKERS)
@pytest.mark.parametrize("kinds", PAIRS)
def test_workers_of_both_kinds_mingle_and_gossip(stage_on, kind, kinds, broker):
    stage = stage_on(kind, broker=broker)
    first, start_second = pair(stage, kinds)
    first.wait_log("mingle: all alone")
    revoked = str(uuid.uuid4())
    stage.app.control.revoke(revoked)
    first.wait_log("Tasks flagged as revoked")
    second = start_second()
    for line in ("mingle: searching for neighbors", "mingle: sync with 1 nodes", "mingle: sync complete"):
        second.wait_log(line)
    first.wait_log("sync with second@here")
    # What the first was told, the second knows.
    there = ["second@here"]
    until(
        lambda: revoked in (stage.app.control.inspect(destination=there).revoked() or {}).get("second@here", ()),
        stage.logs,
    )
    first.wait_log("second@here joined the party")
    second.wait_log("first@here joined the party")
    second.stop()
    first.wait_log("second@here left")
    if kinds[0] == "celeriac":
        stage.wait_journal("node_join", node="second@here")
        stage.wait_journal("node_leave", node="second@here")


@pytest.mark.ours
@pytest.mark.parametrize("kinds", PAIRS)
def test_a_worker_that_dies_is_missed(stage_on, kind, kinds):
    stage = stage_on(kind)
    first, start_second = pair(stage, kinds)
    second = start_second()
    first.wait_log("second@here joined the party")
    second.destroy()
    first.wait_log("missed heartbeat from second@here")


@pytest.mark.ours
@pytest.mark.parametrize("broker", BROKERS)
def test_one_of_the_workers_is_elected_and_calls_the_task(stage_on, kind, broker):
    # Among ourselves: the original ends with an IndexError where a vote comes while there is one candidate.
    stage = stage_on(kind, broker=broker)
    first, start_second = pair(stage, ("celeriac", "celeriac"))
    second = start_second()
    first.wait_log("second@here joined the party")
    second.wait_log("first@here joined the party")
    stage.app.control.election("who", "task", stage.s("note", 3))
    until(lambda: "elected for 'who'" in first.log + second.log, stage.logs)
    stage.wait_journal("ran", number=3)
    assert (first.log + second.log).count("I won the election 'who'") == 1
    # The journal of a second task would be there by now.
    stage.send("note", 4)
    stage.wait_journal("ran", number=4)
    assert len(stage.journal("ran", number=3)) == 1


@pytest.mark.parametrize("broker", BROKERS)
def test_a_worker_that_is_told_to_keep_to_itself_does(alike, broker):
    def alone(stage):
        with Watcher(stage) as watcher:
            worker = stage.worker("--without-heartbeat", "-n", "alone@here")
            stage.worker("-n", "other@here", "--heartbeat-interval=1")
            watcher.listen("other@here")
            control.listens(stage)
            return {
                "mingled": "mingle" in worker.log,
                "told": any(event["hostname"] == "alone@here" for event in watcher.events),
            }

    assert alike(alone, broker=broker) == {"mingled": False, "told": False}


@pytest.mark.ours
def test_a_worker_is_ready_before_the_others_have_answered(stage_on, kind):
    stage = stage_on(kind)
    worker = stage.worker("-n", "first@here", **TALKING)
    worker.wait_log("mingle: all alone")
    log = worker.log
    assert log.index("mingle: searching") < log.index(" ready.") < log.index("mingle: all alone")
