"""Workflows of every shape: what runs, with which arguments and family, what is stored, which errbacks are called.

All workflows of a table are sent at once; when nothing is left in the broker, what they left behind is compared.
"""

import os
from functools import partial

import pytest
from celery import chain, chord, group
from celery.canvas import StampingVisitor, chunks, xmap, xstarmap
from celery.result import GroupResult
from support.lines import plain

# Who sends what comes after a task: set CELERIAC_TEST_CONTINUATIONS to try the other rung, or both with a comma.
RUNGS = os.environ.get("CELERIAC_TEST_CONTINUATIONS", "python,native").split(",")


class Kit:
    """Makes signatures of one workflow."""

    def __init__(self, stage, name):
        self.stage, self.name = stage, name

    def __call__(self, op, *args, **options):
        return self.stage.app.signature("workflows.task", args, {"op": op, "w": self.name}, **options)

    def si(self, op, *args, **options):
        return self(op, *args, immutable=True, **options)

    def add(self, *args):
        return self("add", *args)

    def adds(self, count=3):
        return [self.add(number, 1) for number in range(count)]

    def chain(self, *parts):
        return chain(*parts, app=self.stage.app)

    def group(self, *parts):
        return group(parts, app=self.stage.app)

    def chord(self, header, body):
        return chord(header, body, app=self.stage.app)

    def errback(self, kind="errback", **options):
        return self.stage.app.signature(f"workflows.{kind}", kwargs={"w": self.name}, **options)

    def task(self, name):
        return self.stage.app.signature(f"workflows.{name}")


class Stamps(StampingVisitor):
    def on_signature(self, sig, **headers):
        return {"sign": f"of {sig.kwargs.get('op')}", "stamped_headers": ["sign"]}

    def on_group_start(self, sig, **headers):
        return {"group_sign": "grouped", "stamped_headers": ["group_sign"]}

    def on_errback(self, errback, **headers):
        return {"errback_sign": "erred", "stamped_headers": ["errback_sign"]}


def stamped(signature):
    signature.stamp(Stamps())
    return signature


def linked(signature, *callbacks):
    for callback in callbacks:
        signature.link(callback)
    return signature


def on_error(signature, *errbacks):
    for errback in errbacks:
        signature.link_error(errback)
    return signature


CHAINS = {
    "chain": lambda k: k.chain(k.add(1, 1), k.add(2), k.add(3)),
    "of one": lambda k: k.chain(k.add(1, 1)),
    "immutable": lambda k: k.chain(k.add(1, 1), k.si("add", 5), k.add(1)),
    "of nothing returned": lambda k: k.chain(k("none"), k("echo")),
    "nested": lambda k: k.chain(k.add(1, 1), k.chain(k.add(2), k.chain(k.add(3), k.add(4)))),
    "failing first": lambda k: k.chain(k("fail"), k.add(1), k.add(2)),
    "failing last": lambda k: k.chain(k.add(1), k.si("fail")),
    "failing with errback": lambda k: on_error(k.chain(k.add(1), k.si("fail"), k.add(2), k.add(3)), k.errback()),
    "failing with errbacks": lambda k: on_error(
        k.chain(k.add(1), on_error(k.si("fail"), k.errback()), k.add(2)), k.errback("old_errback"), k.errback()
    ),
    "ignored": lambda k: k.chain(k.add(1), k.si("ignore"), k.add(2)),
    "rejected": lambda k: on_error(k.chain(k.add(1), k.si("reject"), k.add(2)), k.errback()),
    "retried": lambda k: k.chain(k.add(1), k("retry", 1), k.add(2)),
    "retried in vain": lambda k: on_error(k.chain(k.add(1), k.si("retry_in_vain"), k.add(2)), k.errback()),
    "unencodable": lambda k: on_error(k.chain(k.add(1), k.si("unencodable"), k.add(2)), k.errback()),
    "expired": lambda k: k.chain(k.add(1), k.add(1).set(expires=-1), k.add(2)),
    "with priorities": lambda k: k.chain(k.add(1).set(priority=3), k.add(1).set(priority=6), k.add(2)),
    "with countdown": lambda k: k.chain(k.add(1), k.add(1).set(countdown=0.2), k.add(2)),
    "to group": lambda k: k.chain(k.add(1, 1), k.group(*k.adds())),
    "to group to task": lambda k: k.chain(k.add(1, 1), k.group(*k.adds()), k.add(1)),
    "group to group": lambda k: k.chain(k.group(*k.adds(2)), k.group(*k.adds(2))),
    "group to task": lambda k: k.chain(k.group(*k.adds(2)), k("echo"), k("echo")),
    "group, task, group, task": lambda k: k.chain(k.group(*k.adds(2)), k.add(), k.group(*k.adds(2)), k.add()),
    "of chords": lambda k: k.chain(k.chord(k.adds(2), k.add()), k.chord(k.adds(2), k.add())),
    "linked": lambda k: linked(k.chain(k.add(1), k.add(2)), k("echo", "after")),
    "ignoring results": lambda k: k.chain(k.add(1).set(ignore_result=True), k.add(2)),
}

