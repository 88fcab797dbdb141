"""`--log-format json`: every record of worker, children and captured output as one JSON object a line.

Celery sets up its handlers as always; only the formatter that it gives to them is ours. Handlers and formatters of the
app's own stay as they are: with `setup_logging`, or handlers that `worker_hijack_root_logger = False` leaves, nothing
is changed. `src/logging.rs` writes the line of a received task in the same form.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import PurePath
from typing import Any
from uuid import UUID

from celery._state import get_current_task
from celery.app.log import TaskFormatter
from celery.utils.log import ColorFormatter
from celery.utils.saferepr import saferepr

__all__ = ["JsonFormatter", "about", "early", "has_effect", "install"]

#: Headers of the message that the parent process is busy with.
_about: ContextVar[Mapping[str, Any] | None] = ContextVar("celeriac_about", default=None)

#: What every record has; the rest was given with ``extra``.
_COMMON = frozenset(vars(logging.makeLogRecord({}))) | {
    "asctime", "color", "data", "message", "task_id", "task_name", "taskName",
}  # fmt: skip

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


@contextmanager
def about(headers: Mapping[str, Any] | None) -> Iterator[None]:
    """Records made within are about the task of a message with these headers."""
    token = _about.set(headers)
    try:
        yield
    finally:
        _about.reset(token)


class JsonFormatter(logging.Formatter):
    """Takes the place of Celery's formatters; the format that they would use is not used."""

    def __init__(self, fmt: str | None = None, use_color: Any = False, datefmt: str | None = None) -> None:
        super().__init__(fmt, datefmt)

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        fields: dict[str, Any] = {
            "timestamp": _timestamp(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
            "process": record.processName,
            "pid": record.process,
            **_context(record),
        }
        if record.exc_info and record.exc_info[0] is not None:
            fields["exception"] = self._exception(record.exc_info)
        if record.stack_info:
            fields["stack"] = self.formatStack(record.stack_info)
        data = getattr(record, "data", None)
        if data is not None:
            fields["data"] = data
        extra = {name: value for name, value in vars(record).items() if name not in _COMMON}
        if extra:
            fields["extra"] = extra
        try:
            return json.dumps(fields, default=_plain, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            # Keys that are no text, NaN, something that holds itself.
            shown = {name: saferepr(fields[name]) for name in ("data", "extra") if name in fields}
            return json.dumps({**fields, **shown}, default=_plain)

    def _exception(self, info: Any) -> dict[str, str]:
        kind, exc, _ = info
        exc = getattr(exc, "exc", exc) if type(exc).__name__ == "ExceptionWithTraceback" else exc
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        try:
            message = str(exc)
        except Exception as unspeakable:
            message = f"<unprintable {name}: {unspeakable!r}>"
        try:
            lines = self.formatException(info)
        except Exception:
            lines = "".join(traceback.format_exception_only(type(exc), exc))
        return {"type": name, "message": message, "traceback": lines}


def install(log: Any) -> None:
    """Has Celery give our formatter to the handlers that it makes from now on, in children too."""
    setup_handlers = log.setup_handlers

    def with_json(logger: Any, logfile: Any, format: Any, colorize: Any, *args: Any, **options: Any) -> Any:
        if not args and options.get("formatter", ColorFormatter) in (ColorFormatter, TaskFormatter):
            options["formatter"] = JsonFormatter
        return setup_handlers(logger, logfile, format, colorize, *args, **options)

    log.setup_handlers = with_json


@contextmanager
def early() -> Iterator[None]:
    """Warnings within, before logging is set up, are JSON lines on stderr."""
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(JsonFormatter())
    target = logging.getLogger("py.warnings")
    target.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        # Celery captures them again when it sets up logging.
        logging.captureWarnings(False)
        target.removeHandler(handler)


def has_effect() -> bool:
    """Whether a handler of the root logger writes JSON lines."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def _timestamp(created: float) -> str:
    moment = datetime.fromtimestamp(created, timezone.utc)
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:
        # Logging's own way is to print the error where the line should be.
        return f"{record.msg} {saferepr(record.args)}"


def _context(record: logging.LogRecord) -> dict[str, Any]:
    """What task it is about, and the trace."""
    fields: dict[str, Any] = {}
    traceparent = None
    task = get_current_task()
    request = task.request if task is not None else None
    headers = _about.get()
    if request is not None and request.id is not None:
        fields = _named(task.name, request.id, request.root_id, request.parent_id)
        traceparent = getattr(request, "traceparent", None) or (request.headers or {}).get("traceparent")
    elif headers is not None:
        fields = _named(headers.get("task"), headers.get("id"), headers.get("root_id"), headers.get("parent_id"))
        traceparent = headers.get("traceparent")
    else:
        data = getattr(record, "data", None)
        if isinstance(data, dict) and isinstance(data.get("id"), str) and isinstance(data.get("name"), str):
            # A line of Celery's about a task that is over.
            fields = {"task_name": data["name"], "task_id": data["id"]}
    ids = _span() or _traced(traceparent)
    if ids is not None:
        fields["trace_id"], fields["span_id"] = ids
    return fields


def _named(name: Any, task_id: Any, root_id: Any, parent_id: Any) -> dict[str, Any]:
    return {"task_name": name, "task_id": task_id, "root_id": root_id, "parent_id": parent_id}


def _span() -> tuple[str, str] | None:
    """The current span of OpenTelemetry, where that is in use."""
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    try:
        context = trace.get_current_span().get_span_context()
        return (f"{context.trace_id:032x}", f"{context.span_id:016x}") if context.is_valid else None
    except Exception:
        return None


def _traced(traceparent: Any) -> tuple[str, str] | None:
    """Trace and span of a `traceparent` of the W3C."""
    match = _TRACEPARENT.fullmatch(traceparent) if isinstance(traceparent, str) else None
    return (match[1], match[2]) if match else None


def _plain(value: Any) -> Any:
    if isinstance(value, (date, Decimal, PurePath, UUID)):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return list(value)
    return saferepr(value)
