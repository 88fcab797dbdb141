"""Pools of greenlets: `-P gevent` and `-P eventlet`."""

import os
import signal
import threading
from urllib.parse import urlsplit

import psutil
import pytest
from celery import chain, chord, group
from celery.exceptions import TimeLimitExceeded, WorkerLostError
from support.command import complaint, python, run
from support.control import answer, start
from support.lines import by_process, lines_of_task
from support.outcomes import comparable
from support.waiting import until

POOLS = ["gevent", "eventlet"]
on_each = pytest.mark.parametrize("pool", POOLS)


def serve(stage, pool, concurrency=20, **more):
    return stage.worker("-P", pool, app="greens", concurrency=concurrency, **more)


def results(stage, sent, timeout=90):
    return [result.get(timeout=timeout, propagate=False) for result in sent]


def begun(stage, *sent):
    for result in sent:
        stage.wait_journal("begins", id=result.id)


# ---- many at a time


@on_each
@pytest.mark.parametrize(("broker", "backend"), [("redis", "redis"), ("amqp", "rpc://")])
def test_five_hundred_tasks_run_at_a_time(alike, pool, broker, backend):
    def meeting(stage):
        serve(stage, pool, concurrency=500)
        return results(stage, [stage.send("meet", 500) for _ in range(500)])

    assert alike(meeting, broker, backend) == [500] * 500


@on_each
def test_a_task_has_its_own_locals_and_request_while_others_run(alike, pool):
    def own(stage):
        serve(stage, pool, concurrency=50)
        sent = [stage.send("own") for _ in range(100)]
        return [value == [True, *[result.id] * 4] for value, result in zip(results(stage, sent), sent, strict=True)]

    assert all(alike(own))


@on_each
def test_the_app_is_imported_into_a_patched_process_and_the_supervisor_stays_as_it_is(stage_on, pool):
    stage = stage_on("celeriac")
    worker = serve(stage, pool)
    seen = stage.send("where").get(timeout=30)
    assert seen == {"pid": seen["pid"], "import": True, "now": True, "initialized": 1}
    assert seen["pid"] in worker.children_running_tasks()
    assert worker.stop() == 0
    assert {line["patched"]: line["pid"] for line in stage.journal("worker_shutdown")} == {
        True: seen["pid"], False: worker.pid,
    }  # fmt: skip
    assert not stage.journal("worker_process_init")


# ---- results


def connections(stage, worker):
    """How many the processes of the worker have to the server that holds the results."""
    port = urlsplit(stage.conf["broker_url"]).port
    return sum(
        link.raddr.port == port
        for process in worker.processes()
        for link in process.net_connections("tcp")
        if link.status == psutil.CONN_ESTABLISHED
    )


@on_each
@pytest.mark.parametrize("task", ["add", "progress", "sends"])
@pytest.mark.parametrize(("broker", "backend"), [("redis", "redis"), ("amqp", "rpc://")])
def test_results_take_a_few_connections_however_many_tasks_there_are(stage_on, broker, backend, pool, task):
    stage = stage_on("celeriac", broker, backend)
    worker = serve(stage, pool, concurrency=100)
    arguments = {"add": (1, 1), "progress": (3,), "sends": (1,)}[task]
    most, over = [], threading.Event()

    def watch():
        while not over.wait(0.1):
            most.append(connections(stage, worker))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(4):
            # Those that wait for others must leave room for them.
            sent = [stage.send(task, *arguments) for _ in range(80)]
            assert set(results(stage, sent)) == {{"add": 2, "progress": 3, "sends": 2}[task]}
    finally:
        over.set()
        watcher.join()
    most.append(connections(stage, worker))
    # The supervisor's own; and, where tasks send others, those of the app's pool of producers and of redis-py's, which
    # has as many as commands are under way at a time.
    assert max(most) <= (110 if task == "sends" else 10), most


