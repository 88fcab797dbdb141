"""The `celeriac` command beside the original: options, apps, exit statuses, messages."""

import json
import os
import signal
import subprocess
import textwrap
from pathlib import Path

import celery
import pytest
from celeriac import cli
from support.command import complaint, environment, run, shown
from support.waiting import until
from support.worker import BIN, WorkerProcess

# ---- options

# What the worker sees of each; the defaults are the same table's empty line.
OPTIONS = [
    [],
    ["-n", "w1@%h", "-l", "info", "-O", "fair", "-c", "3", "--prefetch-multiplier", "3", "-f", "%n.log"],
    ["--hostname=w2", "--loglevel", "DEBUG", "--prefetch-multiplier", "0", "-c", "0", "--pidfile", "%n.pid"],
    ["-P", "solo", "--time-limit", "1.5", "--soft-time-limit", "1", "-Q", "a,b"],
    ["-P", "threads", "--max-tasks-per-child", "5", "--max-memory-per-child", "9000", "-I", "json,textwrap"],
    ["-P", "processes", "-X", "celery", "-Q", "celery,a", "--purge"],
    ["--without-gossip", "--without-mingle", "--without-heartbeat", "--heartbeat-interval", "5"],
    ["-s", "schedule", "--scheduler", "celery.beat:Scheduler"],
    ["worker.concurrency=2", "task.acks_late=(bool)true", "-l", "info", ".prefetch_multiplier=7"],
]

# Options that younger versions brought.
if celery.VERSION >= (5, 6):
    OPTIONS.append(["--disable-prefetch"])
if celery.VERSION >= (5, 7):
    OPTIONS += [["--pool-start-method", "fork"], ["-c", "auto"]]


SINCE_5_7 = pytest.mark.skipif(celery.VERSION < (5, 7), reason="worded anew in 5.7")


def same(ours, theirs):
    """What must not differ between workers; the class must."""
    assert ours.pop("class") == "celeriac.worker.Worker"
    assert theirs.pop("class") == "celery.apps.worker.Worker"
    assert ours == theirs


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_an_option_reaches_the_worker_as_in_the_original(options, tmp_path):
    ours = run("celeriac", "-A", "show", "worker", *options, cwd=tmp_path)
    theirs = run("celery", "-A", "show", "worker", *options, cwd=tmp_path)
    assert ours.returncode == theirs.returncode == 0, ours.stderr
    same(shown(ours), shown(theirs))


@pytest.mark.parametrize(
    ("globals_", "env"),
    [
        (["-q", "-C"], {}),
        (["-b", "memory://other", "--result-backend", "rpc://"], {}),
        ([], {"BROKER_URL": "memory://x", "CELERY_RESULT_BACKEND": "rpc://"}),
        (
            [],
            {
                "CELERY_WORKER_CONCURRENCY": "3",
                "CELERY_WORKER_LOGLEVEL": "error",
                "CELERY_WORKER_PURGE": "no",
            },
        ),
        ([], {"CELERY_QUIET": "1", "NO_COLOR": "true"}),
    ],
)
def test_global_options_and_variables_reach_the_worker_as_in_the_original(globals_, env, tmp_path):
    ours = run("celeriac", "-A", "show", *globals_, "worker", cwd=tmp_path, **env)
    theirs = run("celery", "-A", "show", *globals_, "worker", cwd=tmp_path, **env)
    same(shown(ours), shown(theirs))
    assert ours.stdout.count("[queues]") == theirs.stdout.count("[queues]")


@pytest.mark.parametrize(
    "words",
    [
        ["-A", "show", "worker", "--bogus"],
        ["-A", "show", "worker", "--purg"],
        ["-A", "show", "worker", "-l", "loud"],
        pytest.param(["-A", "show", "worker", "-c", "many"], marks=SINCE_5_7),
        pytest.param(["-A", "show", "worker", "-c", "-1"], marks=SINCE_5_7),
        ["-A", "show", "worker", "-O", "fast"],
        ["-A", "show", "worker", "--time-limit", "x"],
        ["-A", "show", "worker", "--prefetch-multiplier", "x"],
        ["-A", "show", "worker", "--purge=1"],
        ["-A", "show", "worker", "--concurrency"],
        ["-A", "show", "worker", "word"],
        ["-A", "nosuch", "worker"],
        ["-A", "show.nosuch", "worker"],
        ["-A", "broken", "worker"],
        ["--bogus", "worker"],
        ["nosuchcommand"],
    ],
    ids=" ".join,
)
def test_a_wrong_line_is_answered_as_by_the_original(words, tmp_path):
    (tmp_path / "broken.py").write_text("raise KeyError('inside')\n")
    ours = run("celeriac", *words, cwd=tmp_path)
    theirs = run("celery", *words, cwd=tmp_path)
    assert ours.returncode == theirs.returncode == 2
    assert first_words(ours) == first_words(theirs)