GROUPS = {
    "group": lambda k: k.group(*k.adds()),
    "of one": lambda k: k.group(k.add(1)),
    "empty": lambda k: k.group(),
    "of groups": lambda k: k.group(k.group(*k.adds(2)), k.add(1)),
    "of chains": lambda k: k.group(k.chain(k.add(1), k.add(2)), k.chain(k.add(3), k.add(4))),
    "failing": lambda k: on_error(k.group(k.add(1), k("fail"), k("ignore")), k.errback()),
    "linked": lambda k: linked(k.group(k.add(1), k.add(2)), k("echo", "after", immutable=True)),
    "with retry": lambda k: k.group(k.add(1), k("retry", 2)),
    "map": lambda k: xmap(k.task("one"), [1, 2, 3], app=k.stage.app),
    "starmap": lambda k: xstarmap(k.task("two"), [(1, 2), (3, 4)], app=k.stage.app),
    "chunks": lambda k: chunks(k.task("two"), [(1, 2), (3, 4), (5, 6)], 2, app=k.stage.app),
    "sends a chord": lambda k: k("sends_chord"),
}  # fmt: skip

LINKS = {
    "link": lambda k: linked(k.add(1, 1), k("echo", "a")),
    "links": lambda k: linked(k.add(1, 1), k("echo", "a"), k.si("echo", "b"), k("fail")),
    "link to chain": lambda k: linked(k.add(1, 1), k.chain(k("echo", "a"), k("echo", "b"))),
    "link to group": lambda k: linked(k.add(1, 1), k.group(k("echo", "a"), k("echo", "b"))),
    "link and group": lambda k: linked(k.add(1, 1), k.group(k("echo", "a")), k("echo", "b"), k("echo", "c")),
    "link to chord": lambda k: linked(k.add(1, 1), k.chord([k("echo", "a"), k("echo", "b")], k("echo", "c"))),
    "link of a link": lambda k: linked(k.add(1, 1), linked(k("echo", "a"), k("echo", "b"))),
    "link of a failure": lambda k: linked(k("fail"), k("echo", "never")),
    "link after retry": lambda k: linked(k("retry", 1), k("echo", "once")),
    "link of an ignored one": lambda k: linked(k("ignore"), k("echo", "never")),
    "errback": lambda k: on_error(k("fail"), k.errback()),
    "old errback": lambda k: on_error(k("fail"), k.errback("old_errback")),
    "immutable errback": lambda k: on_error(k("fail"), k.si("echo", "an errback")),
    "errbacks": lambda k: on_error(
        k("fail"), k.errback(), k.errback("old_errback"), k.errback("failing_errback"), k.si("echo", "last")
    ),
    "errback chain": lambda k: on_error(k("fail"), k.chain(k.si("echo", "one"), k("echo", "two"))),
    "errback group": lambda k: on_error(k("fail"), k.group(k.si("echo", "one"), k.si("echo", "two"))),
    "unknown errback": lambda k: on_error(k("fail"), k.stage.app.signature("no.such.task")),
    "errback of a retry": lambda k: on_error(k("retry_in_vain"), k.errback()),
    "errback of a rejection": lambda k: on_error(k("reject"), k.errback()),
    "errback of an expired one": lambda k: on_error(k.add(1).set(expires=-1), k.errback()),
}

