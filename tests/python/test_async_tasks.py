"""`async def` tasks run on event loops, many at a time, and are otherwise tasks like all others."""

import itertools
import signal
import sys

import celery
import pytest
from celery import chain, chord, group
from celery.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from support.command import run
from support.control import answer, listens
from support.waiting import until

pytestmark = pytest.mark.timeout(180)


def coroutines(stage, *options, **more):
    return stage.worker(*options, app="coroutines", **more)


def ended(stage, *results):
    for result in results:
        until(result.ready, lambda result=result: f"{result.id} to end:\n{stage.logs()}", 60)


def began(stage, *results):
    for result in results:
        stage.wait_journal("began", id=result.id)


# ---- the same as ordinary functions are under the original


def test_outcomes_hooks_and_signals_are_those_of_ordinary_functions(alike):
    def outcomes(stage):
        coroutines(stage, env={"TWIN": "1"} if stage.kind == "celery" else {})
        found = {}
        for name, args in (
            ("add", (1, 2)),
            ("fail", ("text",)),
            ("again", (2,)),
            ("again", (3,)),
            ("auto", (2,)),
            ("auto", (3,)),
            ("ignore", ()),
            ("reject", ()),
            ("replaced", ()),
            ("counting", (0.01,)),
        ):
            result = stage.send(name, *args)
            many = 3 if name in ("again", "auto") else 2 if name == "replaced" else 1
            stage.wait_journal("signal", many, name="postrun", id=result.id)
            until(lambda result=result: result.state not in ("PENDING", "RETRY"), stage.logs)
            if name == "reject":
                # The parent process tells of it.
                stage.wait_journal("signal", name="failure", id=result.id)
            lines = stage.journal("signal", id=result.id) + stage.journal("hook", id=result.id)
            # A retry may begin before the run that asked for it has said that it is over.
            by_task = {}
            for line in sorted(lines, key=lambda line: line["time"]):
                fields = {key: line.get(key) for key in ("event", "name", "task", "state", "status", "retval", "exc")}
                by_task.setdefault(fields["task"], []).append(fields)
            seen = list(itertools.chain(*by_task.values()))
            several = name in ("again", "auto", "replaced")
            found[f"{name}{args}"] = {
                "state": result.state,
                "result": repr(result.result),
                "lines": sorted(seen, key=repr) if several else seen,
            }
        around = stage.journal("around")
        found["around"] = [(line["result"], line["took"] >= 0.01) for line in around]
        return found

    seen = alike(outcomes)
    assert seen["add(1, 2)"]["result"] == "3"
    assert seen["auto(3,)"]["state"] == seen["again(3,)"]["state"] == "FAILURE"
    assert seen["ignore()"]["state"] == "ODD"
    assert seen["around"] == [("'slept'", True)]


def test_chains_chords_callbacks_and_errbacks_follow(alike):
    def workflows(stage):
        coroutines(stage, concurrency=2, env={"TWIN": "1"} if stage.kind == "celery" else {})
        add, tsum, note = (stage.app.signature(name) for name in ("add", "tsum", "note"))
        steps = chain(add.clone((1, 2)), add.clone((3,)), add.clone((4,))).apply_async()
        counted = chord([add.clone((n, n)) for n in range(20)], tsum).apply_async()
        grouped = group(add.clone((n, 1)) for n in range(5)).apply_async()
        linked = stage.send("add", 5, 6, link=note)
        failed = stage.send("fail", "text", link_error=note)
        found = {
            "chain": steps.get(timeout=30),
            "chord": counted.get(timeout=30),
            "group": grouped.get(timeout=30),
            "link": linked.get(timeout=30),
        }
        ended(stage, failed)
        notes = [line["args"] for line in stage.wait_journal("note", 2)]
        return found | {"notes": sorted(map(len, notes)), "linked": [11] in notes}

    assert alike(workflows) == {
        "chain": 10, "chord": 380, "group": [1, 2, 3, 4, 5], "link": 11, "notes": [1, 3], "linked": True,
    }  # fmt: skip