@on_each
@pytest.mark.parametrize(("broker", "backend"), [("redis", "redis"), ("amqp", "redis"), ("redis", "sqlite")])
def test_failures_retries_and_workflows_end_as_with_the_original(alike, pool, broker, backend):
    def play(stage):
        worker = serve(stage, pool)
        numbers = group(stage.s("add", number, number) for number in range(20))
        # On their own: a second try that overtakes the first, which yields as it sends it, is stored first.
        retried = {"retry": stage.send("retry_once"), "vain": stage.send("retry_in_vain")}
        for result in retried.values():
            until(result.ready, stage.logs, timeout=60)
        sent = retried | {
            "fail": stage.send("fail"),
            "chain": chain(stage.s("add", 1, 1), stage.s("add", 1), stage.s("add", 1), app=stage.app).delay(),
            "chord": chord(numbers, stage.s("total"), app=stage.app).delay(),
            "broken": chord(group(stage.s("add", 1, 1), stage.s("fail")), stage.s("total"), app=stage.app).delay(),
        }
        for result in sent.values():
            until(result.ready, stage.logs, timeout=60)
        found = {
            name: comparable(stage.app.backend.get_task_meta(result.id, cache=False)) for name, result in sent.items()
        }
        # They name ids.
        found["broken"] = found["broken"]["type"]
        found["lines"] = by_process(lines_of_task(worker.log, f"[{sent['fail'].id}]"))
        return found, worker.stop()

    seen, status = alike(play, broker, backend)
    assert status == 0
    assert seen["chord"]["result"] == str(sum(2 * number for number in range(20)))
    assert seen["retry"]["status"] == "SUCCESS"
    assert seen["fail"]["type"] == "ValueError"


@on_each
def test_results_larger_than_the_socket_holds_arrive(stage_on, pool):
    stage = stage_on("celeriac")
    serve(stage, pool, concurrency=20)
    sent = [stage.send("large", 2_000_000) for _ in range(20)]
    assert [len(value) for value in results(stage, sent)] == [2_000_000] * 20


@on_each
def test_a_real_thread_of_a_task_may_store_a_state_while_others_run(stage_on, pool):
    stage = stage_on("celeriac")
    serve(stage, pool, concurrency=10)
    others = [stage.send("progress", 20) for _ in range(5)]
    assert results(stage, [stage.send("threaded") for _ in range(5)]) == [{"by": "thread"}] * 5
    assert results(stage, others) == [20] * 5


# ---- limits


def test_gevent_ends_a_task_at_its_hard_limit_and_no_other(alike):
    def limited(stage):
        worker = serve(stage, "gevent")
        bystander = stage.send("lasts", 3, 7)
        begun(stage, bystander)
        victim = stage.send("lasts", 60, time_limit=1, soft_time_limit=0.5)
        found = {"type": type(victim.get(timeout=30, propagate=False)).__name__, "other": bystander.get(timeout=30)}
        stage.wait_journal("finally", id=victim.id)
        found["journal"] = [
            (line["event"], line.get("type")) for line in stage.journal(id=victim.id) if line["event"] != "finally"
        ]
        worker.wait_log(f"Hard time limit (1s) exceeded for lasts[{victim.id}]")
        return found, worker.stop()

    seen, status = alike(limited)
    assert seen == {
        "type": TimeLimitExceeded.__name__, "other": 7, "journal": [("begins", None), ("raised", "Timeout")],
    }  # fmt: skip
    assert status == 0


def test_eventlet_keeps_no_limit(alike):
    def limited(stage):
        serve(stage, "eventlet")
        return stage.send("lasts", 1.5, 3, time_limit=0.5, soft_time_limit=0.2).get(timeout=30)

    assert alike(limited) == 3


@on_each
def test_a_revoked_task_is_ended_and_no_other(alike, pool):
    def revoked(stage):
        start(stage, "-P", pool, app="greens", concurrency=20)
        victim, bystander = stage.send("lasts", 60), stage.send("lasts", 3, 7)
        begun(stage, victim, bystander)
        stage.app.control.revoke(victim.id, terminate=True)
        found = {"state": type(victim.get(timeout=30, propagate=False)).__name__, "other": bystander.get(timeout=30)}
        stage.wait_journal("finally", id=victim.id)
        found["journal"] = [
            (line["event"], line.get("type")) for line in stage.journal(id=victim.id) if line["event"] != "apply"
        ]
        stage.wait_empty()
        return found

    assert alike(revoked) == {
        "state": "TaskRevokedError", "other": 7,
        "journal": [("begins", None), ("raised", "GreenletExit"), ("finally", None)],
    }  # fmt: skip


