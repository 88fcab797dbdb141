"""`task_received`: its receivers have run before the task starts."""

import pytest


@pytest.mark.parametrize("early", [True, False], ids=["connected at import", "connected at worker_ready"])
def test_no_task_starts_before_the_receivers_of_task_received_have_run(alike, early):
    def order(stage):
        worker = stage.worker(app="receivers", concurrency=2)
        sent = [stage.send("receivers.task", number) for number in range(4)]
        assert [result.get(timeout=30) for result in sent] == [0, 1, 2, 3]
        lines = [stage.journal(id=result.id) for result in sent]
        assert worker.log.count("received") >= 4
        return [[(line["event"], line.get("args"), line.get("nesting")) for line in found] for found in lines]

    seen = alike(order, connect_early=early)
    assert seen[0] == [("received", [0], 0), ("ran", None, None)]
