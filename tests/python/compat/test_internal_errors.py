"""Errors outside the body of a task: the loader's, the backend's, a receiver's."""

import pytest
from support.outcomes import ENDED, comparable, story


@pytest.mark.parametrize("breaking", [False, True], ids=["loader and receiver", "backend and cleanup"])
def test_errors_outside_the_body_end_a_task_alike(alike, breaking):
    def play(stage):
        env = {"BREAK_CLEANUP": "1"} if breaking else {}
        worker = stage.worker(app="internal", conf={"break_backend": breaking}, env=env)
        calls = {"init": (), "prerun": (), "refused": ("refused",), "away": ("away",), "linked": ("away",)}
        for task_id, args in calls.items():
            name = "value" if args else task_id
            options = {"link": stage.s("internal.value", "linked", immutable=True)} if task_id == "linked" else {}
            stage.send(f"internal.{name}", *args, task_id=task_id, **options)
        stage.send("internal.value", "last", task_id="last")
        worker.wait_log("[last] succeeded")
        stage.wait_empty()
        found = {}
        for task_id in calls:
            document = stage.app.backend.get_task_meta(task_id, cache=False)
            shown = comparable(document) if document["status"] in ENDED else document["status"]
            found[task_id] = {"document": shown, **story(stage, worker, task_id)}
        found["warned"] = worker.log.count("RuntimeWarning: Exception raised outside body")
        found["cleanup"] = worker.log.count("Process cleanup failed")
        return found

    seen = alike(play, task_acks_late=True)
    if breaking:
        assert seen["cleanup"]
        assert [line["event"] for line in seen["away"]["journal"]] == ["postrun", "internal_error"]
    else:
        assert seen["init"]["document"]["status"] == "FAILURE"
        assert seen["prerun"]["document"]["status"] == "SUCCESS"
