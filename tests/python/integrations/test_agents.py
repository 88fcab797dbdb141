"""Agents that watch a worker are started as their documentation says and report the same as under Celery."""

import json

import msgpack
import pytest
from support.sink import Sink
from support.waiting import until
from support.worker import BIN


@pytest.fixture
def sink():
    with Sink() as sink:
        yield sink


def work(stage):
    """One task that returns, one that fails, one that calls another; their ids."""
    added = stage.send("add", 1, 2)
    failed = stage.send("fail")
    parent = stage.send("parent_of")
    for result in (added, failed, parent):
        until(result.ready, stage.logs)
    child = parent.get(timeout=30)
    until(stage.app.AsyncResult(child).ready, stage.logs)
    return {"added": added.id, "failed": failed.id, "parent": parent.id, "child": child}


# ---- ddtrace


def spans(sink):
    """Every span that was sent, whatever the order."""
    found = []
    for body in sink.bodies("/v0.4/traces", "/v0.5/traces"):
        for trace in msgpack.unpackb(body, raw=False, strict_map_key=False):
            found += trace
    return found


def test_ddtrace_run_reports_each_task_under_its_sender(alike):
    def traced(stage):
        with Sink() as sink:
            stage.worker(
                app="ddtrace_app",
                before=[str(BIN / "ddtrace-run")],
                env={
                    "DD_TRACE_AGENT_URL": sink.url,
                    "DD_TRACE_API_VERSION": "v0.4",
                    "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
                    "DD_REMOTE_CONFIGURATION_ENABLED": "false",
                    "DD_CRASHTRACKING_ENABLED": "false",
                },
            )
            ids = work(stage)

            def runs():
                found = {span["meta"]["celery.id"]: span for span in spans(sink) if span["name"] == "celery.run"}
                return found if found.keys() >= set(ids.values()) else None

            found = until(runs, lambda: f"a span for each of {ids}: {spans(sink)}\n{stage.logs()}")
            (sent,) = [span for span in spans(sink) if span["name"] == "celery.apply"]
        child, parent = found[ids["child"]], found[ids["parent"]]
        return {
            "runs": {
                name: {
                    "resource": found[task]["resource"],
                    "error": found[task].get("error", 0),
                    "type": found[task]["meta"].get("error.type"),
                    "state": found[task]["meta"].get("celery.state"),
                    "kind": found[task]["meta"].get("span.kind"),
                    "tags": sorted(tag for tag in found[task]["meta"] if tag.startswith(("celery.", "out."))),
                }
                for name, task in ids.items()
            },
            "sent by the parent": sent["parent_id"] == parent["span_id"],
            "one trace": child["trace_id"] == parent["trace_id"],
        }

    seen = alike(traced)
    assert {name: run["resource"] for name, run in seen["runs"].items()} == {
        "added": "add",
        "failed": "fail",
        "parent": "parent_of",
        "child": "add",
    }
    assert {run["error"] for name, run in seen["runs"].items() if name != "failed"} == {0}
    assert seen["runs"]["failed"]["error"] == 1
    assert "ValueError" in seen["runs"]["failed"]["type"]
    assert seen["sent by the parent"]


# ---- New Relic


def test_newrelic_admin_records_each_task_as_a_background_transaction(alike):
    def watched(stage):
        stage.worker(
            app="newrelic_app",
            before=[str(BIN / "newrelic-admin"), "run-program"],
            env={
                "NEW_RELIC_DEVELOPER_MODE": "true",
                "NEW_RELIC_LICENSE_KEY": "0" * 40,
                "NEW_RELIC_APP_NAME": "watched",
                "NEW_RELIC_LOG": str(stage.folder / "newrelic.log"),
                # The first task must not run before the agent of its child is up.
                "NEW_RELIC_STARTUP_TIMEOUT": "30",
            },
        )
        work(stage)
        stage.wait_journal("transaction", count=4)
        lines = stage.journal("transaction")
        parents = {line["trace"] for line in lines if line["name"].endswith("parent_of")}
        return {
            "transactions": sorted((line["name"], line["errors"]) for line in lines),
            "traces": len({line["trace"] for line in lines}),
            "the child is in its sender's": any(
                line["trace"] in parents for line in lines if line["name"].endswith("/add")
            ),
            "in children": {line["pid"] != stage.workers[0].pid for line in lines},
        }

    seen = alike(watched)
    assert [name for name, _ in seen["transactions"]] == [
        "OtherTransaction/Celery/add",
        "OtherTransaction/Celery/add",
        "OtherTransaction/Celery/fail",
        "OtherTransaction/Celery/parent_of",
    ]
    assert [errors for _, errors in seen["transactions"]] == [[], [], ["builtins:ValueError"], []]
    assert seen["in children"] == {True}


# ---- Elastic APM


def test_elastic_apm_sends_transactions_and_errors(alike):
    def watched(stage):
        with Sink() as sink:
            stage.worker(app="elastic_app", env={"SINK": sink.url})
            work(stage)

            def events(kind):
                return [
                    event[kind]
                    for body in sink.bodies("/intake/v2/events")
                    for event in map(json.loads, body.splitlines())
                    if kind in event
                ]

            until(
                lambda: len(events("transaction")) >= 4 and events("error"),
                lambda: f"four transactions and an error: {sink.requests}\n{stage.logs()}",
            )
            transactions, errors = events("transaction"), events("error")
        by_id = {one["id"]: one for one in transactions}
        (error,) = errors
        return {
            "transactions": sorted((one["name"], one["type"], one["result"], one["outcome"]) for one in transactions),
            "traces": len({one["trace_id"] for one in transactions}),
            "error": [error["exception"]["type"], by_id[error["transaction_id"]]["name"]],
        }

    seen = alike(watched)
    assert [result for _, _, result, _ in seen["transactions"]] == ["SUCCESS", "SUCCESS", "FAILURE", "SUCCESS"]
    assert seen["traces"] == 3, "a task and what it called share a trace"
    assert seen["error"][0] == "ValueError"
