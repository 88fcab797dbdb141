"""Fixtures: servers for the session, and stages with either worker on them."""

import importlib.util
import itertools
import os
import warnings

import pytest
from support.compare import differences
from support.servers import Memcached, RabbitMq, Redis
from support.stage import Stage
from support.worker import COMMANDS

# The worker that is copied, and the one that copies it.
ORIGINAL, OURS = "celery", "celeriac"


def pytest_addoption(parser):
    parser.addoption(
        "--workers",
        default="",
        help="which workers to test, with commas: celery, celeriac (default: all installed)",
    )


def installed():
    """Kinds of worker that can be started here."""
    ours = "CELERIAC_COMMAND" in os.environ or importlib.util.find_spec("celeriac") is not None
    if not ours and os.environ.get("CI") == "true":
        pytest.exit("celeriac is not installed in this environment")
    return [ORIGINAL, OURS] if ours else [ORIGINAL]


def pytest_configure(config):
    config.addinivalue_line("markers", "ours: only for celeriac, because the original is wrong here")
    chosen = config.getoption("--workers")
    config.stash[KINDS] = chosen.split(",") if chosen else installed()
    unknown = set(config.stash[KINDS]) - set(COMMANDS)
    if unknown:
        raise pytest.UsageError(f"--workers: {', '.join(sorted(unknown))}")


def pytest_collection_modifyitems(items):
    """A test of the original alone may fail by the original's own races: it is played once more, and the summary says
    so. What ours fails in, alone or together with the original, fails.

    Celery's own suite takes the longest and mostly waits: its parts come first, each with another test behind it, as
    every process of the session is given two tests to begin with.
    """
    for item in items:
        if hasattr(item, "callspec") and item.callspec.params.get("kind") == ORIGINAL:
            item.add_marker(pytest.mark.flaky(reruns=1))
    long = [item for item in items if item.path.parent.name == "conformance"]
    others = [item for item in items if item not in long]
    behind = len(long) if others else 0
    items[:] = [item for pair in zip(long, others[:behind], strict=False) for item in pair] or long
    items += others[behind:]


KINDS = pytest.StashKey[list]()


def pytest_generate_tests(metafunc):
    if "kind" in metafunc.fixturenames:
        kinds = metafunc.config.stash[KINDS]
        if metafunc.definition.get_closest_marker("ours"):
            kinds = [kind for kind in kinds if kind == OURS]
        metafunc.parametrize("kind", kinds)


# ---- servers


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    with Redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def rabbitmq_server(tmp_path_factory):
    with RabbitMq(tmp_path_factory.mktemp("rabbitmq")) as server:
        yield server


@pytest.fixture(scope="session")
def memcached_server(tmp_path_factory):
    with Memcached(tmp_path_factory.mktemp("memcached")) as server:
        yield server


# ---- stages

_numbers = itertools.count(1)


@pytest.fixture
def stage_on(request, tmp_path):
    """Makes a stage: `stage_on(kind, broker="redis", backend="redis", **conf)`; closed after the test."""
    stages = []

    def make(kind, broker="redis", backend="redis", **conf):
        number = next(_numbers)
        folder = tmp_path / f"{kind}-{number}"
        folder.mkdir()
        urls = {}

        def url(name):
            """Each server is started when the first test asks for it."""
            if name not in urls:
                match name:
                    case "redis":
                        server = request.getfixturevalue("redis_server")
                        server.client().flushall()
                        urls[name] = server.url
                    case "amqp":
                        urls[name] = request.getfixturevalue("rabbitmq_server").url
                    case "vhost":
                        # A virtual host for this stage alone, whose entities can be listed.
                        urls[name] = request.getfixturevalue("rabbitmq_server").add_vhost(folder.name)
                    case "memcached":
                        urls[name] = request.getfixturevalue("memcached_server").url
                    case "file":
                        (folder / "results").mkdir()
                        urls[name] = f"file://{folder}/results"
                    case "filesystem":
                        urls[name] = "filesystem://"
                        for part in ("queue", "control"):
                            (folder / part).mkdir()
                        conf.setdefault(
                            "broker_transport_options",
                            {
                                "data_folder_in": f"{folder}/queue",
                                "data_folder_out": f"{folder}/queue",
                                "control_folder": f"{folder}/control",
                            },
                        )
                    case "sqlite":
                        urls[name] = f"db+sqlite:///{folder}/results.db"
                    case other:
                        urls[name] = other
            return urls[name]

        stage = Stage(kind, folder, url(broker), url(backend), f"q{number}", conf)
        stages.append(stage)
        return stage

    yield make
    for stage in stages:
        stage.close()


@pytest.fixture
def kinds(request):
    """The kinds of worker that this run tests, the original first."""
    return request.config.stash[KINDS]


@pytest.fixture
def alike(kinds, stage_on):
    """Plays one scenario under each worker and compares what was observed; returns what the original showed.

    The scenario gets a stage and returns plain data; with one kind in --workers nothing is compared.
    """

    def compare(scenario, broker="redis", backend="redis", **conf):
        def play(kind):
            stage = stage_on(kind, broker, backend, **conf)
            try:
                return scenario(stage)
            except BaseException as error:
                error.add_note(f"under {kind}:\n{stage.logs()}") if hasattr(error, "add_note") else None
                raise
            finally:
                stage.close()

        def play_original_again(why):
            warnings.warn(f"the original was played twice: {why}", stacklevel=3)
            return play(ORIGINAL)

        def play_original():
            try:
                return play(ORIGINAL)
            except (Exception, pytest.fail.Exception) as error:
                return play_original_again(error)

        if ORIGINAL not in kinds:
            return play(OURS)
        original = play_original()
        if OURS in kinds:
            ours = play(OURS)
            found = differences(original, ours)
            if found:
                # The original's own races let it show more than one thing: ours has to be one of them.
                original = play_original_again("\n".join(found))
                found = differences(original, ours)
            if found:
                pytest.fail("the workers differ:\n" + "\n".join(found))
        return original

    return compare