def test_an_errback_runs_wherever_the_failure_is_stored(stage_on):
    stage = stage_on("celeriac")
    coroutines(stage)
    note = stage.app.signature("note")
    # On a loop, in an ordinary child, in the supervisor.
    for name, options in (("fail", {}), ("own_failure", {}), ("nap", {"time_limit": 0.1})):
        ended(stage, stage.send(name, 60, link_error=note, **options))
    pids = [line["pid"] for line in stage.wait_journal("note", 3)]
    assert len(set(pids)) == 3


# ---- many at a time


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize("rung", ["native", "python"])
def test_an_interleaved_task_is_itself_at_every_await_in_its_own_tasks_and_in_threads(stage_on, loop, rung):
    stage = stage_on("celeriac")
    env = {"CELERIAC_RESULTS": rung, "CELERIAC_CONTINUATIONS": rung}
    worker = coroutines(stage, concurrency=2, env=env | ({"NO_UVLOOP": "1"} if loop == "asyncio" else {}))
    results = [stage.send("who", number, 10) for number in range(200)]
    ended(stage, *results)
    assert {result.get() for result in results} == {loop}
    assert worker.stop() == 0
    assert "ERROR" not in worker.log


@pytest.mark.parametrize("broker", ["redis", "amqp"])
@pytest.mark.parametrize("name", ["nap_early", "nap_late"])
def test_as_many_run_at_a_time_as_the_loops_have_room_for(stage_on, broker, name):
    stage = stage_on("celeriac", broker=broker)
    coroutines(stage, "--async-concurrency=30", concurrency=2)
    listens(stage)
    results = [stage.send(name, 600) for _ in range(70)]
    stage.wait_journal("began", 60)
    active = answer(stage, "active")
    assert len(active) == 60
    assert {task["name"] for task in active} == {name}
    pids = answer(stage, "stats")["pool"]["processes"]
    running = {task["worker_pid"] for task in active}
    assert (len(pids), len(running)) == (4, 2)
    assert running < set(pids)
    assert {line["id"] for line in stage.journal("began")} < {result.id for result in results}


def test_neither_kind_waits_behind_the_other(stage_on):
    stage = stage_on("celeriac")
    coroutines(stage, "--async-concurrency=2", "--prefetch-multiplier=4", concurrency=1)
    # More of both than the worker may run or hold of one kind.
    busy = [stage.send("nap_late", 600) for _ in range(20)]
    stage.wait_journal("began", 2)
    assert stage.send("own_child").get(timeout=30)
    assert not any(result.ready() for result in busy)
    spinning = [stage.send("spin", 600) for _ in range(20)]
    [pid] = [line["worker_pid"] for line in until(lambda: of_name(stage, "spin"), stage.logs)]
    assert pid
    stage.app.control.revoke([busy[0].id], terminate=True)
    stage.app.control.revoke([result.id for result in busy[1:]], terminate=True)
    assert stage.send("pid").get(timeout=60) != pid
    assert not any(result.ready() for result in spinning)


def of_name(stage, name):
    return [task for task in answer(stage, "active") if task["name"] == name]


def test_an_early_task_is_acknowledged_when_it_begins_and_a_late_one_when_it_ends(stage_on):
    stage = stage_on("celeriac")
    coroutines(stage)
    early = stage.send("nap_early", 600)
    began(stage, early)
    stage.wait_empty()
    late = stage.send("nap_late", 600)
    began(stage, late)
    assert len(stage.unacked()) == 1
    stage.app.control.revoke(late.id, terminate=True)
    stage.wait_empty()


def test_a_loop_is_replaced_after_its_tasks_and_loses_none(stage_on):
    stage = stage_on("celeriac")
    worker = coroutines(stage, "--max-tasks-per-child=5", concurrency=2)
    results = [stage.send("pid") for _ in range(40)]
    ended(stage, *results)
    pids = [result.get() for result in results]
    assert {pids.count(pid) for pid in pids} == {5}
    assert worker.stop() == 0


