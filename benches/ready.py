"""From start to `ready.`, beside Celery: `python benches/ready.py [rounds]`. Default options, `-c 2`, in turns."""

import json
import os
import statistics
import subprocess
import sys
import time

from common import APPS, redis
from support.worker import COMMANDS


def start(command, name, env):
    began = time.monotonic()
    process = subprocess.Popen(
        [*command, "-A", "app", "worker", "-l", "INFO", "-c", "2", "-n", f"{name}@here"],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while (line := process.stdout.readline()) and b" ready." not in line:
        pass
    took = time.monotonic() - began
    assert line, f"{name} ended before it was ready"
    process.terminate()
    process.stdout.read()
    process.wait()
    return took


def run(rounds):
    took = {kind: [] for kind in ("celery", "celeriac")}
    with redis() as (server, _):
        conf = {"broker_url": server.url, "result_backend": server.url, "broker_connection_retry_on_startup": True}
        env = os.environ | {
            **APPS, "PYTHONUNBUFFERED": "1", "C_FORCE_ROOT": "1",
            "APP_CONF": json.dumps(conf),
        }  # fmt: skip
        for number in range(rounds):
            for kind, times in took.items():
                times.append(start(COMMANDS[kind], f"{kind}{number}", env))
    for kind, times in took.items():
        print(f"{kind}: median {statistics.median(times):.2f} s of {', '.join(f'{one:.2f}' for one in times)}")


if __name__ == "__main__":
    run(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