CHORDS = {
    "chord": lambda k: k.chord(k.adds(), k.add(100)),
    "of one": lambda k: k.chord(k.adds(1), k.add(100)),
    "empty": lambda k: k.chord([], k("echo", "body")),
    "immutable body": lambda k: k.chord(k.adds(), k.si("echo", "body")),
    "body is a chain": lambda k: k.chord(k.adds(2), k.chain(k.add(10), k.add(20))),
    "body is a group": lambda k: k.chord(k.adds(2), k.group(k.add(10), k.add(20))),
    "body is a chord": lambda k: k.chord(k.adds(2), k.chord([k.add(10), k.add(20)], k.add(1))),
    "nested": lambda k: k.chord([k.chord(k.adds(2), k.add(5)), k.add(1)], k.add(100)),
    "of chains": lambda k: k.chord([k.chain(k.add(1), k.add(2)), k.chain(k.add(3), k.add(4))], k("echo")),
    "of groups": lambda k: k.chord([k.group(*k.adds(2)), k.add(1)], k("echo")),
    "retried member": lambda k: k.chord([k("retry", 1), k.add(2)], k("echo")),
    "failing member": lambda k: k.chord([k("fail"), k.add(2)], on_error(k("echo"), k.errback())),
    "failing member, old errback": lambda k: k.chord(
        [k("fail"), k.add(2)], on_error(k("echo"), k.errback("old_errback"))
    ),
    "failing members": lambda k: k.chord([k("fail"), k("fail")], on_error(k("echo"), k.errback())),
    "failing chain in header": lambda k: k.chord(
        [k.chain(k("fail"), k.add(1)), k.add(2)], on_error(k("echo"), k.errback())
    ),
    "failing header of a chain": lambda k: k.chord(
        [k("fail"), k.add(1)], k.chain(k("echo"), on_error(k.add(2), k.errback()))
    ),
    "failing header of a group": lambda k: k.chord(
        [k("fail"), k.add(1)], k.group(on_error(k("echo"), k.errback()), k.add(2))
    ),
    "failing body": lambda k: k.chord(k.adds(2), on_error(k.si("fail"), k.errback())),
    "errback of the chord": lambda k: on_error(k.chord([k("fail"), k.add(2)], k("echo")), k.errback()),
    "rejected member": lambda k: k.chord([k("reject"), k.add(2)], on_error(k("echo"), k.errback())),
    "unencodable member": lambda k: k.chord([k("unencodable"), k.add(2)], on_error(k("echo"), k.errback())),
    "member retried in vain": lambda k: k.chord([k("retry_in_vain"), k.add(2)], on_error(k("echo"), k.errback())),
    "expired member": lambda k: k.chord([k.add(1).set(expires=-1), k.add(2)], on_error(k("echo"), k.errback())),
    "linked": lambda k: linked(k.chord(k.adds(2), k.add(1)), k("echo", "after")),
    "with options": lambda k: k.chord(k.adds(2), k("echo").set(priority=6, headers={"x": "1"}, countdown=0.2)),
    "replaced member": lambda k: k.chord([k("replace", "task", 1), k.add(2)], k("echo")),
    "replaced by chain": lambda k: k.chord([k("replace", "chain", 1), k.add(2)], k("echo")),
    "replaced by group": lambda k: k.chord([k("replace", "group", 1), k.add(2)], k("echo")),
    "replaced by chord": lambda k: k.chord([k("replace", "chord", 1), k.add(2)], k("echo")),
    "replaced body": lambda k: k.chord(k.adds(2), k.si("replace", "chain", 1)),
}
# These never end where somebody asks again and again whether the header is ready.
CHORDS_OF_REDIS = {
    "ignoring member results": lambda k: k.chord(
        [k.add(1), k.add(2).set(ignore_result=True)], k("echo").set(ignore_result=True)
    ),
    "ignored member": lambda k: k.chord([k("ignore"), k.add(2)], on_error(k("echo"), k.errback())),
    "add_to_chord": lambda k: k.chord([k("add_to_chord", 1), k.add(2)], k("echo")),
}


def by(how, k):
    return k("replace", how, 1)


REPLACED = {
    **{
        f"by {how}": partial(by, how)
        for how in ("task", "chain", "group", "one", "nothing", "chord", "linked", "failing", "again", "empty_chain")
    },
    "in a chain": lambda k: k.chain(k.add(1), k("replace", "task", 1), k.add(2)),
    "in a chain by a chain": lambda k: k.chain(k.add(1), k("replace", "chain", 1), k.add(2)),
    "in a chain by a group": lambda k: k.chain(k.add(1), k("replace", "group", 1), k.add(2)),
    "in a chain by a chord": lambda k: k.chain(k.add(1), k("replace", "chord", 1), k.add(2)),
    "in a chain by a failure": lambda k: on_error(k.chain(k.add(1), k("replace", "failing", 1), k.add(2)), k.errback()),
    "with links": lambda k: on_error(
        linked(k("replace", "chain", 1), k("echo", "linked")), k.errback()
    ),
    "with errback": lambda k: on_error(k("replace", "failing", 1), k.errback(), k.errback("old_errback")),
    "in a group": lambda k: k.group(k("replace", "chain", 1), k.add(2)),
}  # fmt: skip

