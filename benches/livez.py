"""How soon `/livez` answers while every core is busy: `python benches/livez.py [requests] [burners]`.

A worker with `-c 2` computes in both children, as many other processes do besides; each request comes after a pause.
"""

import os
import socket
import subprocess
import sys
import time

from common import APPS, quantiles, redis, stage
from support.servers import free_port
from support.waiting import until


def ask(port):
    began = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: here\r\n\r\n")
        answer = b""
        while part := connection.recv(4096):
            answer += part
    assert answer.startswith(b"HTTP/1.1 200"), answer
    return time.perf_counter() - began


def run(requests, burners):
    port = free_port()
    with redis() as (server, folder), stage("celeriac", server, folder, "disabled://") as here:
        here.worker(
            "--http", f"127.0.0.1:{port}", app="app", concurrency=2,
            env=APPS,
        )  # fmt: skip
        for _ in range(2):
            here.send("burn")
        until(lambda: here.depth() == 0, here.logs)
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(burners)]
        try:
            time.sleep(1)
            took = []
            for _ in range(requests):
                took.append(ask(port))
                time.sleep(0.02)
        finally:
            for other in others:
                other.kill()
        shown = [f"{1000 * value:.2f}" for value in quantiles(took, 0.5, 0.9, 0.99, 1)]
        print(f"{requests} requests, load {os.getloadavg()[0]:.1f}: p50, p90, p99, most: {', '.join(shown)} ms")


if __name__ == "__main__":
    run(*(int(word) for word in (sys.argv[1:] + ["1000", "2"][len(sys.argv) - 1 :])))