def test_what_is_wrapped_around_a_coroutine_function_goes_around_its_run(stage_on):
    stage = stage_on("celeriac")
    # Celery knows of pydantic since 5.5.
    pydantic = celery.VERSION >= (5, 5)
    coroutines(stage, env={"PYDANTIC": "1"} if pydantic else {})
    assert stage.send("outer", 3).get(timeout=30) == ["around", [3, True]]
    if pydantic:
        assert stage.send("moved", {"x": 1}).get(timeout=30) == {"x": 2}


def test_the_other_door_takes_the_same_option(stage_on):
    stage = stage_on("celeriac")
    env = {"CELERIAC": "1"}
    stage.worker("--async-concurrency=2", app="coroutines", kind="celery", env=env)
    sent = [stage.send("nap_early", 600) for _ in range(5)]
    began(stage, *sent[:2])
    listens(stage)
    assert len(answer(stage, "active")) == 2


# ---- limits and interrupts


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_the_soft_limit_is_raised_at_the_await_and_leaves_nothing_running(stage_on, loop):
    stage = stage_on("celeriac")
    coroutines(stage, env={"NO_UVLOOP": "1"} if loop == "asyncio" else {})
    ways = ["sleep", "gather", "timeout", *(["group"] if sys.version_info >= (3, 11) else [])]
    for way in ways:
        assert stage.send("soft", way).get(timeout=30) == "tidied"
    seen = [(line["how"], line["error"], line["left"]) for line in stage.journal("soft")]
    assert seen == [(way, "SoftTimeLimitExceeded()", 1) for way in ways]
    through = stage.send("soft_through")
    with pytest.raises(SoftTimeLimitExceeded):
        through.get(timeout=30)


def test_the_hard_limit_fails_its_task_and_lets_the_neighbours_go_on(stage_on):
    stage = stage_on("celeriac")
    coroutines(stage)
    pid = stage.send("pid").get(timeout=30)
    neighbour = stage.send("nap_early", 2)
    began(stage, neighbour)
    hard = stage.send("hard")
    with pytest.raises(TimeLimitExceeded):
        hard.get(timeout=30)
    # Its `finally` has run, and the one failure was told once, by the parent.
    stage.wait_journal("left", id=hard.id)
    assert len(stage.wait_journal("signal", name="failure", id=hard.id)) == 1
    assert neighbour.get(timeout=30) == 2
    assert stage.send("pid").get(timeout=30) == pid


def test_a_task_that_refuses_to_end_takes_its_process_along_and_each_neighbour_is_accounted_for(stage_on):
    stage = stage_on("celeriac")
    worker = coroutines(stage)
    pid = stage.send("pid").get(timeout=30)
    neighbours = [stage.send("nap_early", 600) for _ in range(3)]
    began(stage, *neighbours)
    stubborn = stage.send("stubborn", time_limit=1)
    with pytest.raises(TimeLimitExceeded):
        stubborn.get(timeout=60)
    ended(stage, *neighbours)
    for neighbour in neighbours:
        with pytest.raises(WorkerLostError):
            neighbour.get()
    assert "did not end when they were cancelled" in worker.log
    assert stage.send("pid").get(timeout=30) != pid


def test_revoke_with_terminate_cancels_that_task_alone(stage_on):
    stage = stage_on("celeriac")
    coroutines(stage)
    listens(stage)
    first, second = stage.send("nap_early", 600), stage.send("nap_early", 600)
    began(stage, first, second)
    stage.app.control.revoke(first.id, terminate=True, signal="SIGKILL")
    [left] = stage.wait_journal("left", id=first.id)
    assert "CancelledError" in left["error"]
    until(lambda: first.state == "REVOKED", stage.logs)
    assert [task["id"] for task in answer(stage, "active")] == [second.id]


