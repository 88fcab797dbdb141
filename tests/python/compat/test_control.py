"""Every command of remote control, asked of either worker.

The replies have the same shape; where nothing depends on the moment they are the same.
"""

import json

import pytest
from celeriac import _core
from celery.worker.control import Panel
from support.control import answer, replies, start
from support.lines import plain
from support.waiting import until
from support.worker import APPS

#: A graph-drawing library of that name, where the worker looks first.
OBJGRAPH = """
def by_type(name):
    return [name]

def show_backrefs(objects, max_depth, highlight, filename):
    with open(filename, "w") as graph:
        graph.write("graph")
"""


def shape(value):
    """Keys, and kinds of values; of a list, the different shapes of its elements."""
    match value:
        case dict():
            return {key: shape(one) for key, one in value.items()}
        case list() | tuple():
            return sorted({json.dumps(shape(one), sort_keys=True) for one in value})
        case bool() | None:
            return repr(value)
        case int() | float():
            return "number"
        case _:
            return type(value).__name__


class Asker:
    """Asks the one worker of a stage."""

    def __init__(self, stage, **ids):
        self.stage = stage
        self.ids = ids

    def exact(self, command, **arguments):
        """The reply, without what differs from process to process."""
        return plain(repr(answer(self.stage, command, **arguments)))

    def shape(self, command, **arguments):
        return shape(answer(self.stage, command, **arguments))

    def held(self):
        """What the worker says of each task that it has."""
        found = answer(self.stage, "query_task", ids=list(self.ids.values()))
        return {name: [found[task_id][0], shape(found[task_id][1])] for name, task_id in self.ids.items()}

    def prefetch(self):
        """Without the task that waits for its time, which takes none here."""
        return answer(self.stage, "stats")["prefetch_count"] // 4 * 4

    def lacks(self, command, text):
        return text not in self.exact(command)


#: Command: what is asked about it, in this order. With each its alias is asked, the same way as the first time.
ASKED = {
    "ping": lambda on: on.exact("ping"),
    "clock": lambda on: on.shape("clock"),
    "conf": lambda on: [on.shape("conf"), sorted(on.shape("conf", with_defaults=True))],
    "report": lambda on: on.shape("report"),
    "stats": lambda on: on.shape("stats"),
    "active": lambda on: [on.shape("active"), on.shape("active", safe=True)],
    "reserved": lambda on: on.shape("reserved"),
    "scheduled": lambda on: on.shape("scheduled"),
    "revoked": lambda on: on.exact("revoked"),
    "registered": lambda on: [
        on.exact("registered"),
        on.exact("registered", builtins=True),
        on.exact("registered", taskinfoitems=["name", "rate_limit", "queue_hint", "__class__"]),
        on.exact("registered", taskinfoitems=["max_retries", "serializer"]),
    ],
    "query_task": lambda on: [
        on.held(),
        on.exact("query_task", ids=["nobody"]),
        on.exact("query_task"),
    ],
    "active_queues": lambda on: on.exact("active_queues"),
    "memsample": lambda on: on.shape("memsample"),
    "memdump": lambda on: [on.shape("memdump"), on.shape("memdump", samples=2)],
    "objgraph": lambda on: on.shape("objgraph", num=2, max_depth=1, type="Request"),
    "revoke": lambda on: [
        on.exact("revoke", task_id="gone"),
        on.exact("revoke", task_id=["gone"]),
        on.exact("revoke", task_id="gone", terminate=True, signal="KILL"),
        on.exact("revoke"),
    ],
    "revoke_by_stamped_headers": lambda on: [
        on.exact("revoke_by_stamped_headers", headers={"stamp": ["value"]}),
        on.exact("revoke_by_stamped_headers", headers=["stamp=other"], terminate=True),
    ],
    "terminate": lambda on: on.exact("terminate", signal="TERM", task_id="gone"),
    "rate_limit": lambda on: [
        on.exact("rate_limit", task_name="mark", rate_limit="7/m"),
        on.exact("rate_limit", task_name="mark", rate_limit=0),
        on.exact("rate_limit", task_name="mark", rate_limit="often"),
        on.exact("rate_limit", task_name="nobody", rate_limit=1),
        on.exact("rate_limit", task_name="mark"),
    ],
    "time_limit": lambda on: [
        on.exact("time_limit", task_name="mark", soft=30, hard=60),
        on.exact("time_limit", task_name="nobody", soft=30),
    ],
    "add_consumer": lambda on: [
        on.exact("add_consumer", queue="more"),
        on.exact("add_consumer", queue="topical", exchange="by", exchange_type="topic", routing_key="a.#"),
        until(lambda: "topical" in on.exact("active_queues"), on.stage.logs),
        on.shape("active_queues"),
        on.exact("add_consumer"),
    ],
    "cancel_consumer": lambda on: [
        on.exact("cancel_consumer", queue="more"),
        on.exact("cancel_consumer", queue="nothing"),
        until(lambda: on.lacks("active_queues", "'more'"), on.stage.logs),
    ],
    "pool_grow": lambda on: [
        on.exact("pool_grow", n=2),
        on.exact("pool_grow"),
        until(lambda: len(answer(on.stage, "stats")["pool"]["processes"]) == 4, on.stage.logs),
        on.prefetch(),
    ],
    "pool_shrink": lambda on: [
        on.exact("pool_shrink", n=1),
        on.exact("pool_shrink"),
        # The original might take away the same one twice.
        on.stage.kind == "celery"
        or until(lambda: len(answer(on.stage, "stats")["pool"]["processes"]) == 2, on.stage.logs),
        on.prefetch(),
    ],
    "pool_restart": lambda on: on.exact("pool_restart"),
    "autoscale": lambda on: [on.exact("autoscale", max=3, min=1), on.exact("autoscale", most=3)],
    "hello": lambda on: [on.shape("hello", from_node="other@here", revoked={}), on.exact("hello", from_node="w0@here")],
    "shutdown": lambda on: [
        # It would be in the way of a warm stop.
        on.exact("revoke", task_id=on.ids["running"], terminate=True)[:20],
        on.stage.app.control.broadcast("shutdown"),
    ],
}

