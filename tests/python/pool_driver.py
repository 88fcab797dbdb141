"""A supervisor in Python: speaks the frames of src/pool/ipc.rs to a real zygote and real children."""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import Any

from celeriac import tracer, zygote

DEADLINE = 20.0
UP, ACCEPTED, STORE, ENDED = 1, 2, 3, 4
#: The work of a job: a message, not a call that somebody posted to the pool.
MESSAGE = 0
OUTCOMES = {
    1: ("success", "tf"),
    2: ("failure", "ttf"),
    3: ("retry", "tt"),
    4: ("ignored", ""),
    5: ("rejected", "btt"),
    6: ("undecodable", "t"),
    7: ("malformed", "o"),
    8: ("lost", "t"),
}


def _packed(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<I", len(data)) + data


def _hints(headers: dict[str, Any]) -> int:
    """What the supervisor has read of them."""
    ignores = headers.get("ignore_result")
    return (
        tracer.IGNORE * (ignores is True)
        | tracer.KEEP * (ignores is False)
        | tracer.RELATED * bool(headers.get("parent_id") or headers.get("group"))
        | tracer.COMPRESSED * bool(headers.get("compression"))
    )


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def bytes(self) -> bytes:
        length = self.number("I")
        self.at += length
        return self.data[self.at - length : self.at]

    def fields(self, form: str) -> list[Any]:
        read = {
            "t": lambda: self.bytes().decode(),
            "f": lambda: self.number("d"),
            "b": lambda: bool(self.number("B")),
            "o": lambda: (self.number("B"), self.bytes().decode())[1],
        }
        return [read[kind]() for kind in form]


@dataclass
class Child:
    """One child, seen from its supervisor."""

    pid: int
    link: socket.socket
    frames: list[tuple[Any, ...]] = field(default_factory=list)
    buffer: bytes = b""

    def write(self, payload: bytes) -> None:
        self.link.sendall(struct.pack("<I", len(payload)) + payload)

    def run(
        self,
        number: int,
        task: str,
        *args: Any,
        uuid: str | None = None,
        headers: dict[str, Any] | None = None,
        properties: dict[str, Any] | None = None,
        body: bytes | None = None,
        content_type: str = "application/json",
        content_encoding: str = "utf-8",
        acks_early: bool = True,
        exchange: str = "ex",
        routing_key: str = "rk",
        **kwargs: Any,
    ) -> None:
        uuid = uuid or f"id-{number}"
        head = {"task": task, "id": uuid, **(headers or {})}
        props = {"correlation_id": uuid, "reply_to": "replies", "priority": 3, **(properties or {})}
        if body is None:
            body = json.dumps([args, kwargs, {}]).encode()
        self.write(
            struct.pack("<BQ", 1, number)
            + b"".join(map(_packed, (task, uuid, json.dumps(head), json.dumps(props), exchange, routing_key, "q")))
            + struct.pack("<B", 0)
            + b"".join(map(_packed, (body, content_type, content_encoding)))
            + struct.pack("<BBB", acks_early, MESSAGE, _hints(head))
        )

    def stop(self) -> None:
        self.write(struct.pack("<B", 3))

    def recycle(self) -> None:
        self.write(struct.pack("<B", 4))

    def stored(self, serial: int, error: str | None = None) -> None:
        self.write(struct.pack("<BQB", 2, serial, error is not None) + _packed(error or ""))

    def frame(self) -> tuple[Any, ...]:
        """The next frame; EOFError when the child is gone and all was read."""
        end = time.monotonic() + DEADLINE
        while True:
            if len(self.buffer) >= 4:
                (length,) = struct.unpack_from("<I", self.buffer)
                if len(self.buffer) >= 4 + length:
                    payload, self.buffer = self.buffer[4 : 4 + length], self.buffer[4 + length :]
                    return _decode(payload)
            if not select.select([self.link], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"child {self.pid} wrote nothing")
            try:
                data = self.link.recv(65536)
            except ConnectionResetError:
                data = b""
            if not data:
                raise EOFError
            self.buffer += data

    def expect(self, name: str) -> tuple[Any, ...]:
        frame = self.frame()
        assert frame[0] == name, frame
        return frame

    def outcome(self) -> tuple[Any, ...]:
        """The fields of the next `ended` frame: (job, kind, …)."""
        while True:
            frame = self.frame()
            if frame[0] == "ended":
                return frame[1:]


def _decode(payload: bytes) -> tuple[Any, ...]:
    reader = _Reader(payload)
    kind = reader.number("B")
    if kind == UP:
        return ("up", reader.number("I"))
    if kind == ACCEPTED:
        return ("accepted", reader.number("Q"))
    if kind == STORE:
        job, waits, serial = reader.number("Q"), reader.number("B"), reader.number("Q")
        task_id, state = reader.fields("tt")
        document = reader.bytes()
        key = reader.fields("t")[0]
        lives, seconds = reader.number("B"), reader.number("d")
        expires = seconds if lives else None
        content_type, encoding = reader.fields("tt")
        return (
            "store",
            job,
            serial if waits else None,
            {
                "task_id": task_id,
                "state": state,
                "document": document,
                "key": key,
                "expires": expires,
                "content_type": content_type,
                "content_encoding": encoding,
            },
        )
    assert kind == ENDED, payload
    job = reader.number("Q")
    name, form = OUTCOMES[reader.number("B")]
    return ("ended", job, name, *reader.fields(form))


class Supervisor:
    """Owns a zygote."""

    def __init__(self, plan: zygote.Plan) -> None:
        handle = zygote.start(plan)
        self.pid = handle.pid
        self.control = socket.socket(fileno=handle.socket)
        self.control.settimeout(DEADLINE)
        self.numbers = 0
        self.reports: list[tuple[int, int, int]] = []

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(self, *_: object) -> None:
        self.control.close()
        os.waitpid(self.pid, 0)

    def report(self, kind: int, number: int) -> int:
        """The value of the first such report, waited for."""
        while True:
            for at, (known, child, value) in enumerate(self.reports):
                if (known, child) == (kind, number):
                    del self.reports[at]
                    return value
            data = self.control.recv(zygote.RECORD.size)
            assert data, "the zygote has hung up"
            known, child, _, value = zygote.RECORD.unpack(data)
            self.reports.append((known, child, value))

    def request_fork(self, index: int = 0) -> tuple[int, socket.socket]:
        self.numbers += 1
        ours, theirs = socket.socketpair()
        socket.send_fds(self.control, [zygote.RECORD.pack(zygote.FORK, self.numbers, index, 0)], [theirs.fileno()])
        theirs.close()
        return self.numbers, ours

    def fork(self, index: int = 0) -> Child:
        """A child that is up."""
        number, ours = self.request_fork(index)
        child = Child(self.report(zygote.FORKED, number), ours)
        child.number = number  # type: ignore[attr-defined]
        assert child.frame() == ("up", child.pid)
        return child

    def signal(self, child: Any, signum: int) -> None:
        self.control.sendall(zygote.RECORD.pack(zygote.SIGNAL, child.number, 0, signum))
        self.report(zygote.SIGNALLED, child.number)

    def exit_code(self, child: Any) -> int:
        return self.report(zygote.EXITED, child.number)
