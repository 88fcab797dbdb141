"""What holds tasks back: rate limits, annotations, expiry, limits on what a worker may hold."""

import itertools

import pytest
from support.control import answer, start
from support.lines import lines_of_task, plain
from support.raw import body, headers, put
from support.waiting import never, until

PLENTY = "--prefetch-multiplier=50"


def rate_limit(stage, task, rate):
    return plain(repr(answer(stage, "rate_limit", task_name=task, rate_limit=rate)))


def rates(stage):
    return [task for task in answer(stage, "registered") if "rate_limit" in task]


def numbers(stage):
    return [line["number"] for line in stage.journal("ran")]


# ---- rate limits


def test_the_first_of_a_limited_task_runs_at_once_and_the_others_are_spaced(alike):
    def limited(stage):
        worker = stage.worker(PLENTY, app="revocable")
        for number in range(4):
            stage.send("limited", number)
        stage.send("mark", "other")
        ran = stage.wait_journal("ran", 5)
        times = [line["time"] for line in ran if line["number"] != "other"]
        # Never sooner than the rate allows; how much later is up to the machine.
        spaced = [later - earlier > 0.45 for earlier, later in itertools.pairwise(times)]
        stage.wait_empty()
        return {
            "spaced": spaced,
            "limited": [line["number"] for line in ran if line["number"] != "other"],
            "other first": numbers(stage).index("other") < numbers(stage).index(3),
            "status": worker.stop(),
        }

    assert alike(limited) == {
        "spaced": [True] * 3, "limited": [0, 1, 2, 3], "other first": True, "status": 0,
    }  # fmt: skip


def test_a_rate_limit_is_changed_and_lifted_from_afar(alike):
    def changed(stage):
        worker = start(stage, PLENTY, app="revocable")
        found = {"before": rates(stage)}
        for rate in ("30/m", 10, 0.5, "1/h", "", None, "0", 0, "often", "1/w", "3/m/h", " 2 /m"):
            found[repr(rate)] = [rate_limit(stage, "mark", rate), rates(stage)]
        found["unknown task"] = rate_limit(stage, "nobody", "1/s")
        # The limit is the new one: the second waits. Lifted, all that come now run.
        rate_limit(stage, "mark", "1/h")
        for number in range(2):
            stage.send("mark", number)
        worker.wait_log("mark[", count=3)
        rate_limit(stage, "mark", "0")
        for number in range(2, 5):
            stage.send("mark", number)
        until(lambda: set(numbers(stage)) >= {0, 2, 3, 4}, stage.logs)
        lines = [line for line in worker.log.splitlines() if "ate limit" in line]
        found["lines"] = [plain(line.partition("] ")[2]) for line in lines]
        return found

    seen = alike(changed)
    assert seen["'30/m'"][0] == repr({"ok": "new rate limit set successfully"})
    assert seen["''"][0] == repr({"ok": "rate limit disabled successfully"})
    assert seen["unknown task"] == repr({"error": "unknown task"})
    assert "Invalid rate limit string" in seen["'often'"][0]


@pytest.mark.ours
def test_limited_tasks_block_no_others_and_follow_the_change_of_their_limit(stage_on, kind):
    """The original fetches nothing more once its prefetch is full of them, and keeps those at their old rate."""
    stage = stage_on(kind)
    worker = stage.worker("--prefetch-multiplier=1", app="revocable")
    for number in range(20):
        stage.send("slow", number)
    stage.send("mark", "other")
    until(lambda: set(numbers(stage)) == {0, "other"}, stage.logs)
    assert rate_limit(stage, "slow", "0") == repr({"ok": "new rate limit set successfully"})
    until(lambda: len(numbers(stage)) == 21, stage.logs)
    assert [number for number in numbers(stage) if number != "other"] == list(range(20))
    stage.wait_empty()
    assert worker.stop() == 0


def test_rate_limits_can_be_switched_off(alike):
    def off(stage):
        start(stage, app="revocable", conf={"worker_disable_rate_limits": True})
        found = {"shown": rates(stage), "changed": rate_limit(stage, "mark", "1/h"), "then": rates(stage)}
        results = [stage.send(task, number) for number in range(3) for task in ("slow", "mark")]
        found["results"] = [result.get(timeout=30) for result in results]
        return found

    assert alike(off)["results"] == [0, 0, 1, 1, 2, 2]


def test_annotations_of_every_kind_change_tasks(alike):
    def annotations(stage):
        worker = start(stage, app="annotated")
        found = {"rates": rates(stage), "daily": stage.send("report.daily").get(timeout=30)}
        mail = stage.send("report.mail")
        [line] = stage.wait_journal("annotated")
        found["failure"] = [line["task"], line["error"], mail.get(timeout=30, propagate=False).args]
        found["status"] = worker.stop()
        return found

    seen = alike(annotations)
    assert seen["daily"] == ["30/m", 77]
    assert seen["failure"][0] == "report.mail"