def first_words(done):
    """The first line of a complaint; the version of click decides about quotes."""
    line = complaint(done).replace("'celeriac", "'celery").splitlines()[0]
    return "".join(letter for letter in line if letter not in "':.")


def test_the_app_behind_the_command_is_refused_with_a_hint():
    done = run("celeriac", "worker", "-A", "show")
    assert done.returncode == 2
    assert "celeriac -A proj worker" in done.stderr
    assert "No such option '-A'." in done.stderr


MISSING = [
    (["--pool-start-method", "spawn"], "--pool-start-method spawn"),
]


@pytest.mark.parametrize(
    ("program", "options", "named"),
    [(program, *line) for program in ("celeriac", "celery") for line in MISSING],
    ids=str,
)
def test_what_has_no_effect_yet_is_refused_at_both_doors(program, options, named):
    done = run(program, "-A", "show", "worker", *options, CELERIAC="1")
    assert done.returncode == 2
    assert named in done.stderr
    assert "is not supported by celeriac yet: " in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_the_options_of_the_worker_and_of_the_app(tmp_path):
    done = run("celeriac", "-A", "optional", "worker", "--help")
    assert done.returncode == 0
    for part in ("--max-tasks-per-child", "--team"):
        assert part in done.stdout


# ---- options of the app


def test_options_of_the_app_reach_its_boot_steps_and_the_preload_signal(tmp_path):
    words = ["-A", "optional", "worker", "--team", "red", "--dry", "-Z", "paris"]
    for program, env in (("celeriac", {}), ("celery", {"CELERIAC": "1"}), ("celery", {})):
        done = run(program, *words, cwd=tmp_path, **env)
        assert "STEP red True" in done.stdout, done.stderr
        assert "PRELOAD paris" in done.stdout


def test_an_option_of_the_app_is_read_from_the_environment(tmp_path):
    done = run("celeriac", "-A", "optional", "worker", cwd=tmp_path, CELERY_WORKER_TEAM="blue")
    assert "STEP blue False" in done.stdout, done.stderr


# ---- finding the app


def report(*words, cwd, **env):
    done = run("celeriac", *words, "doctor", "--json", cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "app"),
    [
        ("shop", "plain"),
        ("shop:second", "second"),
        ("shop.second", "second"),
        ("older", "older"),
        ("package", "in package"),
        ("package.celery", "in package"),
        ("anyname", "any"),
    ],
)
def test_the_app_is_found_where_the_original_finds_it(name, app, tmp_path):
    make = "from celery import Celery\n"
    (tmp_path / "shop.py").write_text(make + "app = Celery('plain', broker='memory://')\nsecond = Celery('second')\n")
    (tmp_path / "older.py").write_text(make + "celery = Celery('older')\n")
    (tmp_path / "anyname.py").write_text(make + "whatever = Celery('any')\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "celery.py").write_text(make + "application = Celery('in package')\n")
    assert report("-A", name, cwd=tmp_path)["app"] == app


def test_the_app_may_come_from_the_environment_and_from_another_directory(tmp_path):
    (tmp_path / "elsewhere.py").write_text("from celery import Celery\napp = Celery('elsewhere')\n")
    assert report(cwd=tmp_path, CELERY_APP="elsewhere")["app"] == "elsewhere"
    assert report(cwd=tmp_path, APP="elsewhere")["app"] == "elsewhere"
    assert report("-A", "elsewhere", "--workdir", str(tmp_path), cwd="/")["app"] == "elsewhere"


def test_without_an_app_there_is_the_default_one(tmp_path):
    (tmp_path / "celeryconfig.py").write_text("task_default_queue = 'from_config'\nbroker_url = 'memory://'\n")
    assert report(cwd=tmp_path)["app"] == "default"


def test_a_django_project_is_found_with_its_settings(tmp_path):
    pytest.importorskip("django") if not os.environ.get("CI") else __import__("django")
    site = tmp_path / "site1"
    site.mkdir()
    (site / "__init__.py").write_text("from .celery import app as celery_app\n")
    (site / "settings.py").write_text(
        textwrap.dedent("""
            SECRET_KEY = "x"
            INSTALLED_APPS = ["polls"]
            DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
            CELERY_BROKER_URL = "memory://"
            CELERY_TASK_DEFAULT_QUEUE = "votes"
            USE_TZ = True
            TIME_ZONE = "Europe/Berlin"
        """)
    )
    (site / "celery.py").write_text(
        textwrap.dedent("""
            import os
            from celery import Celery
            os.environ.setdefault("DJANGO_SETTINGS_MODULE", "site1.settings")
            app = Celery("site1")
            app.config_from_object("django.conf:settings", namespace="CELERY")
            app.autodiscover_tasks()
        """)
    )
    (tmp_path / "polls").mkdir()
    (tmp_path / "polls" / "__init__.py").write_text("")
    (tmp_path / "polls" / "tasks.py").write_text(
        "from celery import shared_task\n@shared_task\ndef count():\n    return 1\n"
    )
    found = report("-A", "site1", cwd=tmp_path)
    assert found["app"] == "site1"
    assert [task["name"] for task in found["tasks"]] == ["polls.tasks.count"]


# ---- other commands


def test_version_begins_with_the_original_s():
    theirs = run("celery", "--version").stdout.strip()
    ours = run("celeriac", "--version").stdout.strip()
    assert ours == f"{theirs}, celeriac {cli._core.__version__}"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["-A", "show", "report"], 0),
        (["-A", "show", "list", "--help"], 0),
        (["-A", "show", "call", "show.add", "--args", "not json"], 2),
        (["-b", "redis://127.0.0.1:1/0", "-A", "show", "inspect", "ping"], 69),
        (["multi", "names", "3"], 0),
    ],
    ids=str,
)
def test_every_other_command_is_the_original_s(words, status):
    ours, theirs = run("celeriac", *words), run("celery", *words)
    assert ours.returncode == theirs.returncode == status
    assert len(ours.stdout.splitlines()) == len(theirs.stdout.splitlines())


