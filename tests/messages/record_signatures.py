"""Records what Celery sends for a signature that continues a task, and what the child hands over for it.

    python tests/messages/record_signatures.py > tests/messages/signatures.json

Each case holds the target and the call as `celeriac.continuations` gives them to Rust, and headers, properties and
body of the message that the installed Celery sends for the same signature. `tests/python/test_continuations.py` has
the two compared for whichever Celery it runs with.
"""

import json
import os
import sys
from unittest import mock

from celeriac import backends, continuations
from celery import Celery, chain, group
from kombu import Exchange, Queue
from kombu.utils.json import dumps

NAMES = ("job", "target", "id", "reply_to", "args", "kwargs", "options")


def make_app():
    app = Celery("tasks", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.update(
        task_default_queue="q",
        task_queues=[
            Queue("q"),
            Queue("routed", Exchange("routed"), routing_key="r"),
            Queue("topical", Exchange("topics", type="topic"), routing_key="a.#"),
        ],
        task_routes={"tasks.routed": {"queue": "routed"}, "tasks.topical": {"queue": "topical", "routing_key": "a.b"}},
    )

    @app.task(shared=False, name="tasks.add")
    def add(x, y=0):
        return x + y

    @app.task(shared=False, name="tasks.limited", time_limit=30, soft_time_limit=20, priority=3, ignore_result=True)
    def limited(*args, **kwargs):
        return None

    @app.task(shared=False, name="tasks.routed")
    def routed(*args):
        return None

    @app.task(shared=False, name="tasks.topical")
    def topical(*args):
        return None

    app.finalize()
    return app


#: The parent as the tracer speaks of it.
PARENT = {"parent_id": "parent", "root_id": "root"}
#: As a signature arrives in the body of the parent's message.
FROZEN = {"task_id": "t1", "reply_to": "oid-1"}


def signatures(app):
    """Name, signature, what the tracer says to `apply_async`; each of them is native."""
    text = 'it\'s "quoted" \\ \u00fc \u20ac \U0001f600\n'

    def add(*args, **kwargs):
        return app.signature("tasks.add", args=args, kwargs=kwargs).set(**FROZEN)

    yield "step", add(2), [1], {"chain": []}
    yield "step with a rest", add(2), [1], {"chain": [add(3).set(task_id="t3"), add(4).set(task_id="t2")]}
    yield "callback", add(2), [1], {}
    yield "no partial arguments", add(), [1], {}
    yield "keywords", add(y=[1, {"a": None}]), [1], {}
    yield "immutable", add(5, 6).set(immutable=True), [1], {}
    yield "immutable without arguments", app.signature("tasks.limited", immutable=True).set(**FROZEN), [1], {}
    yield "None is returned", add(2), [None], {}
    yield "text", app.signature("tasks.limited", args=(text,)).set(**FROZEN), [text], {}
    yield "a deep value", app.signature("tasks.limited").set(**FROZEN), [[[[["deep"]]], {"a": {"b": {"c": 1}}}]], {}
    yield "a long value", app.signature("tasks.limited").set(**FROZEN), [list(range(3000))], {}
    yield "a long text", app.signature("tasks.limited", kwargs={"a": "x" * 3000}).set(**FROZEN), ["y " * 3000], {}
    yield (
        "numbers",
        app.signature("tasks.limited").set(**FROZEN),
        [[1, -2, 3.0, 0.1, 1e16, 1.5e-7, 2**70, True]],
        {},
    )
    yield "not a number", app.signature("tasks.limited").set(**FROZEN), [[float("nan"), float("-inf")]], {}
    yield "priority of the parent", add(2), [1], {"priority": 6}
    yield "priority of its own", add(2).set(priority=4), [1], {}
    yield "priority of the task", app.signature("tasks.limited").set(**FROZEN), [1], {}
    yield "limits of its own", app.signature("tasks.limited").set(time_limit=9, **FROZEN), [1], {}
    yield "no limit", app.signature("tasks.limited").set(soft_time_limit=None, **FROZEN), [1], {}
    yield "result wanted", app.signature("tasks.limited").set(ignore_result=False, **FROZEN), [1], {}
    yield "result ignored", add(2).set(ignore_result=True), [1], {}
    yield "link and link_error", add(2).set(link=[add(3)], link_error=[add(4), add(5)]), [1], {}
    yield "one link", add(2).set(link=dict(add(3))), [1], {}
    yield "member of a group", add(2).set(group_id="g", group_index=3, chord=dict(add(9))), [1], {}
    yield "member of a group in a group", add(2).set(group_id="g"), [1], {"group_id": "other"}
    yield "stamps", add(2).set(stamped_headers=["a", "b"], a=["x"], b={"c": 1}), [1], {}
    yield "stamped with nothing", add(2).set(stamped_headers=[]), [1], {}
    yield "headers", add(2).set(headers={"x-tenant": "a", "lang": "rs"}), [1], {}
    yield "shadow", add(2).set(shadow="other name"), [1], {}
    yield "replacing", add(2).set(replaced_task_nesting=2), [1], {}
    yield "routed by name", app.signature("tasks.routed").set(**FROZEN), [1], {}
    yield "routed by name to a topic", app.signature("tasks.topical").set(**FROZEN), [1], {}
    yield "to a queue", add(2).set(queue="routed"), [1], {}
    yield "to a queue that nobody has declared", add(2).set(queue="made up"), [1], {}
    yield "to a key", add(2).set(queue="topical", routing_key="a.c"), [1], {}
    yield "to a task of others", app.signature("others.task", args=(1,)).set(**FROZEN), [1], {}
    yield "to a task of others, ignored", app.signature("others.task").set(ignore_result=True, **FROZEN), [1], {}


def fallbacks(app):
    """Signatures that Celery has to send."""

    def add(*args):
        return app.signature("tasks.add", args=args).set(**FROZEN)

    yield "a tuple is shown with other brackets", add(2), [(1,)], {}
    yield "a set cannot be told from a list", app.signature("tasks.limited").set(**FROZEN), [[{1}]], {}
    yield "keys that are no text", add(2), [{1: 2}], {}
    yield "bytes", add(2), [b"1"], {}
    yield "half a character", app.signature("tasks.limited").set(**FROZEN), ["\ud800"], {}
    yield "countdown", add(2).set(countdown=10), [1], {}
    yield "expires", add(2).set(expires=10), [1], {}
    yield "serializer", add(2).set(serializer="pickle"), [1], {}
    yield "compression", add(2).set(compression="gzip"), [1], {}
    yield "a header that is no JSON", add(2).set(headers={"a": float("nan")}), [1], {}
    yield "a group", group(add(2), add(3), app=app), [1], {}
    yield "a chain", chain(add(2), add(3), app=app), [1], {}


class Pipe:
    """Notes what is handed over."""

    def __init__(self):
        self.pid = os.getpid()
        self.calls = []

    def go_on(self, *args, as_tuple, hold, wait):
        # Says what it cannot do as the real one does.
        args[1].message(*args[2:], as_tuple=as_tuple)
        self.calls.append(dict(zip(NAMES, args, strict=True), tuple=as_tuple))


def handed_over(app, signature, args, options):
    """What the child gives to Rust, or None where it leaves the signature to Celery."""
    job = backends.Job()
    job.number = 1
    pipe = Pipe()
    lane = continuations.Continuations(app, pipe, None, job)
    embed = {"chain": [json.loads(dumps(signature))]}
    lane.prepare(embed)
    step = embed["chain"][0]
    if not isinstance(step, continuations.Step):
        return None
    with mock.patch.object(continuations.Signature, "apply_async", return_value=None):
        step.apply_async(args, **PARENT, **options)
    return pipe.calls[0] if pipe.calls else None


def sent(app, signature, args, options):
    """The message that Celery sends."""
    caught = {}

    class Probe(continuations._Probe):
        def _publish(self, *args, **kwargs):
            super()._publish(*args, **kwargs)
            caught.update(self.caught)

    arrived = continuations.Signature.from_dict(json.loads(dumps(signature)), app=app)
    arrived.apply_async(args, producer=Probe(app), retry=False, **PARENT, **options)
    properties = dict(caught["properties"])
    if caught["priority"] is not None:
        properties["priority"] = caught["priority"]
    body = caught["body"]
    return dict(caught["headers"]), properties, body if isinstance(body, str) else body.decode()


def cases(app):
    for name, signature, args, options in signatures(app):
        call = handed_over(app, signature, args, options)
        assert call is not None, f"{name}: not native"
        headers, properties, body = sent(app, signature, args, options)
        destination = {key: signature.options[key] for key in continuations.ROUTING if key in signature.options}
        target = continuations.target(app, signature["task"], destination)
        del call["job"], call["target"]
        yield {"name": name, "target": target, **call, "headers": headers, "properties": properties, "body": body}


if __name__ == "__main__":
    with mock.patch("celery.app.amqp.anon_nodename", return_value="gen1@host"):
        json.dump(list(cases(make_app())), sys.stdout, indent=1)
    print()
