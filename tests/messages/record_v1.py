"""Records protocol 1 messages of the installed Celery, and what its worker makes of them.

    python tests/messages/record_v1.py > tests/messages/v1/recorded.json

Each case holds the envelope as it lies in a Redis list and, under `becomes`, the protocol 2 headers and body
that Celery's own strategy module derives from it, or the exception that it raises.
"""

import base64
import json
import sys
from datetime import datetime, timedelta, timezone

from celery import Celery, chain, chord, group
from celery.exceptions import InvalidTaskError
from celery.utils.saferepr import saferepr
from celery.worker.strategy import hybrid_to_proto2, proto1_to_proto2
from kombu.message import Message

app = Celery("tasks", broker="memory://", backend="cache+memory://")
app.conf.update(task_protocol=1, task_default_queue="v1")


@app.task(name="tasks.add")
def add(x, y=0):
    return x + y


def sent(send):
    """The envelopes that `send` put into the queue."""
    send()
    with app.connection() as connection:
        queue = connection.default_channel._queue_for("v1")
        envelopes = []
        while not queue.empty():
            envelopes.append(queue.get_nowait())
        return envelopes


def crafted(body, headers=None, content_type="application/json"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return {
        "body": base64.b64encode(data).decode(),
        "content-encoding": "utf-8",
        "content-type": content_type,
        "headers": {} if headers is None else headers,
        "properties": {"correlation_id": "c", "body_encoding": "base64"},
    }


def becomes(envelope):
    message = Message(
        body=base64.b64decode(envelope["body"]),
        content_type=envelope["content-type"],
        content_encoding=envelope["content-encoding"],
        headers=envelope["headers"],
        properties=envelope["properties"],
        accept=["application/json"],
    )
    try:
        payload = message.decode()
        if "args" in payload:
            (args, kwargs, embed), headers, _, utc = hybrid_to_proto2(message, payload)
            # More than the original tells: the order of a chord's members, and what the arguments look like.
            if "group_index" in payload:
                headers.setdefault("group_index", payload["group_index"])
            headers["argsrepr"] = headers["argsrepr"] or saferepr(args)
            headers["kwargsrepr"] = headers["kwargsrepr"] or saferepr(kwargs)
        else:
            (args, kwargs, embed), headers, _, utc = proto1_to_proto2(message, payload)
    except InvalidTaskError as error:
        return {"malformed": str(error)}
    except Exception as error:
        return {"undecodable": type(error).__name__}
    # The original passes its whole body on as headers; arguments and callbacks travel in protocol 2's body.
    headers = {
        key: value for key, value in headers.items() if key not in ("args", "kwargs", "callbacks", "errbacks", "chord")
    }
    headers.setdefault("utc", utc)
    return {"headers": headers, "body": json.dumps([args, kwargs, embed])}


later = datetime(2031, 2, 3, 4, 5, 6, 789, tzinfo=timezone(timedelta(hours=2)))
text = 'it\'s "quoted" \\ \u00fc \u20ac \U0001f600\n'
sends = {
    "plain": lambda: add.apply_async((4, 6), task_id="t1"),
    "keywords": lambda: add.apply_async((4,), {"y": 6}, task_id="t2"),
    "no arguments": lambda: app.send_task("tasks.none", task_id="t3"),
    "eta and expires": lambda: add.apply_async((1, 1), eta=later, expires=later, task_id="t4"),
    "limits": lambda: add.apply_async((1, 1), time_limit=30, soft_time_limit=20, retries=2, task_id="t5"),
    "callbacks": lambda: add.apply_async((1, 1), link=add.s(2), link_error=add.si(3, 4), task_id="t6"),
    "chain": lambda: chain(add.s(1, 1), add.s(2), add.s(3)).apply_async(task_id="t7"),
    "group": lambda: group(add.s(1, 1), add.s(2, 2)).apply_async(task_id="t8"),
    "chord": lambda: chord([add.s(1, 1), add.s(2, 2)], app.signature("tasks.sum")).apply_async(task_id="t9"),
    "text": lambda: add.apply_async((text,), {"y": [text]}, task_id="t10"),
    "numbers": lambda: add.apply_async(
        (
            [
                1,
                -2,
                3.0,
                0.1,
                1e16,
                1.5e-7,
                1e22,
                123456789.125,
                2**70,
                True,
                None,
                float("nan"),
                float("-inf"),
            ],
        ),
        task_id="t11",
    ),
    "nesting": lambda: add.apply_async(
        ([[[["deep"]]], {"a": {"b": {"c": {"d": 1}}}}, [], {}, [[[]]], [[{}]]],), task_id="t12"
    ),
    "custom headers": lambda: add.apply_async((1, 1), headers={"x-tenant": "a"}, task_id="t13"),
}
task = {"task": "tasks.add", "id": "c", "args": [1, 2], "kwargs": {}}
crafts = {
    "sparse": crafted({"task": "tasks.add", "id": "c"}),
    "local time": crafted({**task, "eta": "2031-02-03T04:05:06", "utc": False}),
    "taskset of old": crafted({**task, "taskset": "g1"}),
    "keywords are a list": crafted({**task, "kwargs": [1]}),
    "keywords are null": crafted({**task, "kwargs": None}),
    "hybrid": crafted(
        {**task, "id": "body", "retries": 3, "utc": True, "callbacks": None},
        {"task": "tasks.add", "id": "header", "lang": "py", "argsrepr": "(1, 2)"},
    ),
    "hybrid without id in the headers": crafted(task, {"task": "tasks.add", "shadow": "s"}),
    "hybrid with bad keywords": crafted({**task, "kwargs": 3}, {"task": "tasks.add", "id": "c"}),
    "broken": crafted(b'{"task": "tasks.add", '),
    "not utf-8": crafted(b'{"task": "tasks.add", "id": "\xff"}'),
}
cases = []
for name, send in sends.items():
    for envelope in sent(send):
        # Ids of group and chord are random and the sender's, its oid included: kept as recorded.
        cases.append({"name": name, "envelope": envelope, "becomes": becomes(envelope)})
for name, envelope in crafts.items():
    cases.append({"name": name, "envelope": envelope, "becomes": becomes(envelope)})
json.dump(cases, sys.stdout, indent=1)
print()