def test_python_m_celeriac_is_the_same_command(tmp_path):
    # A module of the user's that has the name of one of ours.
    (tmp_path / "config.py").write_text("from celery import Celery\napp = Celery('mine')\n")
    done = subprocess.run(
        [str(BIN / "python"), "-m", "celeriac", "-A", "config", "doctor", "--json"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert json.loads(done.stdout)["app"] == "mine"


# ---- the process


@pytest.fixture
def living(tmp_path):
    """Starts `apps/living.py`; what a failed test has left is killed."""
    started = []

    def start(*options):
        started.append(WorkerProcess("celeriac", "living", ["-l", "INFO", "-c", "1", *options], tmp_path))
        return started[-1].start()

    yield start
    for one in started:
        one.destroy()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 1), (signal.SIGQUIT, 0)], ids=str)
def test_a_signal_ends_the_worker_with_the_original_s_status(living, number, status):
    assert living().stop(number) == status


def test_a_second_worker_on_a_pidfile_ends_with_73(living, tmp_path):
    first = living("--pidfile", "w.pid")
    assert (tmp_path / "w.pid").read_text() == f"{first.pid}\n"
    second = run("celeriac", "-A", "living", "worker", "--pidfile", "w.pid", cwd=tmp_path)
    assert second.returncode == 73
    assert f"Seems we're already running? (pid: {first.pid})" in second.stderr
    assert first.stop(signal.SIGTERM) == 0
    assert not (tmp_path / "w.pid").exists()


def text(file):
    """What a file holds, nothing while it is not there."""
    return file.read_text() if file.exists() else ""


def test_a_detached_worker_runs_on_and_leaves_no_pidfile(tmp_path):
    words = [
        "-A",
        "living",
        "worker",
        "-D",
        "-c",
        "1",
        "-l",
        "INFO",
        "-f",
        "%n.log",
        "--pidfile",
        "%n.pid",
        "-n",
        "bg@h",
    ]
    done = run("celeriac", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    log, pidfile = tmp_path / "bg.log", tmp_path / "bg.pid"
    until(
        lambda: log.exists() and " ready." in log.read_text(),
        lambda: log.read_text() if log.exists() else "no log",
    )
    pid = int(pidfile.read_text())
    assert (
        "celeriac" in Path(f"/proc/{pid}/cmdline").read_text() or "celeryd" in Path(f"/proc/{pid}/cmdline").read_text()
    )
    os.kill(pid, signal.SIGTERM)
    until(lambda: not Path(f"/proc/{pid}").exists(), lambda: text(log))
    assert not pidfile.exists()


def test_multi_starts_celeriac(tmp_path):
    files = [f"--pidfile={tmp_path}/%n.pid", f"--logfile={tmp_path}/%n.log"]
    done = run("celeriac", "multi", "start", "m1", "-A", "living", "-l", "INFO", "-c", "1", *files, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    log = tmp_path / "m1.log"
    until(
        lambda: log.exists() and " ready." in log.read_text(),
        lambda: log.read_text() if log.exists() else "no log",
    )
    assert "CLASS celeriac.worker" in text(log)
    pid = int((tmp_path / "m1.pid").read_text())
    assert run("celeriac", "multi", "stop", "m1", *files, cwd=tmp_path).returncode == 0
    until(lambda: not Path(f"/proc/{pid}").exists(), lambda: text(log))


def test_root_does_not_accept_pickle_unless_forced():
    if os.geteuid() != 0:
        pytest.skip("needs root")
    for program in ("celeriac", "celery"):
        env = environment(CELERY_CONFIG_MODULE="pickling")
        del env["C_FORCE_ROOT"]
        done = subprocess.run([str(BIN / program), "worker"], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert "superuser privileges" in done.stderr


def test_privileges_are_dropped_before_the_worker_is_made(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    done = run("celeriac", "-A", "show", "worker", "--uid", "65534", "--gid", "65534", cwd="/")
    assert shown(done)["uid"] == 65534