def test_a_dead_child_costs_all_that_ran_on_it_and_each_is_accounted_for(stage_on):
    stage = stage_on("celeriac")
    coroutines(stage)
    running = [stage.send("nap_early", 600) for _ in range(5)]
    began(stage, *running)
    running.append(stage.send("dies"))
    ended(stage, *running)
    for result in running:
        with pytest.raises(WorkerLostError, match="exitcode 7"):
            result.get()
    assert stage.send("add", 1, 1).get(timeout=30) == 2


def test_what_a_coroutine_raises_to_end_more_than_itself_is_its_own_failure(stage_on):
    stage = stage_on("celeriac")
    coroutines(stage)
    pid = stage.send("pid").get(timeout=30)
    exits, cancelled = stage.send("exits"), stage.send("cancels_itself")
    ended(stage, exits, cancelled)
    assert exits.state == cancelled.state == "FAILURE"
    assert isinstance(cancelled.result, Exception)
    assert stage.send("pid").get(timeout=30) == pid


# ---- stopping


def test_a_warm_stop_waits_for_coroutines_and_the_loop_can_be_used_at_the_end(stage_on):
    stage = stage_on("celeriac")
    worker = coroutines(stage)
    results = [stage.send("nap_early", 2) for _ in range(10)]
    began(stage, *results)
    assert worker.stop() == 0
    assert [result.get(timeout=5) for result in results] == [2] * 10
    assert stage.journal("closed")


def test_a_cold_stop_cancels_coroutines_and_gives_late_ones_back(stage_on):
    stage = stage_on("celeriac")
    worker = coroutines(stage)
    results = [stage.send("nap_late", 600) for _ in range(10)]
    began(stage, *results)
    worker.stop(signal.SIGQUIT)
    assert stage.depth() == 10
    assert not stage.unacked()


# ---- what is shown and what is refused


def test_doctor_shows_which_tasks_run_on_loops(tmp_path):
    (tmp_path / "loops.py").write_text(
        "from celery import Celery\napp = Celery('loops', broker='redis://h')\n"
        "@app.task(name='one', autoretry_for=(KeyError,))\nasync def one(): pass\n"
        "@app.task(name='two')\ndef two(): pass\n"
    )
    done = run("celeriac", "-A", "loops", "doctor", "-c", "3", "--async-concurrency", "7", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one task is `async def`: 3 loops of uvloop, 7 tasks at a time on each" in done.stdout
    assert done.stdout.count("async def: it runs on an event loop") == 1
    door = run("celeriac", "-A", "loops", "doctor", cwd=tmp_path, CELERIAC_ASYNC_CONCURRENCY="9")
    assert "9 tasks at a time on each" in door.stdout


@pytest.mark.parametrize(
    ("lines", "options", "env", "reason"),
    [
        ("", ["-P", "threads"], {}, "runs on an event loop beside the pool prefork only"),
        ("", ["-P", "solo"], {}, "runs on an event loop beside the pool prefork only"),
        ("import sys\nsys.modules['greenlet'] = None", [], {}, "pip install 'celeriac[async]'"),
        ("", ["--async-concurrency=0"], {}, "it is a number from 1 to 10000"),
        ("", [], {"CELERIAC_ASYNC_CONCURRENCY": "20000"}, "it is a number from 1 to 10000"),
        ("", [], {"USE_FAST_LOCALS": "1"}, "unset it"),
        ("one.Request = 'mine:Request'", [], {}, "sets Request, which cannot be had together"),
    ],
)
def test_what_cannot_run_is_refused_with_what_to_do(tmp_path, lines, options, env, reason):
    (tmp_path / "mine.py").write_text(
        "from celery.worker import request\nclass Request(request.Request): pass\n"
    )  # fmt: skip
    (tmp_path / "loops.py").write_text(
        "from celery import Celery\napp = Celery('loops', broker='redis://h')\n"
        f"@app.task(name='one')\nasync def one(): pass\n{lines}\n"
    )
    for program, more in (("celeriac", {}), ("celery", {"CELERIAC": "1"})):
        done = run(program, "-A", "loops", "worker", *options, cwd=tmp_path, **env, **more)
        assert done.returncode == 2, done.stdout + done.stderr
        assert reason in done.stderr, done.stderr