def test_annotations_of_the_settings_change_tasks(alike):
    def annotations(stage):
        start(
            stage,
            app="revocable",
            conf={"task_annotations": {"mark": {"rate_limit": "7/m"}, "hold": {"soft_time_limit": 1}}},
        )
        stopped = stage.send("hold", 30)
        return [rates(stage), plain(repr(stopped.get(timeout=30, propagate=False)))]

    assert "SoftTimeLimitExceeded" in alike(annotations)[1]


# ---- expiry


def test_what_expires_is_discarded_when_it_comes_or_when_its_turn_comes(alike):
    def expiry(stage):
        worker = stage.worker(PLENTY, app="revocable")
        sent = {"on arrival": stage.send("mark", 0, expires=-1)}
        stage.wait_journal("task_revoked")
        running = stage.send("hold", 1.2)
        stage.wait_journal("started", id=running.id)
        sent["behind another"] = stage.send("mark", 1, expires=0.3)
        sent["before its eta"] = stage.send("mark", 2, countdown=0.6, expires=0.3)
        stage.send("limited", 3)
        sent["before its turn"] = stage.send("limited", 3, expires=0.2)
        sent["not before its time"] = stage.send("mark", 4, expires=600)
        stage.wait_journal("task_revoked", 4)
        stage.wait_journal("ran", number=4)
        stage.wait_empty()
        found = {}
        for name, result in sent.items():
            [*revoked] = stage.journal("task_revoked", id=result.id)
            found[name] = {
                "lines": sorted(line for line in lines_of_task(worker.log, result.id) if line[1] == "MainProcess"),
                "stored": plain(repr(stage.app.backend.get_task_meta(result.id, cache=False)["result"])),
                "received": len(stage.journal("task_received", id=result.id)),
                "signal": [(line["terminated"], line["signum"], line["expired"]) for line in revoked],
            }
        found["known"] = len(answer(stage, "revoked"))
        return found

    seen = alike(expiry)
    assert seen["on arrival"]["stored"] == "TaskRevokedError('expired')"
    assert (seen["on arrival"]["received"], seen["behind another"]["received"]) == (0, 1)
    assert seen["before its eta"]["signal"] == [(False, None, True)]
    assert seen["not before its time"]["signal"] == []
    assert seen["known"] == 4


# ---- what a worker may hold


def held(stage):
    return len(stage.unacked())


def test_a_limit_on_tasks_with_an_eta_bounds_what_is_held(alike):
    def bounded(stage):
        stage.worker("--prefetch-multiplier=1", app="revocable", conf={"worker_eta_task_limit": 3})
        for number in range(6):
            stage.send("mark", number, countdown=600)
        until(lambda: held(stage) == 3, lambda: f"{held(stage)} are held\n{stage.logs()}")
        never(lambda: held(stage) > 3, "more than the limit are held", during=0.5)
        return stage.depth()

    assert alike(bounded) == 3


@pytest.mark.parametrize("task", ["hold", "hold_late"])
def test_without_prefetch_nothing_is_fetched_while_every_child_is_busy(alike, task):
    def busy(stage):
        worker = stage.worker("--disable-prefetch", app="revocable", concurrency=2)
        running = [stage.send(task, 1.5) for _ in range(2)]
        for result in running:
            stage.wait_journal("started", id=result.id)
        for number in range(4):
            stage.send("mark", number)
        waiting = stage.depth()
        never(
            lambda: stage.depth() < 4 and not stage.journal("ended"),
            "a message was fetched while every child was busy",
            during=1,
        )
        stage.wait_journal("ran", 4)
        stage.wait_empty()
        return [waiting, sorted(numbers(stage)), worker.stop()]

    assert alike(busy) == [4, [0, 1, 2, 3], 0]


def test_without_prefetch_tasks_that_wait_for_their_time_leave_room_for_others(alike):
    def room(stage):
        stage.worker("--disable-prefetch", app="revocable")
        stage.send("mark", "later", countdown=5)
        until(lambda: held(stage) == 1, stage.logs)
        stage.send("mark", "now")
        stage.wait_journal("ran", number="now")
        return numbers(stage)

    assert alike(room) == ["now"]


def test_a_redelivered_task_that_has_succeeded_is_not_run_again(alike):
    def again(stage):
        worker = stage.worker(conf={"worker_deduplicate_successful_tasks": True})
        done = stage.send("late_mark", 1)
        done.get(timeout=30)
        redelivered = {"exchange": "", "routing_key": stage.queue, "redelivered": True}
        for task_id in (done.id, None):
            put(stage, headers("late_mark", task_id), body([2]), delivery_info=redelivered)
        stage.wait_journal("ran", number=2)
        stage.wait_empty()
        return [numbers(stage), sorted(lines_of_task(worker.log, done.id))]

    assert alike(again)[0] == [1, 2]
