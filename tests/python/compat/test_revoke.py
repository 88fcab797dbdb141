"""Revoking: by id and by stamp, of what runs, waits or is not there yet; what is answered, logged, stored, signalled.

The state file, and what outlives a whole fleet.
"""

import signal
import time

import pytest
from support.control import answer, listens, start
from support.lines import lines_of_task, plain
from support.waiting import never, until


def ask(stage, command, **arguments):
    return plain(repr(answer(stage, command, **arguments)))


def revoke(stage, task_id, **arguments):
    return ask(stage, "revoke", task_id=task_id, **arguments)


def revoke_stamps(stage, headers, **arguments):
    return ask(stage, "revoke_by_stamped_headers", headers=headers, **arguments)


def stamped(stage, name, *args, **stamps):
    signature = stage.s(name, *args)
    signature.stamp(**stamps)
    return signature.apply_async()


def stored(stage, task_id):
    document = stage.app.backend.get_task_meta(task_id, cache=False)
    return [document["status"], plain(repr(document["result"]))]


def discarded(stage, worker, task_id):
    """All that is seen of a task that was revoked, once it is."""
    [revoked] = stage.wait_journal("task_revoked", id=task_id)
    return story(stage, worker, task_id) | {
        "signal": {k: v for k, v in revoked.items() if k not in ("pid", "time", "id")}
    }


def story(stage, worker, task_id):
    return {
        "stored": stored(stage, task_id),
        "lines": [line for line in lines_of_task(worker.log, task_id) if "pidbox" not in line[2]],
        "received": len(stage.journal("task_received", id=task_id)),
    }


def started(stage, result):
    stage.wait_journal("started", id=result.id)
    return result


@pytest.mark.parametrize("broker", ["redis", "amqp"])
def test_a_task_is_revoked_by_its_id_wherever_it_is(alike, broker):
    def by_id(stage):
        worker = start(stage, app="revocable")
        found = {}

        found["unknown"] = revoke(stage, "not-sent-yet")
        found["unknown, stored"] = stored(stage, "not-sent-yet")
        stage.send("mark", 0, task_id="not-sent-yet")
        found["not yet received"] = discarded(stage, worker, "not-sent-yet")

        running = started(stage, stage.send("hold", 1.5))
        reserved, late = stage.send("mark", 1), stage.send("mark", 2, countdown=2)
        worker.wait_log(f"[{late.id}] received")
        found["running"] = revoke(stage, running.id)
        found["reserved"] = revoke(stage, [reserved.id])
        # Stored before the reply is sent.
        found["reserved, stored"] = stored(stage, reserved.id)
        found["scheduled"] = revoke(stage, late.id)
        found["scheduled, stored"] = stored(stage, late.id)
        found["reserved, discarded"] = discarded(stage, worker, reserved.id)
        found["scheduled, discarded"] = discarded(stage, worker, late.id)
        until(running.ready, stage.logs)
        found["running, at its end"] = stored(stage, running.id)
        found["ended"] = revoke(stage, running.id)
        found["ended, stored"] = stored(stage, running.id)
        stage.wait_empty()
        found["known"] = sorted(len(i) for i in answer(stage, "revoked"))
        found["ran"] = [line["number"] for line in stage.journal("ran")]
        found["status"] = worker.stop()
        return found

    seen = alike(by_id, broker)
    assert seen["unknown"] == repr({"ok": "tasks {'not-sent-yet'} flagged as revoked"})
    assert seen["unknown, stored"] == ["REVOKED", "TaskRevokedError('revoked')"]
    assert seen["not yet received"]["lines"][-1] == (
        "INFO",
        "MainProcess",
        "Discarding revoked task: mark[not-sent-yet]",
    )
    assert seen["reserved, stored"][0] == "REVOKED"
    assert (seen["running, at its end"], seen["ended, stored"]) == (["SUCCESS", "1.5"],) * 2
    assert seen["ran"] == []


def test_a_running_task_is_terminated_with_the_signal_that_is_asked_for(alike):
    def terminated(stage):
        worker = start(stage, app="revocable", concurrency=1)
        found = {}
        for name, arguments in {
            "default": {},
            "by name": {"signal": "SIGKILL"},
            "by number": {"signal": int(signal.SIGTERM)},
        }.items():
            victim = started(stage, stage.send("hold", 60))
            found[name] = revoke(stage, victim.id, terminate=True, **arguments)
            found[f"{name}, seen"] = discarded(stage, worker, victim.id)
        late = started(stage, stage.send("hold_late", 60))
        found["late"] = ask(stage, "terminate", task_id=late.id, signal="SIGKILL")
        found["late, seen"] = discarded(stage, worker, late.id)
        busy = started(stage, stage.send("hold", 1))
        reserved = stage.send("mark", 1)
        worker.wait_log(f"[{reserved.id}] received")
        found["reserved"] = revoke(stage, reserved.id, terminate=True)
        until(busy.ready, stage.logs)
        found["reserved, seen"] = discarded(stage, worker, reserved.id)
        found["unknown"] = revoke(stage, "nobody", terminate=True)
        found["no such signal"] = revoke(stage, "nobody", terminate=True, signal="SIGNOTHING")
        found["after"] = stage.send("mark", 2).get(timeout=30)
        stage.wait_empty()
        found["status"] = worker.stop()
        return found

    seen = alike(terminated)
    assert seen["by name, seen"]["stored"] == ["REVOKED", "TaskRevokedError('terminated')"]
    assert seen["by name, seen"]["signal"]["signum"] == 9
    assert seen["unknown"] == repr({"ok": "terminate: tasks unknown"})
    assert seen["after"] == 2