@on_each
def test_a_task_that_calls_exit_ends_itself_only(stage_on, pool):
    stage = stage_on("celeriac")
    worker = serve(stage, pool, concurrency=1)
    before = worker.children_running_tasks()
    assert isinstance(stage.send("exits").get(timeout=30, propagate=False), BaseException)
    assert stage.send("add", 1, 1).get(timeout=30) == 2
    assert worker.children_running_tasks() == before


# ---- the pool


@on_each
def test_the_pool_is_shown_as_celery_shows_it(alike, pool):
    def shown(stage):
        start(stage, "-P", pool, app="greens", concurrency=7)
        running = stage.send("lasts", 600)
        begun(stage, running)
        names = ("implementation", "max-concurrency", "free-threads", "running-threads")
        found = answer(stage, "stats")["pool"]
        return {name: found[name] for name in names if name in found}

    threads = {"free-threads": 6, "running-threads": 1} if pool == "eventlet" else {}
    assert alike(shown) == {"implementation": f"celery.concurrency.{pool}:TaskPool", "max-concurrency": 7, **threads}


@on_each
def test_the_pool_grows_and_shrinks(alike, pool):
    def grown(stage):
        start(stage, "-P", pool, app="greens", concurrency=2)

        def size():
            return answer(stage, "stats")["pool"]["max-concurrency"]

        answer(stage, "pool_grow", n=3)
        found = [size(), results(stage, [stage.send("meet", 5) for _ in range(5)])]
        answer(stage, "pool_shrink", n=4)
        found.append(size())
        first = stage.send("lasts", 1, 1)
        begun(stage, first)
        second = stage.send("lasts", 0, 2)
        results(stage, [first, second])
        found.append([line["event"] for line in stage.journal() if line["event"] in ("begins", "ends")])
        answer(stage, "pool_grow", n=2)
        return [*found, size()]

    assert alike(grown) == [5, [5] * 5, 1, ["begins", "ends", "begins", "ends"], 3]


@on_each
def test_a_warm_stop_waits_for_every_task(alike, pool):
    def stopped(stage):
        worker = serve(stage, pool)
        sent = [stage.send("lasts", 2, number) for number in range(20)]
        begun(stage, *sent)
        status = worker.stop()
        return status, results(stage, sent)

    assert alike(stopped) == (0, list(range(20)))


@on_each
def test_a_cold_stop_gives_late_acked_tasks_back(stage_on, pool):
    stage = stage_on("celeriac")
    worker = serve(stage, pool)
    sent = [stage.send("lasts_late", 600, number) for number in range(10)]
    begun(stage, *sent)
    worker.stop(signal.SIGQUIT)
    assert stage.depth() == 10


@on_each
def test_the_death_of_the_child_costs_the_tasks_in_it_and_the_child_is_replaced(stage_on, pool):
    stage = stage_on("celeriac")
    worker = serve(stage, pool)
    sent = [stage.send("lasts", 600, number) for number in range(20)]
    begun(stage, *sent)
    [child] = worker.children_running_tasks()
    os.kill(child, signal.SIGKILL)
    assert [type(value) for value in results(stage, sent)] == [WorkerLostError] * 20
    assert stage.send("where").get(timeout=60)["pid"] not in (child, worker.pid)
    stage.wait_empty()
    assert worker.stop() == 0


@on_each
def test_nothing_is_left_when_the_supervisor_is_killed(stage_on, pool):
    stage = stage_on("celeriac")
    worker = serve(stage, pool)
    worker.kill(signal.SIGKILL)
    worker.wait()


def test_the_signals_of_an_eventlet_pool_are_sent_as_celery_sends_them(alike):
    def signalled(stage):
        worker = serve(stage, "eventlet")
        result = stage.send("add", 1, 1)
        result.get(timeout=30)
        worker.stop()
        told = [(line["what"], line["sender"]) for line in stage.journal("pool")]
        applied = [
            {key: value for key, value in line.items() if key not in ("pid", "time", "id", "target")}
            for line in stage.journal("apply", id=result.id)
        ]
        return told, applied

    told, applied = alike(signalled)
    sender = "celery.concurrency.eventlet"
    assert told == [("started", sender), ("preshutdown", sender), ("postshutdown", sender)]
    assert applied == [{"event": "apply", "name": "add", "count": 6, "kwargs": {}}]


# ---- the doors


