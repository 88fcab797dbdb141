"""Celery's own integration suite with celeriac as the worker: what the reference passes, we pass.

The harness lies beside the checkout (CONFORMANCE is its path); it fetches the suite.

    CONFORMANCE_FILES="test_tasks.py test_inspect.py"     some files only
    CONFORMANCE_ON="redis/redis amqp/rpc amqp/redis"      which brokers and backends
"""

import os
from pathlib import Path

import pytest
from support.conformance import HARNESS, Harness, parts

LONGEST = 45 * 60  # seconds; the whole suite on a busy machine


@pytest.mark.timeout(LONGEST)
@pytest.mark.parametrize(("broker", "backend", "selection"), [pytest.param(*part, id=name) for name, *part in parts()])
def test_what_the_reference_worker_passes_is_passed(request, tmp_path, broker, backend, selection):
    if not HARNESS.exists():
        pytest.skip(f"{HARNESS} is absent: Celery's own suite is not run")
    cache = os.environ.get("CELERY_CONFORMANCE_CACHE", request.config.rootpath / ".cache" / "conformance")
    harness = Harness(Path(cache))
    harness.prepare()
    # The harness starts a Redis of its own.
    urls = {"redis": "redis://auto", "rpc": "rpc://"}
    if broker == "amqp":
        urls["amqp"] = request.getfixturevalue("rabbitmq_server").add_vhost(tmp_path.name)
    status, text = harness.run(urls[broker], urls[backend], selection, tmp_path, LONGEST)
    summary = text[text.rfind("\n\n") :]
    print(summary)
    assert status == 0, text[-20_000:]
    assert "must pass:" in summary, "the harness compared nothing"
