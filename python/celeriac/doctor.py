"""`celeriac -A proj doctor`: which rung of the ladder each concern and each task is on, and why.

It makes the worker as `celeriac worker` would, with the same options, and starts nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import click
from celery import Celery

from celeriac import config, ladder
from celeriac.worker import Worker

#: Exit status where `celeriac worker` would refuse.
EX_REFUSED = 2


class Patient(Worker):
    """A worker that notes what it would refuse, and is never started."""

    refused: list[str]

    def on_before_init(self, **kwargs: Any) -> None:
        """Collects from the first check on."""
        self.refused = []
        super().on_before_init(**kwargs)

    def setup_defaults(self, **kwargs: Any) -> None:
        """A running worker may have the state file open."""
        super().setup_defaults(**kwargs)
        self.statedb = None

    def refuse(self, reasons: list[str]) -> None:
        """Notes the reasons and goes on."""
        self.refused += reasons


def main(app: Celery, context: click.Context, *, as_json: bool) -> int:
    """Prints the report; the exit status says whether a worker would start."""
    if context.args:
        app.config_from_cmdline(context.args, namespace="worker")
    report = examine(app, context.params)
    print(json.dumps(report, indent=2) if as_json else "\n".join(table(report)))
    sys.stdout.flush()
    return EX_REFUSED if report["refused"] else 0


def examine(app: Celery, options: Mapping[str, Any]) -> dict[str, Any]:
    """The report as data."""
    keep = {
        name: value
        for name, value in options.items()
        if name not in {"detach", "log_format", "loglevel", "logfile", "pidfile", "purge"}
    }
    worker = app.subclass_with_self(Patient, name="Worker")(loglevel="ERROR", quiet=True, **keep)
    worker.refuse(ladder.refused_queues(worker))
    refused = worker.refused
    if not refused:
        try:
            config.build(worker)
        except ladder.Refused as reason:
            refused = reason.reasons
    return {
        "app": app.main or "__main__",
        "node": worker.hostname,
        "refused": refused,
        "without_effect": ladder.settings_without_effect(worker),
        "concerns": [asdict(decision) for decision in ladder.concerns(worker)],
        "tasks": [asdict(decision) for decision in ladder.tasks(worker)],
    }


def table(report: Mapping[str, Any]) -> Iterable[str]:
    """The report as lines of text."""
    yield f"app {report['app']}, node {report['node']}"
    for reason in report["refused"]:
        yield f"refused: {reason}"
    for setting in report["without_effect"]:
        yield f"no effect yet: {setting}"
    for title in ("concerns", "tasks"):
        decisions = report[title]
        if not decisions:
            continue
        width = max(len(decision["name"]) for decision in decisions)
        yield ""
        yield title
        for decision in decisions:
            reasons = decision["reasons"] or [""]
            yield f"  {decision['name']:<{width}}  {decision['rung']:<6}  {reasons[0]}".rstrip()
            for reason in reasons[1:]:
                yield f"  {'':<{width}}  {'':<6}  {reason}"
