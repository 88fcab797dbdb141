"""The second door: CELERIAC=1 makes `celery worker` start celeriac, and without it nothing is changed."""

import json

import pytest
from support.command import complaint, python, run, shown

OURS, THEIRS = "celeriac.worker.Worker", "celery.apps.worker.Worker"

WORKER_CLASS = """
import json, sys
import celery.bin.celery
from celery import Celery
made = Celery("made").Worker
print(json.dumps([f"{base.__module__}.{base.__name__}" for base in made.__mro__[:3]]))
"""


@pytest.mark.parametrize(("switch", "expected"), [("1", OURS), ("true", OURS), ("0", THEIRS), ("", THEIRS)])
def test_the_variable_decides_which_worker_the_command_starts(switch, expected):
    assert shown(run("celery", "-A", "show", "worker", "-c", "2", CELERIAC=switch))["class"] == expected


def test_without_the_variable_nothing_of_celery_is_changed():
    program = """
import json
from celery import Celery
before = dict(vars(Celery))
import celery.bin.celery
from importlib.metadata import entry_points
assert any(point.value == "celeriac.seam:celeriac" for point in entry_points(group="celery.commands"))
print(json.dumps([name for name in before if vars(Celery)[name] is not before[name]]))
"""
    assert json.loads(python(program)) == []


def test_app_worker_is_ours_and_bound_to_the_app():
    assert json.loads(python(WORKER_CLASS, CELERIAC="1")) == ["celeriac.worker.Worker", OURS, THEIRS]


@pytest.mark.parametrize(
    "argv",
    [
        ["worker", "-c", "3", "-Q", "a,b"],
        # As airflow starts it.
        [
            "worker",
            "-O",
            "fair",
            "--queues",
            "a,b",
            "--concurrency",
            "3",
            "--without-mingle",
            "--without-gossip",
        ],
    ],
    ids=" ".join,
)
def test_worker_main_reaches_the_same_worker(argv):
    program = "import json, sys\nfrom show import app\napp.worker_main(json.loads(sys.argv[1]))\n"
    from subprocess import CompletedProcess

    printed = python(program, json.dumps(argv), CELERIAC="1")
    seen = shown(CompletedProcess(argv, 0, printed, ""))
    assert seen["class"] == OURS
    assert (seen["concurrency"], seen["queues"]) == (3, ["a", "b"])


def test_an_app_with_a_worker_of_its_own_keeps_it_at_this_door_and_is_refused_at_ours(tmp_path):
    (tmp_path / "own.py").write_text(
        "from celery import Celery\nfrom celery.apps.worker import Worker\nfrom show import app as plain\n"
        "class Mine(Celery):\n    @property\n    def Worker(self):\n"
        "        return self.subclass_with_self(Worker)\n"
        "app = Mine('own', broker='memory://', backend='cache+memory://')\n"
    )
    assert shown(run("celery", "-A", "own", "worker", cwd=tmp_path, CELERIAC="1"))["class"] == THEIRS
    done = run("celeriac", "-A", "own", "worker", cwd=tmp_path)
    assert done.returncode == 2
    assert "defines a worker of its own" in complaint(done)


def test_the_command_that_carries_the_seam_only_says_what_is_on():
    off, on = run("celery", "celeriac"), run("celery", "celeriac", CELERIAC="1")
    assert off.returncode == on.returncode == 0
    assert "starts Celery's own worker" in off.stdout
    assert "starts celeriac" in on.stdout