#: They speak of events and gossip.
OF_EVENTS = {
    "enable_events": lambda on: [on.exact("enable_events"), on.exact("enable_events")],
    "disable_events": lambda on: [on.exact("disable_events"), on.exact("disable_events")],
    "heartbeat": lambda on: on.exact("heartbeat"),
    "election": lambda on: on.exact("election", id="1", topic="nothing"),
}


def table():
    return json.loads(_core.control_commands())


def aliases():
    return {row["name"]: row["alias"] for row in table() if row["alias"]}


def occupied(stage, **options):
    """A worker that runs one task and holds others."""
    worker = start(stage, "--prefetch-multiplier=4", app="controlled", **options)
    running = stage.send("hold", 600, kwargs={"note": "it's"})
    stage.wait_journal("started", id=running.id)
    reserved = stage.send("hold", 1)
    scheduled = stage.send("mark", 2, countdown=600)
    stage.app.control.revoke("never-sent")
    held = {"running": running.id, "reserved": reserved.id, "scheduled": scheduled.id}
    until(lambda: len(answer(stage, "query_task", ids=list(held.values()))) == 3, stage.logs)
    return worker, Asker(stage, **held)


def test_every_command_of_the_table_is_asked_here_and_every_command_of_celery_is_in_it():
    names = {row["name"] for row in table()}
    assert names == ASKED.keys() | OF_EVENTS.keys()
    known = {name: meta for name, meta in Panel.meta.items() if Panel.data[name].__module__ == Panel.__module__}
    assert known.keys() <= names
    for row in table():
        if row["name"] in known:
            assert (row["alias"], row["kind"]) == (known[row["name"]].alias, known[row["name"]].type), row["name"]


def test_every_command_answers_as_the_original(alike):
    def asked(stage):
        (stage.folder / "objgraph.py").write_text(OBJGRAPH)
        worker, on = occupied(stage, env={"PYTHONPATH": f"{APPS}:{stage.folder}"})
        found = {}
        for name, ask in ASKED.items():
            found[name] = ask(on)
            if name in aliases():
                found[aliases()[name]] = on.shape(aliases()[name])
        found["status"] = worker.wait()
        return found

    assert alike(asked)["status"] == 0


def test_every_command_of_events_answers_as_the_original(alike):
    def asked(stage):
        start(stage, app="controlled")
        answers = {name: ask(Asker(stage)) for name, ask in OF_EVENTS.items()}
        # Without gossip the original stumbles over its own attribute.
        answers["election"] = stage.kind == "celery" or answers["election"] == "None"
        return answers

    alike(asked)


