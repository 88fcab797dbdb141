"""Whether the replacement of children that leak shows: `python benches/leak.py [seconds]`.

A worker with `-c 2` runs a task that keeps 5 MB and, every 10 ms, one that does nothing; said is how long that one
takes from sent to begun, without a limit and with one that a child reaches after a few tasks.
"""

import sys
import time

from common import APPS, quantiles, redis, stage

LEAK, LIMIT_KIB = 5_000_000, 60 * 1024


def run(server, folder, seconds, *options):
    with stage("celeriac", server, folder, "disabled://") as here:
        worker = here.worker("-l", "WARNING", *options, app="leaking", concurrency=2, ready=False, env=APPS)
        sent = []
        with here.app.connection_for_write() as connection, connection.Producer() as producer:
            here.app.send_task("tick", (-1,), producer=producer)
            here.wait_journal("ticked")
            while len(sent) < 100 * seconds:
                sent.append(time.time())
                here.app.send_task("tick", (len(sent) - 1,), producer=producer)
                if len(sent) % 25 == 0:
                    here.app.send_task("leak", (LEAK,), producer=producer)
                time.sleep(max(0, sent[0] + len(sent) / 100 - time.time()))
            begun = here.wait_journal("ticked", len(sent) + 1)
        replaced = worker.log.count("exceeding memory limit")
        worker.stop()
    took = [1000 * (line["time"] - sent[line["number"]]) for line in begun if line["number"] >= 0]
    shown = [f"{value:.2f}" for value in quantiles(took, 0.5, 0.99, 1)]
    print(f"{replaced} children replaced: p50, p99, most: {', '.join(shown)} ms", flush=True)


if __name__ == "__main__":
    with redis() as (redis_server, place):
        for options in ([], [f"--max-memory-per-child={LIMIT_KIB}"]):
            run(redis_server, place, int(sys.argv[1]) if len(sys.argv) > 1 else 20, *options)
