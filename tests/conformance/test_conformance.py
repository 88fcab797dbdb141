"""Celery's own integration suite with celeriac as the worker: what the reference passes, we pass.

The harness lies beside the checkout (CONFORMANCE is its path); it fetches the suite.

    CONFORMANCE_FILES="test_tasks.py test_inspect.py"     some files only
    CONFORMANCE_ON="redis/redis amqp/rpc amqp/redis"      which brokers and backends
"""

import pytest
from support.conformance import parts

LONGEST = 45 * 60  # seconds; the whole suite on a busy machine


@pytest.mark.timeout(LONGEST)
@pytest.mark.parametrize("part", [name for name, _, _ in parts()])
def test_what_the_reference_worker_passes_is_passed(runs, part):
    status, text = runs.finished(part, LONGEST)
    summary = text[text.rfind("\n\n") :]
    print(summary)
    assert status == 0, text[-20_000:]
    assert "must pass:" in summary, "the harness compared nothing"