STAMPED = {
    "task": lambda k: stamped(k.add(1)),
    "chain": lambda k: stamped(k.chain(k.add(1), k.add(2))),
    "group": lambda k: stamped(k.group(*k.adds(2))),
    "chord": lambda k: stamped(k.chord(k.adds(2), k("echo"))),
    "link": lambda k: stamped(linked(k.add(1), k("echo"))),
    "errback": lambda k: stamped(on_error(k("fail"), k.si("echo", "an errback"))),
    "replaced": lambda k: stamped(k("replace", "chain", 1)),
    "retried": lambda k: stamped(k("retry", 1)),
    "linked by option": lambda k: linked(stamped(k.add(1)), k("echo")),
}


TABLES = {"chains": CHAINS, "groups": GROUPS, "links": LINKS, "replaced": REPLACED, "stamped": STAMPED}


def tree(result):
    """States and results of all that a workflow promised."""
    if isinstance(result, GroupResult):
        return {"group": [tree(one) for one in result.results], "parent": result.parent and tree(result.parent)}
    document = result._get_task_meta()
    return {
        "state": document["status"],
        "result": plain(repr(document["result"])),
        "error": plain(document.get("traceback") or "").strip().splitlines()[-1:],
        "children": len(document.get("children") or []),
        "parent": result.parent and tree(result.parent),
    }  # fmt: skip


def told(stage, name):
    """What ran for a workflow, in an order of its own: ids are replaced by what they stand for."""
    lines = stage.journal(w=name)
    runs = {line["id"]: f"{line['op']} {line['args']}" for line in lines if line["event"] == "ran"}
    found = []
    for line in lines:
        line = {key: value for key, value in line.items() if key not in ("pid", "time", "w")}
        for key in ("id", "parent", "root"):
            if key in line:
                line[key] = runs.get(line[key], line[key] and "an id")
        if "group" in line:
            line["group"] = line["group"] is not None
        found.append({key: plain(repr(value)) for key, value in line.items()})
    return sorted(found, key=repr)


def play(table, rung):
    def scenario(stage):
        # Before there is a worker: what its tasks send comes after all of it, however quick it is. And one child: the
        # last member of a chord to end is the parent of its body.
        sent = {name: build(Kit(stage, name)).apply_async() for name, build in table.items()}
        worker = stage.worker(app="semantics", env={"CELERIAC_CONTINUATIONS": rung})
        # Late acks: what is not settled may still send something.
        stage.wait_empty(timeout=60)
        found = {name: {"tree": tree(result), "ran": told(stage, name)} for name, result in sent.items()}
        found["errors"] = sorted(
            plain(line.split("] ", 1)[1]).replace("ForkPoolWorker", "")
            for line in worker.log.splitlines()
            if "ERROR/" in line or "CRITICAL/" in line
        )
        return found

    return scenario


CONF = {
    "task_acks_late": True,
    "result_chord_retry_interval": 0.2,
    "broker_transport_options": {"priority_steps": [0, 3, 6, 9]},
}


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("table", TABLES)
def test_workflows_run_alike(alike, table, rung):
    alike(play(TABLES[table], rung), **CONF)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("strict", [False, True], ids=["", "allow_error_cb"])
def test_chords_run_alike(alike, rung, strict):
    conf = CONF | {"task_allow_error_cb_on_chord_header": strict, "task_inherit_parent_priority": strict}
    alike(play(CHORDS | CHORDS_OF_REDIS, rung), **conf)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("backend", ["sqlite", "memcached"])
def test_chords_run_alike_where_the_backend_does_not_count(alike, rung, backend):
    if backend == "memcached":
        some = ("chord", "of one", "failing member", "retried member", "body is a chain")
        table = {name: CHORDS[name] for name in some}
    else:
        table = CHORDS
    alike(play(table, rung), backend=backend, **CONF)
