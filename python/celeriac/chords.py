"""What Celery before 5.7 lacks: a member of a chord on Redis counts once, and the body is sent once."""

from __future__ import annotations

import contextlib
import logging
import uuid
from typing import Any

from celery.canvas import maybe_signature
from celery.exceptions import ChordError
from celery.result import GroupResult, allow_join_result

logger = logging.getLogger("celery.backends.redis")

#: As 5.7: how long a sender has for the body, and for how long it is remembered that it was sent.
SENDER, SENT = 6, 300


def on_part(backend: Any, request: Any, state: str, result: Any) -> Any:
    """Counts the running task as a member of its chord; sends the body when it is the last."""
    group = request.group
    if not group or not request.id:
        return None
    index = "+inf" if request.group_index is None else request.group_index
    keys = [backend.get_key_for_group(group, suffix) for suffix in (".j", ".t", ".s", ".d", "", ".c")]
    encoded = backend.encode([1, request.id, state, backend.encode_result(result, state)])
    expires = int(backend.expires or 0)
    ordered = int(bool(backend._chord_zset))
    arguments = [request.id, encoded, ordered, index, expires, 0, SENDER, uuid.uuid4().hex]
    *_, sends = backend._count_member(keys, arguments)
    return _send(backend, request, keys) if sends else None


def _send(backend: Any, request: Any, keys: list[Any]) -> Any:
    client, (results, added, size, counted, _, sender) = backend.client, keys
    body = maybe_signature(request.chord, app=backend.app)
    try:
        body.delay(_results(backend, request.group, results))
    except Exception as exc:
        logger.exception("Chord %r: its body could not be sent: %r", request.group, exc)
        error = exc if isinstance(exc, ChordError) else ChordError(f"Join error: {exc!r}")
        try:
            return backend.chord_error_from_stack(body, error)
        finally:
            # Nobody fails it again.
            client.delete(size)
    # What stays behind expires.
    with contextlib.suppress(Exception):
        client.set(sender, "done", ex=SENT)
        client.delete(results, added, size, counted)
    return None


def _results(backend: Any, group: str, results: Any) -> list[Any]:
    saved = GroupResult.restore(group, app=backend.app)
    if saved is None:
        client = backend.client
        stored = client.zrange(results, 0, -1) if backend._chord_zset else client.lrange(results, 0, -1)
        return [backend._unpack_chord_result(one, backend.decode) for one in stored]
    # A header with groups in it: their results are looked up, and are there.
    saved.on_ready()
    join = saved.join_native if saved.supports_native_join else saved.join
    with allow_join_result():
        joined: list[Any] = join(timeout=backend.app.conf.result_chord_join_timeout, propagate=True)
    return joined
