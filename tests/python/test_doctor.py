"""`celeriac doctor` shows the decisions that the worker takes."""

import json

from support.command import python, run


def examine(app, *words, cwd, **env):
    done = run("celeriac", "-A", app, "doctor", "--json", *words, cwd=cwd, **env)
    return json.loads(done.stdout), done


def by_name(decisions):
    return {decision["name"]: decision for decision in decisions}


def test_an_app_of_the_usual_kind_is_native_where_there_is_a_native_rung(tmp_path):
    (tmp_path / "usual.py").write_text(
        "from celery import Celery\napp = Celery('usual', broker='redis://h', backend='redis://h')\n"
    )
    report, done = examine("usual", cwd=tmp_path)
    assert done.returncode == 0
    concerns = by_name(report["concerns"])
    assert {name: concerns[name]["rung"] for name in ("broker", "result backend")} == {
        "broker": "native",
        "result backend": "native",
    }
    assert report["refused"] == report["without_effect"] == []


def test_each_thing_that_holds_an_app_back_is_named(tmp_path):
    report, done = examine("ladder_zoo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    concerns = {name: " ".join(one["reasons"]) for name, one in by_name(report["concerns"]).items()}
    assert "sqla" in concerns["broker"]
    assert "celery.backends.database" in concerns["result backend"]
    assert "before_task_publish has a receiver: ladder_zoo:stamp" in concerns["continuations"]
    assert "task_routes has a function: ladder_zoo:route" in concerns["continuations"]
    assert "setup_logging has a receiver: ladder_zoo:logging_of_ours" in concerns["logging"]
    assert all(one["rung"] == "python" for one in report["concerns"])
    tasks = {name.removeprefix("ladder_zoo."): one["reasons"] for name, one in by_name(report["tasks"]).items()}
    assert tasks == {
        "plain": [],
        "hooked": ["ladder_zoo:Hooked overrides on_failure"],
        "retrying": ["autoretry_for"],
        "traced": ["__trace__ is ladder_zoo:route"],
    }
    assert report["without_effect"] == [
        "broker_write_url for events (they go to broker_read_url, which the supervisor is connected to)"
    ]


def test_a_replaced_tracer_is_named(tmp_path):
    (tmp_path / "watched.py").write_text(
        "import celery.app.trace as trace\nfrom celery import Celery\napp = Celery('watched')\n"
        "real = trace.build_tracer\ndef build_tracer(*args, **kwargs):\n    return real(*args, **kwargs)\n"
        "trace.build_tracer = build_tracer\n"
    )
    report, _ = examine("watched", cwd=tmp_path)
    assert "build_tracer is replaced by watched:build_tracer" in by_name(report["concerns"])["execution"]["reasons"]


def test_an_option_that_json_cannot_hold_leaves_the_broker_to_kombu(tmp_path):
    (tmp_path / "secret.py").write_text(
        "from celery import Celery\napp = Celery('secret', broker='redis://h')\n"
        "app.conf.broker_transport_options = {'credential_provider': object()}\n"
    )
    report, _ = examine("secret", cwd=tmp_path)
    broker = by_name(report["concerns"])["broker"]
    assert broker["rung"] == "python"
    assert "broker_transport_options['credential_provider'] is a object" in broker["reasons"]


def test_what_the_worker_would_refuse_is_listed_with_status_2(tmp_path):
    (tmp_path / "batch.py").write_text(
        "from plain_config import app\napp.tasks['plain_config.add'].Strategy = 'batches:Strategy'\n"
        "app.conf.worker_consumer = 'mine:Consumer'\n"
    )
    report, done = examine("batch", "-P", "threads", cwd=tmp_path)
    assert done.returncode == 2
    text = " ".join(report["refused"])
    assert "task plain_config.add sets Strategy to 'batches:Strategy', which cannot be imported" in text
    assert "worker_consumer is mine:Consumer" in text


def test_tasks_with_classes_of_their_own_are_named_and_those_that_cannot_be_hosted_are_refused(tmp_path):
    (tmp_path / "own.py").write_text(
        "from celery import Celery\nfrom celery.worker.request import Request\n"
        "app = Celery('own', broker='redis://h')\n"
        "class Mine(Request): pass\nclass NotOne: pass\n"
        "def strategy(task, app, consumer): pass\n"
        "@app.task(Request=Mine)\ndef requested(): pass\n"
        "@app.task(Strategy='own:strategy')\ndef strategic(): pass\n"
    )
    report, done = examine("own", cwd=tmp_path)
    assert done.returncode == 0
    tasks = {name: (one["rung"], one["reasons"]) for name, one in by_name(report["tasks"]).items()}
    assert tasks == {
        "own.requested": ("python", ["Request is own:Mine: the parent process makes one for each message"]),
        "own.strategic": ("python", ["Strategy is own:strategy: the parent process hands it each message"]),
    }
    with (tmp_path / "own.py").open("a") as source:
        source.write("@app.task(Request=NotOne)\ndef foreign(): pass\n")
    report, done = examine("own", cwd=tmp_path)
    assert done.returncode == 2
    assert report["refused"] == [
        "task own.foreign sets Request to own:NotOne, which is no subclass of celery.worker.request:Request: make it "
        "one, or run `celery worker` without CELERIAC for this app."
    ]


def test_a_pool_class_of_another_package_is_refused_by_name(tmp_path):
    (tmp_path / "aio.py").write_text(
        "from celery import Celery\nfrom celery.concurrency.base import BasePool\n"
        "class AsyncIOPool(BasePool): pass\n"
        "app = Celery('aio', broker='redis://h')\napp.conf.worker_pool = 'aio:AsyncIOPool'\n"
    )
    report, done = examine("aio", cwd=tmp_path)
    assert done.returncode == 2
    assert report["refused"] == [
        "the pool aio:AsyncIOPool is not one of celeriac's: use prefork, threads, solo, gevent or eventlet, or run "
        "`celery worker` without CELERIAC for this app."
    ]


def test_the_table_for_people_says_the_same(tmp_path):
    done = run("celeriac", "-A", "ladder_zoo", "doctor", cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("app ladder_zoo, node celery@")
    assert any(line.split()[:2] == ["broker", "python"] for line in lines)
    assert any("ladder_zoo.hooked" in line and "overrides on_failure" in line for line in lines)


def test_no_broker_is_connected(tmp_path):
    examine("ladder_zoo", cwd=tmp_path)
    assert not (tmp_path / "broker.db").exists()


def test_the_reference_of_options_is_the_one_of_the_parser():
    from pathlib import Path

    made = python("from celeriac import _core\nprint(_core.options_reference(), end='')")
    assert (Path(__file__).resolve().parents[2] / "docs" / "options.md").read_text() == made


def test_continuations_are_native_or_say_why_not_and_can_be_forced(tmp_path):
    (tmp_path / "plain.py").write_text(
        "from celery import Celery\napp = Celery('plain', broker='redis://h', backend='redis://h')\n"
        "@app.task(serializer='pickle')\ndef pickled():\n    pass\n"
    )
    switch = "CELERIAC_CONTINUATIONS"
    report, _ = examine("plain", cwd=tmp_path)
    assert by_name(report["concerns"])["continuations"]["rung"] == "native"
    assert by_name(report["tasks"])["plain.pickled"]["reasons"] == [
        "Celery sends it where it follows a task: serializer is 'pickle'"
    ]
    report, _ = examine("plain", cwd=tmp_path, **{switch: "python"})
    assert by_name(report["concerns"])["continuations"]["reasons"] == [f"{switch}=python"]
    report, done = examine("plain", cwd=tmp_path, **{switch: "native"})
    assert (report["refused"], done.returncode) == ([], 0)
    report, done = examine("ladder_zoo", cwd=tmp_path, **{switch: "native"})
    assert done.returncode == 2
    assert f"{switch}=native" in report["refused"][0]
    assert "before_task_publish" in report["refused"][0]
    assert f"{switch}=rust" in examine("plain", cwd=tmp_path, **{switch: "rust"})[0]["refused"][0]
