"""Task classes of the app's own: their hooks and what they see, their state, their checks; tasks that call tasks."""

import pytest
from support.lines import plain
from support.outcomes import ENDED, comparable, story
from support.waiting import until

# id: task, arguments, options of the call.
CALLS = {
    **{f"hooked-{how}": ("hooked", (how,), {"kwargs": {"y": [1]}}) for how in (
        "succeed", "fail", "expected", "retry", "ignore", "reject", "unencodable", "exit",
    )},
    "breaking-before_start": ("breaking", ("before_start",), {}),
    "breaking-on_success": ("breaking", ("on_success",), {}),
    "breaking-after_return": ("breaking", ("after_return",), {}),
    "breaking-on_failure": ("breaking", ("on_failure", "fail"), {}),
    "breaking-after_failure": ("breaking", ("after_return", "fail"), {}),
    "breaking-on_retry": ("breaking", ("on_retry", "retry"), {}),
    "hook-rejects": ("hook_rejects", (), {}),
    "stateful-1": ("stateful", (1,), {}),
    "stateful-2": ("stateful", (2,), {}),
    "counted-1": ("counted", (), {}),
    "counted-2": ("counted", (), {}),
    "wrapped": ("wrapped", ("inside",), {}),
    "shadowed": ("shadowed", (1,), {"shadow": "by the caller"}),
    "typed": ("typed", (1,), {"kwargs": {"y": 2}}),
    "typed-too-many": ("typed", (1, 2), {}),
    "typed-unknown": ("typed", (1,), {"kwargs": {"z": 2}}),
    "untyped-none": ("untyped", (), {}),
    "types_refused": ("types_refused", (), {}),
    "eager": ("eager", (), {}),
    "model": ("model", ({"value": 3}, "4"), {}),
    "model-maybe": ("model", ({"value": "3"}, 4), {"kwargs": {"maybe": {"value": 1}}}),
    "model-invalid": ("model", ({"value": "three"}, 4), {}),
    "model-missing": ("model", (), {}),
    "model_strict": ("model_strict", ({"value": "3"},), {}),
    "model_context": ("model_context", ({"value": 3},), {}),
    "model_sends": ("model_sends", (), {}),
}  # fmt: skip


def play(stage):
    worker = stage.worker(app="semantics")
    for task_id, (name, args, call) in CALLS.items():
        stage.send(f"classes.{name}", *args, task_id=task_id, **call)
    # One child takes them in order; what they send comes after.
    stage.send("classes.leaf", task_id="last")
    worker.wait_log("[last] succeeded", timeout=60)
    stage.wait_empty()
    found = {}
    for task_id in CALLS:
        document = stage.app.backend.get_task_meta(task_id, cache=False)
        shown = comparable(document) if document["status"] in ENDED else document["status"]
        found[task_id] = {"document": shown, **story(stage, worker, task_id)}
    return found


@pytest.mark.parametrize(("broker", "backend"), [("redis", "redis"), ("amqp", "file")])
def test_classes_and_hooks_of_tasks_work_alike(alike, broker, backend):
    seen = alike(play, broker, backend)
    assert [line["event"] for line in seen["hooked-succeed"]["journal"]] == [
        "before_start", "body", "on_success", "after_return",
    ]  # fmt: skip
    assert seen["stateful-2"]["document"]["result"] == "[[1, 2], 'classes.stateful', 'Named']"
    assert seen["model-maybe"]["document"]["result"] == "{'value': 7, 'name': 'Argument int Argument'}"
    assert seen["typed-too-many"]["document"]["type"] == "TypeError"


def test_a_task_that_calls_others_is_their_parent(alike):
    def family(stage):
        worker = stage.worker(app="semantics", concurrency=2)
        parent = stage.send("classes.parent", priority=4, task_id="parent")
        answer = parent.get(timeout=30)
        joined = stage.send("classes.joins").get(timeout=30)
        # Five sent by the parent, two that it ran itself, two of the other.
        lines = stage.wait_journal("run", count=9)
        until(lambda: worker.log.count("succeeded") >= 9, worker.describe)
        calls = sorted(
            (line for line in lines if "joined" not in line["args"] and line["args"] and line["id"] != "parent"),
            key=lambda line: line["args"],
        )
        return {
            "answer": answer,
            "joined": joined,
            "children": sorted(plain(child.id) for child in parent.children),
            "calls": [
                {key: plain(repr(value)) for key, value in line.items() if key not in ("pid", "time")} for line in calls
            ],
        }

    seen = alike(family, task_inherit_parent_priority=True)
    assert seen["answer"]["direct"] == ["direct"]
    by_delay = next(call for call in seen["calls"] if "by delay" in call["args"])
    assert by_delay["family"] == "['parent', 'parent', None]"
    assert by_delay["priority"] == "4"
    assert seen["joined"] == ["Never call result.get() within a task", ["joined"]]
