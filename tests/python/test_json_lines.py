"""`--log-format json`: one JSON object a line, and what each is about."""

import json
import re

import pytest
from support.command import complaint, run
from support.waiting import until

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACED = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "vendor=1"}


def records(worker):
    """Every line of the log; each has to be JSON."""
    found = []
    for line in worker.log.splitlines():
        record = json.loads(line)
        assert {"timestamp", "level", "logger", "message", "process", "pid"} <= record.keys()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", record["timestamp"])
        found.append(record)
    return found


def wait_record(worker, text, **fields):
    """The first record whose message has the text, and these fields."""

    def there():
        complete = worker.log.rpartition("\n")[0]
        for line in complete.splitlines():
            record = json.loads(line)
            if text in record["message"] and all(record.get(name) == value for name, value in fields.items()):
                return record
        return None

    return until(there, lambda: f"{text!r} {fields} in the log:\n{worker.describe()}")


def start(stage, *options, app="traced", **more):
    worker = stage.worker("--log-format", "json", *options, app=app, ready=False, **more)
    wait_record(worker, " ready.")
    return worker


@pytest.fixture
def stage(stage_on):
    with stage_on("celeriac") as stage:
        yield stage


def about(record):
    return {name: record.get(name) for name in ("task_name", "task_id", "root_id", "parent_id", "trace_id", "span_id")}


@pytest.mark.parametrize("broker", ["redis", "amqp"])
def test_every_line_about_a_task_says_which_and_in_which_trace(broker, stage_on):
    with stage_on("celeriac", broker) as stage:
        worker = start(stage)
        result = stage.send("speak", headers=TRACED, root_id="root", parent_id="parent")
        assert result.get(timeout=30) == TRACED, "headers are carried through untouched"
        expected = {
            "task_name": "speak", "task_id": result.id, "root_id": "root", "parent_id": "parent",
            "trace_id": TRACE, "span_id": SPAN,
        }  # fmt: skip
        seen = {}
        for text in ("received", "through the task logger", "through any logger", "printed", "warned", "succeeded in"):
            seen[text] = wait_record(worker, text)
            assert about(seen[text]) == expected, seen[text]
        assert (seen["received"]["process"], seen["received"]["pid"]) == ("MainProcess", worker.pid)
        assert seen["received"]["data"]["name"] == "speak"
        assert seen["through the task logger"]["message"] == "through the task logger: å\n"
        assert seen["through the task logger"]["logger"] == "traced.tasks"
        assert seen["through the task logger"]["process"] == "ForkPoolWorker-1"
        assert seen["through any logger"]["pid"] != worker.pid
        assert seen["through any logger"]["level"] == "WARNING"
        assert "nan" in seen["through any logger"]["extra"], "what JSON cannot say is shown"
        assert seen["printed"]["logger"] == "celery.redirected"
        assert seen["succeeded in"]["data"]["id"] == result.id
        assert worker.stop() == 0
        records(worker)
        assert "Warm shutdown" in worker.log


def test_a_failure_has_its_exception_and_traceback(stage):
    worker = start(stage)
    result = stage.send("fail")
    record = wait_record(worker, "raised unexpected")
    assert (record["level"], record["task_id"], record["task_name"]) == ("ERROR", result.id, "fail")
    assert record["exception"]["type"] == "LookupError"
    assert record["exception"]["message"] == "not\nthere"
    assert record["exception"]["traceback"].startswith("Traceback (most recent call last):\n")
    assert 'raise LookupError("not\\nthere")' in record["exception"]["traceback"]


def test_a_task_sent_by_a_task_is_told_apart_from_it(stage):
    worker = start(stage)
    outer = stage.send("outer", headers=TRACED)
    inner = outer.get(timeout=30)
    record = wait_record(worker, "through any logger", task_id=inner)
    assert about(record) == {
        "task_name": "speak", "task_id": inner, "root_id": outer.id, "parent_id": outer.id,
        # What a task sends is in its trace where OpenTelemetry is there to say so.
        "trace_id": None, "span_id": None,
    }  # fmt: skip
    assert wait_record(worker, "outer", logger="traced.plain")["task_id"] == outer.id


