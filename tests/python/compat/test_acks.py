"""Acknowledgements, time limits and lost children: what is settled, what is stored, what runs again."""

import pytest
from support.lines import lines, lines_of_task, plain, without_weight
from support.waiting import until


def ended(stage, result):
    return until(lambda: result.state if result.ready() else None, stage.logs)


def outcome(result):
    document = result.backend.get_task_meta(result.id, cache=False)
    return [document["status"], plain(repr(document["result"]))]


@pytest.mark.parametrize("broker", ["redis", "amqp"])
def test_lost_children_cost_their_own_task_only(alike, broker):
    names = ["kill_self", "kill_self_late", "kill_self_once", "exit_process", "add"]

    def lost(stage):
        worker = stage.worker(concurrency=1)
        results = {name: stage.send(name, *((1, 1) if name == "add" else ())) for name in names}
        for result in results.values():
            ended(stage, result)
        stage.wait_empty()
        found = {name: outcome(result) for name, result in results.items()}
        found["tries"] = len(stage.journal("ran", number="kill_self_once"))
        said = {name: sorted(lines_of_task(worker.log, result.id)) for name, result in results.items()}
        found["lines"] = {name: without_weight(lines) for name, lines in said.items()}
        weighed = {name for name, lines in said.items() if lines != found["lines"][name]}
        assert weighed == ({"kill_self", "kill_self_late", "kill_self_once"} if stage.kind == "celeriac" else set())
        return found

    seen = alike(lost, broker)
    assert seen["kill_self"][0] == "FAILURE"
    assert "WorkerLostError" in seen["kill_self"][1]
    assert seen["kill_self_once"] == ["SUCCESS", "'second time'"]
    assert seen["tries"] == 2
    assert seen["add"] == ["SUCCESS", "2"]


@pytest.mark.parametrize("broker", ["redis", "amqp"])
def test_time_limits_end_tasks(alike, broker):
    names = ["catch_soft_limit", "soft_limited", "hard_limited", "hard_limited_late", "hard_limited_requeued"]

    def limits(stage):
        worker = stage.worker(concurrency=5)
        results = {name: stage.send(name) for name in names}
        found = {}
        for name, result in results.items():
            if name == "hard_limited_requeued":  # a failure first, then what the second run made of it
                until(lambda r=result: outcome(r)[0] == "SUCCESS", stage.logs)
            else:
                ended(stage, result)
            found[name] = outcome(result)
        stage.wait_empty()
        worker.wait_log("Hard time limit (1s) exceeded", count=3)
        found["hard"] = worker.log.count("Hard time limit (1s) exceeded for hard_limited[")
        found["soft"] = worker.log.count("Soft time limit (1s) exceeded for soft_limited[")
        return found

    seen = alike(limits, broker)
    assert seen["catch_soft_limit"] == ["SUCCESS", "'stopped in time'"]
    assert seen["hard_limited"] == ["FAILURE", "TimeLimitExceeded(1)"]
    assert "SoftTimeLimitExceeded" in seen["soft_limited"][1]
    assert (seen["hard"], seen["soft"]) == (1, 1)


def test_limits_of_the_call_and_of_the_command_line_count(alike):
    def limits(stage):
        # Apart: with both limits on one task the original looks at the hard one when the soft one is over.
        worker = stage.worker("--time-limit=2", concurrency=2)
        hard = [stage.send("sleep", 30, time_limit=1), stage.send("sleep", 30)]
        for result in hard:
            ended(stage, result)
        worker.stop()
        stage.worker("--soft-time-limit=1")
        soft = stage.send("sleep", 30)
        ended(stage, soft)
        said = [text for _, _, text in lines(stage.logs()) if "time limit" in text]
        return [*[outcome(result) for result in (*hard, soft)], said]

    seen = alike(limits)
    assert seen[:2] == [["FAILURE", "TimeLimitExceeded(1)"], ["FAILURE", "TimeLimitExceeded(2.0)"]]
    assert "SoftTimeLimitExceeded" in seen[2][1]
    assert len(seen[3]) == 3


def acknowledged(stage):
    answers = stage.app.control.inspect(timeout=2, limit=1).active() or {}
    return {task["id"]: task["acknowledged"] for tasks in answers.values() for task in tasks}


@pytest.mark.parametrize("broker", ["redis", "amqp"])
def test_early_acks_come_before_the_end_and_late_ones_after(alike, broker):
    def held(stage):
        worker = stage.worker(concurrency=2)
        early = stage.send("sleep", 60, "early")
        late = stage.send("sleep_late", 60, "late")
        stage.wait_journal("started", count=2)
        # The answer comes after the acknowledgement, over the same connection.
        until(lambda: acknowledged(stage) == {early.id: True, late.id: False}, worker.describe)
        worker.kill(9)
        worker.wait()
        if broker == "redis":
            until(lambda: len(stage.unacked()) == 1, lambda: str(stage.unacked()))
            return 1
        return until(stage.depth, "what was not acknowledged is back in the queue")

    assert alike(held, broker) == 1


def test_a_child_is_replaced_after_its_last_task(alike):
    def recycled(stage):
        worker = stage.worker("--max-tasks-per-child=2")
        pids = [stage.send("whoami").get(timeout=30)["pid"] for _ in range(6)]
        # An odd number: the original hangs when it is stopped while its only child is being replaced.
        names = [stage.send("whoami").get(timeout=30)["index"] for _ in range(1)]
        status = worker.stop()
        return [[pids.index(pid) for pid in pids], names, status, "ERROR" in worker.log]

    assert alike(recycled) == [[0, 0, 2, 2, 4, 4], [0], 0, False]


def test_a_child_that_grew_too_large_is_replaced(alike):
    def recycled(stage):
        stage.worker(f"--max-memory-per-child={200 * 1024}")
        small = [stage.send("grow", 1).get(timeout=30) for _ in range(2)]
        large = stage.send("grow", 300).get(timeout=30)
        after = stage.send("grow", 1).get(timeout=30)
        return [small[0] == small[1] == large, after == large]

    assert alike(recycled) == [True, False]


def test_tasks_beside_a_dying_child_are_not_hurt(alike):
    def beside(stage):
        stage.worker(concurrency=2)
        slow = stage.send("sleep", 1.5, "slow")
        stage.wait_journal("started")
        for _ in range(3):
            ended(stage, stage.send("kill_self"))
        more = [stage.send("add", i, i) for i in range(10)]
        return [slow.get(timeout=30), [result.get(timeout=30) for result in more]]

    assert alike(beside) == ["slow", [2 * i for i in range(10)]]


def test_a_lost_task_is_retried_when_asked_to(alike):
    def retried(stage):
        worker = stage.worker(conf={"task_retry_on_worker_lost": True})
        result = stage.send("kill_self_late", retries=0)
        worker.wait_log("retry: Retry in")
        return [result.state, sorted(without_weight(lines_of_task(worker.log, result.id)))[:1]]

    assert alike(retried)[0] == "RETRY"
