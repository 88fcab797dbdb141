"""Records remote control requests and a stock worker's replies, on a private Redis.

    python tests/messages/record_control.py > tests/messages/control/recorded.json

Each case holds the request as it travels and the reply (null where none came). The worker has one child that
sleeps in `tasks.sleep[active]`; `tasks.sleep[reserved]` waits; `tasks.add[scheduled]` has an eta.
"""

import base64
import json
import os
import socket
import subprocess
import sys
import tempfile
import time

from celery import Celery

port = int(os.environ.get("RECORD_PORT", 0))
if not port:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
app = Celery("tasks", broker=f"redis://127.0.0.1:{port}/0", backend=f"redis://127.0.0.1:{port}/1")
app.conf.worker_prefetch_multiplier = 2
node = "celery@recorded"


@app.task(name="tasks.add")
def add(x, y=0):
    return x + y


@app.task(name="tasks.sleep", rate_limit="100/m")
def sleep(seconds, **note):
    time.sleep(seconds)


def await_(what, condition):
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"gave up: {what}")
        time.sleep(0.05)


def ask(method, **arguments):
    replies = app.control.broadcast(method, arguments=arguments, reply=True, timeout=1)
    return replies[0][node] if replies else None


COMMANDS = [
    ("ping", {}),
    ("clock", {}),
    ("stats", {}),
    ("active", {}),
    ("active", {"safe": True}),
    ("dump_active", {}),
    ("reserved", {}),
    ("scheduled", {}),
    ("revoked", {}),
    ("registered", {}),
    ("registered", {"taskinfoitems": ["name", "rate_limit", "_app"]}),
    ("registered", {"builtins": True}),
    ("query_task", {"ids": ["active", "reserved", "scheduled", "nobody"]}),
    ("query_task", {"ids": "active"}),
    ("active_queues", {}),
    ("hello", {"from_node": "celery@other", "revoked": {"x1": 1.5, "x2": 2.5}}),
    ("hello", {"from_node": node, "revoked": {}}),
    ("revoke", {"task_id": "r1", "terminate": False, "signal": "SIGTERM"}),
    ("revoke", {"task_id": ["r2"]}),
    ("revoke", {"task_id": []}),
    ("revoke", {"task_id": "nobody", "terminate": True, "signal": "SIGKILL"}),
    ("revoke", {"task_id": "nobody", "terminate": True, "signal": "SIGNOPE"}),
    ("revoked", {}),
    ("revoke_by_stamped_headers", {"headers": {"k": "v"}}),
    ("revoke_by_stamped_headers", {"headers": {"k": ["v", "w"]}, "terminate": True}),
    ("revoke_by_stamped_headers", {"headers": ["a=b", "c=d"]}),
    ("rate_limit", {"task_name": "tasks.add", "rate_limit": "10/m"}),
    ("rate_limit", {"task_name": "tasks.add", "rate_limit": 0}),
    ("rate_limit", {"task_name": "tasks.add", "rate_limit": "abc"}),
    ("rate_limit", {"task_name": "tasks.add", "rate_limit": "1/y"}),
    ("rate_limit", {"task_name": "tasks.none", "rate_limit": "10/m"}),
    ("time_limit", {"task_name": "tasks.add", "soft": 1, "hard": 2}),
    ("time_limit", {"task_name": "tasks.none", "soft": 1}),
    ("add_consumer", {"queue": "q2", "exchange": None, "exchange_type": "direct", "routing_key": None}),
    ("active_queues", {}),
    ("cancel_consumer", {"queue": "q2"}),
    ("pool_grow", {"n": 1}),
    ("pool_shrink", {"n": 1}),
    ("autoscale", {"max": 3, "min": 1}),
    ("pool_restart", {"modules": None, "reload": False, "reloader": None}),
    ("enable_events", {}),
    ("enable_events", {}),
    ("disable_events", {}),
    ("disable_events", {}),
    ("heartbeat", {}),
    ("election", {"id": "1", "topic": "t", "action": None}),
    ("nonsense", {}),
    ("ping", {"x": 1}),
    ("enable_events", {"x": 1}),
    ("query_task", {}),
    ("rate_limit", {"task_name": "tasks.add"}),
    ("add_consumer", {}),
    ("cancel_consumer", {}),
    ("revoke", {}),
    ("terminate", {"signal": "KILL", "task_id": ["active"]}),
]


def main():
    directory = tempfile.mkdtemp()
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", directory],
        stdout=subprocess.DEVNULL,
    )
    worker = None
    try:
        await_("redis", lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        environment = {**os.environ, "RECORD_PORT": str(port), "PYTHONPATH": os.path.dirname(__file__)}
        options = [
            "-A",
            "record_control",
            "worker",
            "-n",
            node,
            "-c",
            "1",
            "-l",
            "WARNING",
            "--without-mingle",
        ]
        worker = subprocess.Popen(
            [sys.executable, "-m", "celery", *options, "--without-gossip"],
            env=environment,
            cwd=directory,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        await_("the worker", lambda: ask("ping") is not None)
        sleep.apply_async((60,), {"note": "it's"}, task_id="active")
        await_("active", lambda: ask("active"))
        add.apply_async((1, 1), task_id="scheduled", countdown=3600)
        sleep.apply_async((1,), task_id="reserved")
        await_("scheduled", lambda: ask("scheduled"))
        await_("reserved", lambda: ask("reserved"))
        with app.connection() as connection:
            watch = connection.default_channel._create_client().pubsub()
        watch.subscribe("/0.celery.pidbox")
        await_("subscribed", lambda: watch.get_message(timeout=1))
        cases = []
        for method, arguments in COMMANDS:
            reply = app.control.broadcast(method, arguments=arguments, reply=True, timeout=0.7, limit=1)
            request = json.loads(watch.get_message(timeout=5)["data"])
            body = json.loads(base64.b64decode(request["body"]))
            cases.append(
                {
                    "request": body,
                    "headers": request["headers"],
                    "reply": reply[0] if reply else None,
                }
            )
        json.dump(cases, sys.stdout, indent=1)
        print()
    finally:
        for process in (worker, server):
            if process:
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
