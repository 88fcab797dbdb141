"""Whether Rust may write the line of a received task: only where logging is as Celery sets it up."""

from __future__ import annotations

import logging
import sys
from logging.handlers import WatchedFileHandler
from typing import Any

from celery.utils.log import ColorFormatter

from celeriac.json_lines import JsonFormatter

__all__ = ["config"]

#: The logger of that line.
LOGGER = "celery.worker.strategy"


def config() -> dict[str, Any] | None:
    """`LineConfig` of `src/logging.rs`; `None`: the line is a record of Python's logging, for handlers to see."""
    handler = _only_handler()
    if handler is None or handler.filters or handler.level > logging.INFO:
        return None
    formatter = handler.formatter
    as_json = type(formatter) is JsonFormatter
    if not as_json:
        if type(formatter) is not ColorFormatter or formatter.datefmt is not None:
            return None
        if formatter.converter is not logging.Formatter.converter:
            return None
    form = {"format": formatter._fmt or "", "json": as_json}
    if type(handler) is WatchedFileHandler:
        return {**form, "path": handler.baseFilename}
    if type(handler) is logging.StreamHandler and handler.stream is sys.__stderr__:
        return {**form, "path": None}
    return None


def _only_handler() -> Any:
    """The one handler that sees the record, if nothing else could."""
    stock = logging.Logger.callHandlers.__module__ == "logging" and logging.Logger.handle.__module__ == "logging"
    if not stock or logging.getLogRecordFactory() is not logging.LogRecord:
        return None
    logger: logging.Logger | None = logging.getLogger(LOGGER)
    found: list[Any] = []
    while logger is not None:
        if logger.filters:
            return None
        found += [handler for handler in logger.handlers if not isinstance(handler, logging.NullHandler)]
        logger = logger.parent if logger.propagate else None
    return found[0] if len(found) == 1 else None