def test_lines_of_the_parent_about_a_task_say_which(stage):
    worker = start(stage, env={"RECEIVER": "1"})
    for name, options, texts in [
        ("late", {}, ["a receiver", "received", "Soft time limit"]),
        ("dies", {}, ["Task handler raised error"]),
        ("speak", {"expires": -1}, ["Discarding revoked task"]),
    ]:
        result = stage.send(name, headers=TRACED, **options)
        for text in texts:
            record = wait_record(worker, text, task_id=result.id)
            assert (record["task_name"], record["trace_id"], record["process"]) == (name, TRACE, "MainProcess")
    assert "task_id" not in wait_record(worker, " ready.")


def test_the_span_of_opentelemetry_is_the_one_of_a_line(stage):
    worker = start(stage, app="otel_app")
    result = stage.send("add", 1, 2, headers={"traceparent": TRACED["traceparent"]})
    record = wait_record(worker, "succeeded in", task_id=result.id)
    # The span of the task itself, in the trace of the message.
    assert record["trace_id"] == TRACE
    assert record["span_id"] != SPAN
    assert wait_record(worker, "received", task_id=result.id)["span_id"] == SPAN


@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_other_pools_write_the_same_lines(pool, stage):
    worker = start(stage, "-P", pool)
    result = stage.send("speak", headers=TRACED)
    for text in ("received", "through any logger", "succeeded in"):
        assert wait_record(worker, text)["task_id"] == result.id
    worker.stop()
    records(worker)


def test_a_log_file_has_json_lines_too_and_one_of_each_process(stage):
    worker = stage.worker(
        "--log-format", "json", "--logfile", str(stage.folder / "w%I.log"), "--without-heartbeat",
        app="traced", ready=False,
    )  # fmt: skip
    result = stage.send("speak")
    result.get(timeout=30)
    main, child = stage.folder / "w.log", stage.folder / "w-1.log"
    until(lambda: child.exists() and "succeeded in" in child.read_text(), worker.describe)
    until(lambda: "received" in main.read_text(), worker.describe)
    for path in (main, child):
        assert all("timestamp" in json.loads(line) for line in path.read_text().splitlines())


def test_the_app_s_own_logging_is_left_alone(stage):
    worker = stage.worker("--log-format", "json", app="traced", env={"OWN_LOGGING": "all"}, ready=False)
    worker.wait_log("OWN w0@here ready.")
    assert "OWN --log-format json has no effect" in worker.log
    stage.send("speak")
    worker.wait_log("OWN through any logger")


def test_a_handler_that_the_app_adds_keeps_its_formatter_beside_the_json_lines(stage):
    own = stage.folder / "own.log"
    worker = start(stage, env={"OWN_LOGGING": "more", "OWN_LOG": str(own)})
    result = stage.send("speak")
    assert wait_record(worker, "received")["task_id"] == result.id
    until(lambda: "OWN through any logger" in own.read_text(), worker.describe)
    assert f"OWN Task speak[{result.id}] received" in own.read_text()


def test_a_root_logger_that_is_not_hijacked_keeps_its_handlers(stage):
    worker = stage.worker(
        "--log-format", "json", app="traced", conf={"worker_hijack_root_logger": False}, ready=False
    )  # fmt: skip
    # It has none of its own, so that Celery gives it one.
    wait_record(worker, " ready.")


def test_the_second_door_takes_the_variable(stage):
    worker = stage.worker(
        app="traced", kind="celery", env={"CELERIAC": "1", "CELERIAC_LOG_FORMAT": "json"}, ready=False
    )
    wait_record(worker, " ready.")
    worker.stop()
    records(worker)


def test_another_format_is_refused():
    done = run("celeriac", "-A", "show", "worker", "--log-format", "xml")
    assert done.returncode == 2
    assert complaint(done) == "Error: Invalid value for '--log-format': 'xml' is not one of 'text', 'json'."