def is_ours(worker):
    """It has a process that Celery has not: with its title, where setproctitle is there to set one."""
    shown = [" ".join(process.cmdline()) for process in worker.descendants()]
    return any("celeriac.green" in line or ":zygote" in line for line in shown)


@on_each
@pytest.mark.parametrize("way", ["option", "setting"])
def test_the_celery_command_starts_ours_unpatched(stage_on, pool, way):
    stage = stage_on("celeriac")
    options = ["-P", pool] if way == "option" else []
    env = {"CELERIAC": "1", "POOL": pool if way == "setting" else ""}
    worker = stage.worker(*options, app="greens", concurrency=5, env=env, kind="celery")
    assert results(stage, [stage.send("meet", 5) for _ in range(5)]) == [5] * 5
    seen = stage.send("where").get(timeout=30)
    assert (seen["import"], seen["pid"] != worker.pid, is_ours(worker)) == (True, True, True)
    assert worker.stop() == 0
    assert [line["patched"] for line in stage.journal("worker_shutdown", pid=worker.pid)] == [False]


@on_each
@pytest.mark.parametrize("way", ["option", "setting"])
def test_an_app_that_patches_its_process_does_not_patch_the_supervisor(stage_on, pool, way):
    stage = stage_on("celeriac")
    options = ["-P", pool] if way == "option" else []
    env = {"PATCHES": pool, "POOL": pool if way == "setting" else ""}
    worker = stage.worker(*options, app="greens", concurrency=5, env=env)
    assert results(stage, [stage.send("meet", 5) for _ in range(5)]) == [5] * 5
    assert worker.stop() == 0
    assert [line["patched"] for line in stage.journal("worker_shutdown", pid=worker.pid)] == [False]


@on_each
def test_the_child_finds_the_app_where_relative_options_say(stage_on, pool, tmp_path):
    stage = stage_on("celeriac")
    (stage.folder / "inner").mkdir()
    (stage.folder / "inner" / "within.py").write_text(
        "from greens import app\n@app.task(name='here')\ndef here():\n    import os\n    return os.getcwd()\n"
    )
    worker = stage.worker("-P", pool, app="within", before=(), ready=False)
    worker.destroy()
    worker.command[1:1] = ["--workdir", "inner"]
    worker.start()
    assert stage.send("here").get(timeout=30) == str(stage.folder / "inner")


@on_each
def test_a_pool_that_is_not_installed_ends_with_the_status_of_celery(tmp_path, pool):
    (tmp_path / f"{pool}.py").write_text(f"raise ModuleNotFoundError(\"No module named '{pool}'\")")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), "."])
    (tmp_path / "nothing.py").write_text("from celery import Celery\napp = Celery('nothing')\n")
    done = run("celeriac", "-A", "nothing", "worker", "-P", pool, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 1
    assert f"celery[{pool}]" in complaint(done)
    assert "Traceback" not in done.stderr


@on_each
def test_a_program_that_makes_its_own_worker_is_told_what_to_do(pool):
    program = f"""
from celery import Celery
from celeriac import seam
seam.install()
try:
    Celery("own").Worker(pool_cls="{pool}")
except Exception as error:
    print(type(error).__name__, error)
"""
    printed = python(program)
    assert printed.startswith("Refused ")
    assert "celeriac -A" in printed


def test_a_custom_pool_is_refused_with_what_to_use():
    done = run("celeriac", "-A", "show", "worker", "-P", "custom", CELERY_CUSTOM_WORKER_POOL="my.pool:Pool")
    assert done.returncode == 2
    assert "use prefork, threads, solo, gevent or eventlet" in complaint(done)


def test_processes_is_prefork(stage_on):
    stage = stage_on("celeriac")
    start(stage, "-P", "processes", app="greens")
    assert answer(stage, "stats")["pool"]["implementation"] == "celery.concurrency.prefork:TaskPool"


@on_each
def test_the_child_writes_its_lines_in_the_format_that_was_asked_for(stage_on, pool):
    stage = stage_on("celeriac")
    worker = serve(stage, pool, env={"CELERIAC_LOG_FORMAT": "json"})
    result = stage.send("add", 1, 1)
    assert result.get(timeout=30) == 2
    until(
        lambda: any("succeeded" in line and line.startswith("{") for line in worker.log.splitlines()), worker.describe
    )
