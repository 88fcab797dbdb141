"""Plain tasks, which Celery's tracer need not run: results, requests, tracebacks, with it and without."""

import pytest
from support.lines import lines_of_task, plain
from support.raw import body, headers, put
from support.waiting import until

SWITCH = "CELERIAC_EXECUTION"
EXECUTIONS = ["native", "python"]


def comparable(stage, value):
    if isinstance(value, str) and "EncodeError" in value:
        # From the depths of the backend.
        value = value.splitlines()[-1:]
    return plain(repr(value)).replace(stage.queue, "<queue>")


def observe(execution, *options, **settings):
    def scenario(stage):
        worker = stage.worker(*options, app="plainly", env={SWITCH: execution})
        sent = {
            "nothing": stage.send("nothing"),
            "text": stage.send("echo", "x" * 5000),
            "odd text": stage.send("echo", 'a "quoted" \u1234 \\u0041 text'),
            "numbers": stage.send("echo", [1, 2.5, True, None, 1 << 80]),
            "keywords": stage.send("echo", 1, kwargs={"a": 1, "b": [2]}),
            "wrong arguments": stage.send("nothing", 1, 2),
            "no mapping": stage.send("echo", kwargs={}),
            "look": stage.send("look"),
            "look from outside": stage.send("look_from_outside"),
            "look with headers": stage.send("look", headers={"x-own": "1"}, priority=3, time_limit=90),
            "dropped": stage.send("look", ignore_result=True),
            "kept": stage.send("echo", 2, ignore_result=False),
            "fail": stage.send("note", "fail"),
            "retry": stage.send("note", "retry"),
            "unencodable": stage.send("note", "unencodable"),
            "calls itself": stage.send("calls_itself", 2),
            "spawns": stage.send("spawns"),
            "caused": stage.send("raises", "caused"),
            "in a group": stage.send("echo", 3, group_id="g", group_index=1),
            "with a parent": stage.send("echo", 4, parent_id="p", root_id="r"),
            "after all": stage.send("reads"),
        }  # fmt: skip
        stage.wait_empty()
        worker.wait_log(f"Task reads[{sent['after all'].id}] succeeded")
        # It was sent anew, behind all others.
        until(sent["retry"].ready, stage.logs)
        found = {}
        for name, result in sent.items():
            document = dict(result._get_task_meta())
            document.pop("date_done", None)
            found[name] = {key: comparable(stage, value) for key, value in sorted(document.items())}
        for event in ("on_failure", "on_retry", "task_failure"):
            found[event] = sorted(
                [comparable(stage, value) for key, value in line.items() if key not in ("pid", "time")]
                for line in stage.journal(event)
            )
        return found

    return scenario


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(("broker", "backend"), [("redis", "redis"), ("amqp", "redis"), ("filesystem", "file")])
def test_plain_tasks_see_and_leave_what_they_see_and_leave_under_celery(alike, broker, backend, execution):
    seen = alike(observe(execution), broker, backend)
    assert "'type': True" in seen["look"]["result"]
    assert seen["dropped"]["status"] == "'PENDING'"
    assert len(seen["on_failure"]) == 2


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_other_pools_do_the_same(alike, pool, execution):
    alike(observe(execution, f"--pool={pool}"))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_extended_results_have_everything(alike, execution):
    seen = alike(observe(execution), result_extended=True)
    assert "name" in seen["nothing"]


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_line_of_a_success_says_what_the_app_wants_it_to(alike, execution):
    def scenario(stage):
        worker = stage.worker(app="plainly", env={SWITCH: execution, "SHOW_ARGUMENTS": "1"})
        results = [
            stage.send("echo", 1, kwargs={"a": 2}),
            stage.send("echo", "x" * 2000),
            stage.send("nothing", shadow="another name"),
            stage.send("echo", 3, argsrepr="<secret>"),
            stage.send("look"),
        ]
        for result in results:
            result.get(timeout=30)
        worker.wait_log("succeeded in", count=len(results))
        said = [line for result in results[:-1] for line in lines_of_task(worker.log, result.id)]
        return sorted(line for line in said if "succeeded" in line[2])

    assert "of <secret> and" in str(alike(scenario))


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_what_json_says_beside_arguments_is_as_before(alike, execution):
    """Bodies that are nearly plain."""

    def scenario(stage):
        stage.worker(app="plainly", env={SWITCH: execution})
        bodies = {
            "plain": body([1]),
            "spaces": b" [ [1] , {} , {} ] ",
            "no options": b"[[1], {}, null]",
            "a date": b'[[{"__type__": "datetime", "__value__": "2026-01-02T03:04:05"}], {}, {}]',
            "escaped": b'[["\\u20ac"], {}, {}]',
            "not a number": b"[[NaN], {}, {}]",
        }
        heads = {name: headers("echo") for name in bodies}
        for name, text in bodies.items():
            put(stage, heads[name], text)
        # What cannot be read hinders nothing.
        put(stage, headers("echo"), b"[[1], {}, {}] behind")
        results = {name: stage.app.AsyncResult(head["id"]) for name, head in heads.items()}
        return {name: comparable(stage, result.get(timeout=30)) for name, result in results.items()}

    assert "datetime(2026" in alike(scenario)["a date"]
