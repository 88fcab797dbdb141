"""Celery's own integration suite with celeriac as the worker: what the reference passes, we pass.

The harness lies beside the checkout (CONFORMANCE is its path); it fetches the suite. The configurations run side
by side, because nearly all of their time is waiting.

    CONFORMANCE_FILES="test_canvas.py test_inspect.py"    other files than those below
    CONFORMANCE_ON="redis/redis amqp/rpc amqp/redis"      which brokers and backends
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.worker import COMMANDS

HARNESS = Path(os.environ.get("CONFORMANCE", "../shared/conformance/run-integration")).resolve()

FILES = os.environ.get(
    "CONFORMANCE_FILES",
    "test_tasks.py test_backend.py test_serialization.py test_loader.py test_logfile_format.py"
    " test_redis_backend.py test_worker.py",
).split()

# amqp/redis shares its broker with the one and its backend with the other: for those who have the time.
CONFIGURATIONS = os.environ.get("CONFORMANCE_ON", "redis/redis amqp/rpc").split()

LONGEST = 45 * 60  # seconds; the whole suite on a busy machine

if not HARNESS.exists():
    pytest.skip(f"{HARNESS} is absent: Celery's own suite is not run", allow_module_level=True)


def files_of(suite):
    """Not every file exists in every version of the suite."""
    return [f"t/integration/{name}" for name in FILES if (suite / "t" / "integration" / name).exists()]


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    cache = Path(os.environ.get("CELERY_CONFORMANCE_CACHE", request.config.rootpath / ".cache" / "conformance"))
    harness = [sys.executable, str(HARNESS), "--cache", str(cache)]
    subprocess.run([*harness, "--prepare"], check=True, timeout=600)
    suite = max(cache.glob("suite-*"))
    rabbitmq = request.getfixturevalue("rabbitmq_server") if any("amqp" in c for c in CONFIGURATIONS) else None
    started = {}
    for configuration in CONFIGURATIONS:
        broker, backend = configuration.split("/")
        folder = tmp_path_factory.mktemp("conformance")
        vhost = f"conformance-{backend}"
        urls = ["--broker", rabbitmq.add_vhost(vhost) if broker == "amqp" else "redis://auto"]
        urls += ["--backend", "rpc://" if backend == "rpc" else "redis://auto"]
        log = folder / "run.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*harness, *urls, "--worker", f"{COMMANDS['celeriac'][0]} {{globals}} worker {{options}}",
                 "--must-pass", "--out", str(folder / "out"), "--tests", *files_of(suite)],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip
        started[configuration] = (process, log)
    yield started
    for process, _ in started.values():
        process.terminate()
        process.wait(60)


@pytest.mark.timeout(LONGEST)
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_what_the_reference_worker_passes_is_passed(runs, configuration):
    process, log = runs[configuration]
    status = process.wait(LONGEST)
    text = log.read_text(errors="replace")
    summary = text[text.rfind("\n\n") :]
    print(summary)
    assert status == 0, text[-20_000:]
    assert "must pass:" in summary, "the harness compared nothing"