@pytest.mark.parametrize("broker", ["amqp", "filesystem"])
def test_other_brokers_carry_commands_and_replies_as_well(alike, broker):
    def asked(stage):
        worker = start(stage, app="controlled")
        on = Asker(stage)
        found = {
            "ping": on.exact("ping"),
            "registered": on.exact("registered"),
            "stats": sorted(on.shape("stats")),
            "active_queues": on.exact("active_queues"),
            "rate_limit": on.exact("rate_limit", task_name="mark", rate_limit="7/m"),
            "own": on.exact("count_words", words=["a", "b"]),
            "unknown": [type(one).__name__ for one in replies(stage, "no_such_command", timeout=2)],
        }
        stage.app.control.broadcast("shutdown")
        return found | {"status": worker.wait()}

    assert alike(asked, broker=broker)["status"] == 0


def test_commands_that_the_app_registers_find_the_state_that_they_expect(alike):
    def asked(stage):
        start(stage, "--prefetch-multiplier=4", app="controlled")
        on = Asker(stage)
        found = {
            "look around": on.exact("look_around"),
            "words": on.exact("count_words", words=["a", "b"], more=1),
            "alias": on.exact("words_of", words=[]),
            "plainly": on.exact("plainly"),
            "prefetch": on.exact("current_prefetch_count"),
            "raised": on.exact("increase_prefetch_count", n=3),
        }
        until(lambda: "7" in on.exact("current_prefetch_count"), stage.logs)
        found |= {
            "larger": on.exact("enlarge", n=1),
            "dates": on.exact("dates", at={"__type__": "datetime", "__value__": "2030-01-01T00:00:00"}),
            "failed": on.exact("fail_at_it"),
            "called wrong": "TypeError" in on.exact("look_around", more=1),
            "listens": on.exact("listen_to", queue="another"),
        }
        until(lambda: len(answer(stage, "stats")["pool"]["processes"]) == 2, stage.logs)
        until(lambda: "'another'" in on.exact("active_queues"), stage.logs)
        return found

    seen = alike(asked)
    assert seen["prefetch"] == repr({"prefetch_count": 4})
    assert seen["failed"] == repr({"error": "LookupError('nothing here')"})


def test_a_restart_of_the_pool_loads_modules_and_loads_them_again(alike):
    def write(stage, answer):
        # A task that is registered stays what it is; what it finds in its module is new.
        task = "@app.task(name='plugged')\ndef plugged():\n    return ANSWER\n"
        (stage.folder / "pluggable.py").write_text(f"from controlled import app\nANSWER = {answer!r}\n{task}")

    def restarted(stage):
        worker = start(stage, app="controlled", conf={"worker_pool_restarts": True})
        before = answer(stage, "stats")["pool"]["processes"]
        write(stage, "one")
        found = {"unknown before": "plugged" in repr(answer(stage, "registered"))}
        found["imported"] = answer(stage, "pool_restart", modules=["pluggable"])
        found["known"] = "plugged" in repr(answer(stage, "registered"))
        until(lambda: set(answer(stage, "stats")["pool"]["processes"]).isdisjoint(before), stage.logs)
        found["first"] = stage.send("plugged").get(timeout=30)
        write(stage, "another")
        found["reloaded"] = answer(stage, "pool_restart", modules=["pluggable"], reload=True)
        until(lambda: stage.send("plugged").get(timeout=30) == "another", stage.logs)
        found["missing"] = answer(stage, "pool_restart", modules=["no_such_module"])
        found["works"] = stage.send("mark", 1).get(timeout=30)
        return found | {"status": worker.stop()}

    seen = alike(restarted)
    assert seen["imported"] == {"ok": "reload started"}
    assert (seen["first"], seen["known"], seen["status"]) == ("one", True, 0)


@pytest.mark.ours
@pytest.mark.parametrize("pool", ["threads", "solo"])
def test_a_pool_in_one_process_is_restarted_and_says_that_its_size_is_fixed(stage_on, kind, pool):
    """The original has no such methods in these pools."""
    stage = stage_on(kind)
    worker = start(stage, "-P", pool, app="controlled", concurrency=2, conf={"worker_pool_restarts": True})
    before = answer(stage, "stats")["pool"]["processes"]
    for command in ("pool_grow", "pool_shrink"):
        assert f"the {pool} pool has the size that it was started with" in answer(stage, command)["error"]
    assert answer(stage, "pool_restart") == {"ok": "reload started"}
    until(lambda: set(answer(stage, "stats")["pool"]["processes"]).isdisjoint(before), stage.logs)
    assert stage.send("mark", 1).get(timeout=30) == 1
    assert worker.stop() == 0
