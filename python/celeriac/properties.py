"""A message's properties as user code sees them."""

from __future__ import annotations

from typing import Any


def repeat_headers(properties: dict[str, Any], headers: dict[str, Any]) -> None:
    """Puts the headers among the properties, where py-amqp has them and tasks look for their own:
    `self.request.properties["application_headers"]`. Rust does not send them twice.

    `content_type` is among the properties of AMQP alone; a virtual transport has it beside them.
    """
    if "content_type" in properties and headers:
        properties.setdefault("application_headers", dict(headers))
