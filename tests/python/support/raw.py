"""Messages put on a queue as they are, past everything that Celery would check or add."""

import base64
import json
import uuid

from kombu import Connection


def headers(name, task_id=None, **more):
    """Protocol 2, as Celery 5.7 sends it."""
    task_id = task_id or str(uuid.uuid4())
    return {
        "lang": "py", "task": name, "id": task_id, "shadow": None, "eta": None, "expires": None, "group": None,
        "group_index": None, "retries": 0, "timelimit": [None, None], "root_id": task_id, "parent_id": None,
        "argsrepr": "()", "kwargsrepr": "{}", "origin": "gen1@test", "ignore_result": False,
        "replaced_task_nesting": 0, "stamped_headers": None, "stamps": {}, **more,
    }  # fmt: skip


def body(args=(), kwargs=None, embed=None):
    nothing = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    return json.dumps([list(args), kwargs if kwargs is not None else {}, embed or nothing]).encode()


def put(stage, headers, body, content_type="application/json", content_encoding="utf-8", **properties):
    """Publishes one message; what is not bytes is not touched either."""
    with Connection(stage.conf["broker_url"]) as connection:
        channel = connection.channel()
        if connection.transport.driver_type == "redis":
            envelope = {
                "body": base64.b64encode(body).decode(),
                "content-type": content_type,
                "content-encoding": content_encoding,
                "headers": headers,
                "properties": {
                    "correlation_id": (headers or {}).get("id"), "reply_to": "", "delivery_mode": 2, "priority": 0,
                    "delivery_info": {"exchange": "", "routing_key": stage.queue}, "body_encoding": "base64",
                    "delivery_tag": str(uuid.uuid4()), **properties,
                },
            }  # fmt: skip
            channel.client.lpush(stage.queue, json.dumps(envelope))
        else:
            message = channel.prepare_message(
                body, content_type=content_type, content_encoding=content_encoding, headers=headers,
                properties={"delivery_mode": 2, **properties},
            )  # fmt: skip
            channel.basic_publish(message, exchange="", routing_key=stage.queue)
