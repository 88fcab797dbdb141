"""Protocol 1 messages that only a child may decode: pickled, YAML, msgpack or compressed ones.

The supervisor reads JSON only. A child hands such a message back as protocol 2, in the serializer it came in, and
the supervisor judges it anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from types import SimpleNamespace
from typing import Any, NamedTuple

from celery.exceptions import InvalidTaskError
from celery.utils.saferepr import saferepr
from celery.worker import strategy
from kombu import serialization
from kombu.utils import json as kombu_json
from kombu.utils.encoding import ensure_bytes

#: What travels in the body of protocol 2, not in its headers.
IN_BODY = ("args", "kwargs", "callbacks", "errbacks", "chord")


class NotATask(ValueError):
    """A message that no task is to be made of."""


class Translated(NamedTuple):
    """The protocol 2 message."""

    headers: str
    body: bytes
    content_type: str
    content_encoding: str


def translate(body: Any, headers: dict[str, Any], content_type: str) -> Translated:
    """The protocol 2 message for a decoded protocol 1 or hybrid body.

    Raises `NotATask`, or `InvalidTaskError` where Celery would; other errors are of serializers that do not
    take back what they gave.
    """
    if not isinstance(body, Mapping):
        raise NotATask("its body is no mapping")
    message = SimpleNamespace(headers=headers)
    if "args" in body and ("task" in headers or "task" in body):
        # As in 5.7: whatever has arguments is taken for a hybrid.
        payload, made, _, utc = strategy.hybrid_to_proto2(message, body)
        # More than Celery keeps: the order of a chord's members, and what the arguments look like.
        if "group_index" in body:
            made.setdefault("group_index", body["group_index"])
        made["argsrepr"] = made["argsrepr"] or saferepr(payload[0])
        made["kwargsrepr"] = made["kwargsrepr"] or saferepr(payload[1])
    elif "task" in headers:
        raise InvalidTaskError("the body is neither [args, kwargs, options] nor a mapping with args")
    elif "task" in body:
        payload, made, _, utc = strategy.proto1_to_proto2(message, dict(body))
    else:
        raise NotATask("its body names no task")
    made = {name: value for name, value in made.items() if name not in IN_BODY and name != "compression"}
    made.setdefault("utc", utc)
    if not isinstance(made.get("id"), str):
        raise InvalidTaskError("Task message has no id")
    for name in ("eta", "expires"):
        if isinstance(made.get(name), datetime):
            made[name] = made[name].isoformat()
    serializer = serialization.registry.type_to_name[content_type]
    content_type, content_encoding, data = serialization.dumps(payload, serializer=serializer)
    return Translated(kombu_json.dumps(made), ensure_bytes(data), content_type, content_encoding)