def test_a_pool_that_cannot_end_a_task_says_so_and_the_task_runs_on(alike):
    def refused(stage):
        start(stage, "--pool=threads", app="revocable")
        victim = started(stage, stage.send("hold", 1))
        reply = answer(stage, "revoke", task_id=victim.id, terminate=True)
        return [[text.partition("(")[0] for text in reply.values()], list(reply), victim.get(timeout=30)]

    assert alike(refused) == [["NotImplementedError"], ["error"], 1]


def test_tasks_are_revoked_by_their_stamps(alike):
    def by_stamp(stage):
        worker = start(stage, app="revocable")
        found = {"flagged": revoke_stamps(stage, {"team": ["blue", "green"], "place": "here"})}
        for name, stamps in {
            "value": {"team": "blue"},
            "list": {"team": ["red", "green"]},
            "text": {"place": "here"},
        }.items():
            found[name] = discarded(stage, worker, stamped(stage, "mark", 1, **stamps).id)
        others = [stamped(stage, "mark", 2, **stamps) for stamps in ({"team": "red"}, {"other": "blue"})]
        found["others"] = [result.get(timeout=30) for result in others]

        victim = started(stage, stamped(stage, "hold", 60, crew=["a", "b"]))
        found["not terminated"] = revoke_stamps(stage, {"crew": "c"}, terminate=True)
        found["terminated"] = revoke_stamps(stage, {"crew": ["b", "c"]}, terminate=True, signal="SIGKILL")
        found["terminated, seen"] = discarded(stage, worker, victim.id)
        found["as on the command line"] = revoke_stamps(stage, ["team=yellow"])
        found["yellow"] = discarded(stage, worker, stamped(stage, "mark", 3, team="yellow").id)
        found["ids"] = answer(stage, "revoked")
        stage.wait_empty()
        found["status"] = worker.stop()
        return found

    seen = alike(by_stamp)
    assert seen["value"]["lines"][-1][2] == "Discarding revoked task: mark[<id>] (revoked by header: {'team': 'blue'})"
    # Found out when its turn comes, unlike an id.
    assert seen["value"]["received"] == 1
    assert seen["terminated, seen"]["stored"] == ["REVOKED", "TaskRevokedError('terminated')"]
    assert seen["ids"] == []


@pytest.mark.ours
def test_a_parked_task_is_received_once_and_discarded_at_its_time(stage_on, kind):
    """The original holds it in memory; here it comes from the broker twice."""
    stage = stage_on(kind)
    worker = stage.worker(app="revocable")
    kept, victim = (stage.send("mark", number, countdown=12) for number in (1, 2))
    worker.wait_log("received", count=2)
    until(lambda: len(stage.redis().zrange("unacked_index", 0, -1)) == 2, stage.logs)
    assert "flagged as revoked" in revoke(stage, victim.id)
    stage.wait_journal("ran", number=1)
    assert discarded(stage, worker, victim.id)["received"] == 1
    assert worker.log.count("] received") == 2
    assert len(stage.journal("task_received", id=kept.id)) == 1
    stage.wait_empty()
    assert worker.stop() == 0


def test_a_revoke_is_forgotten_for_newer_ones_when_there_are_too_many(alike):
    def bounded(stage):
        start(stage, app="revocable", env={"CELERY_WORKER_REVOKES_MAX": "3"})
        for task_id in ("a", "b", "a", "c", "d"):
            revoke(stage, task_id)
        return answer(stage, "revoked")

    assert alike(bounded) == ["a", "c", "d"]


def test_what_happens_to_a_revoke_without_a_result_backend(alike):
    def nowhere(stage):
        worker = start(stage, app="revocable")
        found = {"reply": revoke(stage, "x")}
        stage.send("mark", 1, task_id="x")
        worker.wait_log("Discarding revoked task: mark[x]")
        found["lines"] = lines_of_task(worker.log, " x ")
        return found

    alike(nowhere, backend="disabled://")


# ---- the state file


def remembered(stage, worker):
    """Ids that the worker knows."""
    worker.wait_ready()
    listens(stage)
    return answer(stage, "revoked")


STOPS = {
    "warm": [signal.SIGTERM],
    "cold": [signal.SIGQUIT],
    "interrupted": [signal.SIGINT],
    "at once": [signal.SIGQUIT, signal.SIGQUIT],
}


