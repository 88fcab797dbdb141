"""`async def` tasks beside tasks that compute: `python benches/async_tasks.py [naps] [spins]`.

Puts 10,000 naps of 0.1 s and 100 tasks of 50 ms CPU on one queue, starts a worker with `-c 2` and says how long each
kind took from the first result on; then each kind alone.
"""

import sys
import time

import psutil
from common import APPS, redis, stage


def run(server, folder, naps, spins):
    with stage("celeriac", server, folder) as here:
        client = here.redis()
        client.flushall()
        spun = set()
        with here.app.connection_for_write() as connection, connection.Producer() as producer:
            every = max(1, naps // spins) if naps and spins else 1
            for number in range(max(naps, spins * every)):
                if number < naps:
                    here.app.send_task("nap", producer=producer)
                if number % every == 0 and len(spun) < spins:
                    spun.add(here.app.send_task("spin", (0.05,), producer=producer).id)
        worker = here.worker(
            "-l", "ERROR", app="app", concurrency=2, ready=False,
            env=APPS,
        )  # fmt: skip
        began, ended = None, {}
        while len(ended) < 2:
            assert worker.process.poll() is None, worker.describe()
            keys = [key.decode().removeprefix("celery-task-meta-") for key in client.keys("celery-task-meta-*")]
            now = time.monotonic()
            if keys and began is None:
                began = now
            done = sum(key in spun for key in keys)
            if done >= spins:
                ended.setdefault("spin", now)
            if len(keys) - done >= naps:
                ended.setdefault("nap", now)
            time.sleep(0.05)
        spent = sum(sum(process.cpu_times()[:2]) for process in worker.processes() if psutil.pid_exists(process.pid))
        took = {what: at - began for what, at in ended.items()}
        print(f"{naps} naps and {spins} tasks of 50 ms:", end=" ")
        if naps:
            print(f"naps {took['nap']:.2f} s", end=", ")
        if spins:
            print(f"tasks {took['spin']:.2f} s ({spins / took['spin']:.1f}/s)", end=", ")
        print(f"CPU of the worker {spent:.2f} s", flush=True)
        worker.stop()


if __name__ == "__main__":
    count, tasks = (int(word) for word in (sys.argv[1:] + ["10000", "100"][len(sys.argv) - 1 :]))
    with redis() as (redis_server, place):
        run(redis_server, place, count, tasks)
        run(redis_server, place, 0, tasks)
        run(redis_server, place, count, 0)
