"""A supervisor to be killed by a test: prints the pids of its zygote and children, then waits."""

from __future__ import annotations

import sys
import threading

import pool_app
import pool_driver
from celeriac import zygote


def main(kind: str) -> None:
    app = pool_app.make()
    app.finalize()
    supervisor = pool_driver.Supervisor(zygote.Plan(app, "celery@test", kind=kind, lanes=2 if kind == "threads" else 1))
    children = [supervisor.fork(index) for index in range(2)]
    children[0].run(1, "sleep", 600)
    children[0].expect("accepted")
    print(supervisor.pid, *(child.pid for child in children), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1])
