"""Retries in every form: what is sent again, with what, how often, and what is left in the end."""

import pytest
from support.lines import plain
from support.outcomes import Published, comparable, ended, story
from support.waiting import until

# Task, arguments, options of the call. The id is the name and the number of the row.
CALLS = [
    ("other_arguments", (1,), {}),
    ("kwargs_only", (1,), {"kwargs": {"y": 2}}),
    ("at_eta", (), {}),
    ("with_options", (), {}),
    ("keeps_options", (), {
        "priority": 3, "headers": {"trace": "7"}, "shadow": "another", "time_limit": 90, "soft_time_limit": 80,
        "expires": 600, "ignore_result": False,
    }),
    ("without_end", (), {}),
    ("never", (), {}),
    ("never_without_cause", (), {}),
    ("fewer", (), {}),
    ("while_handling", (), {}),
    ("class_as_cause", (), {}),
    ("raised_by_hand", (), {}),
    ("expected", (), {}),
    ("cannot_be_sent", (), {}),
    ("late", (), {}),
    ("unpicklable_cause", (), {}),
    ("auto", ("busy",), {}),
    ("auto", ("very",), {}),
    ("auto", ("other",), {}),
    ("auto", ("once",), {}),
    ("auto", ("ignore",), {}),
    ("auto", ("reject",), {}),
    ("backoff", (), {}),
    ("by_class", (), {}),
    ("before_start", (), {}),
    ("ignoring", (), {}),
    ("late", (), {"retries": 2}),
    ("never", (), {"link_error": "errback"}),
]  # fmt: skip

# These end in no final state.
OPEN = {"raised_by_hand": "RETRY", "auto-20": "PENDING", "ignoring": "PENDING"}


def play(stage):
    # One child: a retry that another child begins at once may end before the first has stored its RETRY.
    worker = stage.worker(app="semantics")
    published = Published(stage) if stage.conf["result_backend"].startswith("redis") else None
    sent = {}
    for number, (name, args, options) in enumerate(CALLS):
        options = dict(options)
        if options.pop("link_error", None):
            options["link_error"] = [stage.s("retries.errback")]
        task_id = f"{name}-{number}"
        sent[task_id] = stage.send(f"retries.{name}", *args, task_id=task_id, **options)
    found = {}
    for task_id in sent:
        name = task_id.rpartition("-")[0]
        if name in OPEN or task_id in OPEN:
            continue
        document = until(
            lambda i=task_id: ended(stage, i), lambda i=task_id: f"{i} to end\n{worker.describe()}", timeout=40
        )
        found[task_id] = {"document": comparable(document)}
    worker.wait_log("[raised_by_hand-11] retry")
    worker.wait_log("[auto-20] ignored")
    stage.wait_journal("ended", id="ignoring-25")
    worker.wait_log("[ignoring-25] succeeded")
    stage.wait_empty()
    until(lambda: all(worker.log.count(f"[{i}]") >= 2 for i in sent), lambda: f"two lines each\n{worker.log}")
    for task_id in sent:
        told = found.setdefault(task_id, {})
        told |= story(stage, worker, task_id)
        told["state"] = stage.app.backend.get_state(task_id)
        if published:
            told["published"] = published.of(task_id)
    return found


@pytest.mark.parametrize(("broker", "backend"), [("redis", "redis"), ("amqp", "redis")])
def test_tasks_are_retried_alike(alike, broker, backend):
    options = {"priority_steps": [0, 3, 6, 9]} if broker == "redis" else {}
    seen = alike(play, broker, backend, broker_transport_options=options)
    results = {task_id: told["document"] for task_id, told in seen.items() if "document" in told}
    assert results["other_arguments-0"]["result"] == "[3, 4]"
    assert results["without_end-5"]["result"] == "5"
    assert results["fewer-8"]["type"] == "MaxRetriesExceededError"
    assert results["while_handling-9"]["type"] == "MaxRetriesExceededError"
    assert seen["raised_by_hand-11"]["state"] == "RETRY"
    assert results["cannot_be_sent-13"]["status"] == "FAILURE"
    assert len(seen["auto-16"]["journal"]) == 3
    assert len(seen["auto-17"]["journal"]) == 1
    again = seen["keeps_options-4"]["journal"][-1]
    assert [again["retries"], again["priority"], again["headers"]["trace"], again["shadow"], again["timelimit"]] == [
        2, 3, "7", "another", [90, 80],
    ]  # fmt: skip


def test_a_retry_moves_a_task_to_another_queue(alike):
    def moved(stage):
        other = f"{stage.queue}-other"
        worker = stage.worker("-Q", f"{stage.queue},{other}", app="semantics")
        stage.send("retries.other_queue", other).get(timeout=30)
        jittered = stage.send("retries.jitter")
        until(jittered.ready, worker.describe)
        lines = [plain(line) for line in worker.log.splitlines() if jittered.id in line and " retry: " in line]
        return [line["routing_key"] for line in stage.journal("run") if "routing_key" in line], len(lines)

    assert alike(moved) == ([False, True], 1)