@pytest.mark.parametrize("how", STOPS)
def test_a_state_file_survives_every_stop(alike, how):
    def stops(stage):
        first = start(stage, "--statedb=state-%n", app="revocable")
        assert "flagged" in revoke(stage, "kept")
        stage.send("mark", 1, task_id="late", expires=-1)
        stage.wait_journal("task_revoked", id="late")
        started(stage, stage.send("hold", 1 if how == "warm" else 60))
        first.kill(STOPS[how][0])
        for signum in STOPS[how][1:]:
            first.wait_log("Cold shutdown")
            first.kill(signum)
        if how == "interrupted":
            first.wait_log("Warm shutdown")
            first.kill(signal.SIGINT)
        first.wait()
        if stage.kind == "celeriac":
            # So that it is the file that remembers.
            assert stage.redis().delete("celeriac.revoked") == 1
        stage.redis().delete("unacked", "unacked_index", stage.queue)
        second = stage.worker("--statedb=state-w0", app="revocable")
        return remembered(stage, second)

    assert alike(stops) == ["kept", "late"]


@pytest.mark.parametrize(("writer", "reader"), [("celery", "celeriac"), ("celeriac", "celery")])
def test_either_worker_reads_the_state_file_of_the_other(stage_on, kinds, writer, reader):
    if not {writer, reader} <= set(kinds):
        pytest.skip("needs both workers")
    stage = stage_on(writer)
    first = start(stage, app="revocable", kind=writer, conf={"worker_state_db": "state"})
    revoke(stage, [f"id-{number}" for number in range(50)])
    clock = clock_of(stage)
    first.stop()
    stage.redis().delete("celeriac.revoked")
    second = stage.worker(app="revocable", kind=reader, conf={"worker_state_db": "state"})
    assert sorted(remembered(stage, second)) == sorted(f"id-{number}" for number in range(50))
    assert clock_of(stage) > clock
    assert second.stop() == 0


def clock_of(stage):
    return answer(stage, "clock")["clock"]


@pytest.mark.ours
def test_children_leave_the_state_file_alone_and_sighup_saves_it(stage_on, kind):
    stage = stage_on(kind)
    worker = start(stage, "--statedb=state", "--max-tasks-per-child=1", app="revocable")
    written = (stage.folder / "state").exists() and (stage.folder / "state").read_bytes()
    revoke(stage, "kept")
    for number in range(2):
        stage.send("mark", number).get(timeout=30)
    worker.kill(signal.SIGHUP)
    worker.wait_log(" ready.", count=2)
    stage.redis().delete("celeriac.revoked")
    assert remembered(stage, worker) == ["kept"]
    assert written is False or written != (stage.folder / "state").read_bytes()
    assert worker.stop() == 0


@pytest.mark.ours
def test_a_state_file_that_cannot_be_read_is_named(stage_on, kind):
    stage = stage_on(kind)
    (stage.folder / "state").write_bytes(b"this is no database" * 100)
    worker = stage.worker("--statedb=state", app="revocable", ready=False)
    assert worker.wait() == 2
    assert "the state file state cannot be read" in worker.log
    assert "Traceback" not in worker.log
    assert (stage.folder / "state").read_bytes().startswith(b"this is no database")


# ---- the whole fleet


@pytest.mark.ours
def test_a_revoke_survives_the_restart_of_the_whole_fleet_on_redis(stage_on, kind):
    stage = stage_on(kind, broker_transport_options={"global_keyprefix": "shop:"})
    fleet = [stage.worker(f"--hostname=w{number}@here", app="revocable") for number in range(2)]
    victim = stage.send("mark", 1, countdown=4)
    stage.send("mark", 2, countdown=4)
    far = stage.send("mark", 4, countdown=20_000)
    until(lambda: sum(worker.log.count("received") for worker in fleet) == 3, stage.logs)
    for command, arguments in [
        ("revoke", {"task_id": [victim.id, far.id]}),
        ("revoke_by_stamped_headers", {"headers": {"team": "blue"}}),
    ]:
        assert len(stage.app.control.broadcast(command, arguments=arguments, reply=True, timeout=10, limit=2)) == 2
    for worker in fleet:
        worker.kill(signal.SIGTERM)
    for worker in fleet:
        worker.wait()
    redis = stage.redis()
    assert redis.zcard("shop:celeriac.revoked") == 2
    # Three hours, and the time until the far one is due.
    assert 10_800 + 20_000 - 60 < redis.ttl("shop:celeriac.revoked") <= 10_800 + 20_010
    assert redis.zscore("shop:celeriac.revoked", victim.id) - time.time() < 10_900
    second = stage.worker("--hostname=w3@here", app="revocable")
    assert remembered(stage, second) == [victim.id, far.id]
    # As in the original a restart is what lets tasks with a revoked stamp run again.
    assert stamped(stage, "mark", 3, team="blue").get(timeout=30) == 3
    stage.wait_journal("ran", number=2)
    assert discarded(stage, second, victim.id)["stored"][0] == "REVOKED"
    never(lambda: stage.journal("ran", number=1), "it was revoked", during=0.5)
    assert len(stage.journal("task_revoked", id=victim.id)) == 1
