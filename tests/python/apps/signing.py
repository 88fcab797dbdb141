"""An app whose messages and results are signed; KEYS is the folder of keys and certificates.

Run as a program it is its own producer, in a process of its own, because signing changes kombu's registry for all:
it does what its argument says and prints what came of it as JSON.
"""

import base64
import json
import os
import sys

from base import make_app, record
from kombu import serialization

KEYS = os.environ["KEYS"]

app = make_app("signing")
app.conf.update(
    task_serializer="auth",
    result_serializer="auth",
    event_serializer="auth",
    accept_content=["auth"],
    result_accept_content=["auth"],
    security_key=f"{KEYS}/{os.environ.get('SIGNER', 'known')}.key",
    security_certificate=f"{KEYS}/{os.environ.get('SIGNER', 'known')}.crt",
    security_cert_store=f"{KEYS}/store/*.crt",
)
if not os.environ.get("UNSIGNED"):
    app.setup_security()


@app.task(name="add")
def add(x, y):
    record("ran", x=x, y=y)
    return x + y


@app.task(name="fail")
def fail():
    raise ValueError("no")


@app.task(name="send")
def send(x):
    add.delay(x, 1)
    return (add.s(x, 2) | add.s(3)).apply_async().id


def signed():
    result = add.delay(1, 2)
    value = result.get(timeout=30)
    raw = app.backend.get(app.backend.get_key_for_task(result.id)) if hasattr(app.backend, "get_key_for_task") else b""
    failed = fail.delay()
    error = failed.get(timeout=30, propagate=False)
    send.delay(7).get(timeout=30)
    return {"value": value, "plain": b"SUCCESS" in (raw or b""), "error": [type(error).__name__, str(error)]}


def put(body, content_type="application/data"):
    """A message whose body is as it is here."""
    from support import raw

    class Stage:
        conf = {"broker_url": app.conf.broker_url}
        queue = app.conf.task_default_queue

    raw.put(Stage, raw.headers("add"), body, content_type=content_type, content_encoding="utf-8")


def tampered():
    _, _, body = serialization.dumps([[1, 2], {}, {}], serializer="auth")
    put(base64.b64encode(base64.b64decode(body).replace(b"[[1, 2]", b"[[1, 9]")))


def stranger():
    """Signed, by one whose certificate is not in the store."""
    _, _, body = serialization.dumps([[5, 5], {}, {}], serializer="auth")
    put(body.encode() if isinstance(body, str) else body)


def garbage():
    put(b"this is no base64!!")


def unsigned():
    from support import raw

    put(raw.body((1, 1)), "application/json")


def control():
    return [
        app.control.ping(timeout=10, limit=1),
        app.control.rate_limit("add", "100/m", reply=True, timeout=10, limit=1),
        [sorted(reply) for reply in (app.control.inspect(timeout=10, limit=1).stats() or {}).values()],
    ]


def unsigned_control():
    serialization.enable_insecure_serializers(["json"])
    app.control.mailbox.serializer = "json"
    app.control.shutdown()


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
