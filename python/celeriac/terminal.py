"""What is written past logging."""

from __future__ import annotations

from typing import Any


def say(message: Any, stream: Any) -> None:
    """Write to the terminal, past logging and whatever stdout was replaced by."""
    if stream is not None:
        try:
            stream.write(f"\n{message}\n")
            stream.flush()
        except OSError:
            pass
