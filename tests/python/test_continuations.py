"""What the child hands over for a continuation, beside what the installed Celery sends for it; and when it does not."""

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
from celeriac import continuations, ladder
from celeriac._core import Target
from celery import VERSION, Celery, Task, signals, signature
from celery.app.routes import Router

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "messages"))

import record_signatures as recorded

APP = recorded.make_app()


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in recorded.cases(APP)])
def test_the_message_is_the_one_that_celery_sends(case):
    target = Target(json.dumps(case["target"]))
    call = [case[name] for name in ("id", "reply_to", "args", "kwargs", "options")]
    headers, properties, body = target.message(*call, as_tuple=case["tuple"])
    headers = json.loads(headers)
    if VERSION < (5, 7) and case["name"] == "a long text":
        # Shown only, and cut in another place.
        headers.update({name: case["headers"][name] for name in ("argsrepr", "kwargsrepr")})
    assert headers == case["headers"]
    assert list(headers) == list(case["headers"])
    assert json.loads(properties) == case["properties"]
    assert body == case["body"]


@pytest.mark.parametrize("case", [pytest.param(case, id=case[0]) for case in recorded.fallbacks(APP)])
def test_celery_sends_what_might_come_out_otherwise(case):
    _, step, args, options = case
    assert recorded.handed_over(APP, step, args, options) is None


def test_a_call_with_wrong_arguments_fails_as_with_celery():
    step = APP.signature("tasks.add", args=(1, 2)).set(**recorded.FROZEN)
    with pytest.raises(TypeError, match="positional arguments"):
        recorded.handed_over(APP, step, [3], {})


def test_a_queue_that_the_worker_consumes_is_not_declared_again():
    app = recorded.make_app()
    app.amqp.queues.select(["q"])
    assert continuations.target(app, "tasks.add", {})["declare"] is None
    assert continuations.target(app, "tasks.routed", {})["declare"]["name"] == "routed"


def test_to_user_code_a_step_is_the_mapping_that_it_was_made_of():
    plain = json.loads(json.dumps(APP.signature("tasks.add", args=(2,))))
    lane = continuations.Continuations(APP, recorded.Pipe(), None, continuations.backends.Job())
    embed = {"chain": [plain, plain], "callbacks": [plain]}
    lane.prepare(embed)
    for step in (embed["chain"][1], embed["callbacks"][0]):
        assert isinstance(step, continuations.Step)
        assert (step == plain, repr(step), json.dumps(step)) == (True, repr(plain), json.dumps(plain))
        for other in (copy.deepcopy(step), copy.copy(step), pickle.loads(pickle.dumps(step))):
            assert (type(other), other) == (dict, plain)
        # Whatever is made of it is sent by Celery.
        assert type(signature(step, app=APP)) is continuations.Signature
    assert type(embed["chain"][0]) is dict


def test_several_callbacks_and_other_kinds_of_signatures_are_left_alone():
    plain = json.loads(json.dumps(APP.signature("tasks.add", args=(2,))))
    lane = continuations.Continuations(APP, recorded.Pipe(), None, continuations.backends.Job())
    for embed in ({"callbacks": [plain, plain]}, {"chain": [{**plain, "subtask_type": "group"}]}, {"chain": [{}]}):
        before = copy.deepcopy(embed)
        lane.prepare(embed)
        assert embed == before
        assert not any(isinstance(one, continuations.Step) for ones in embed.values() for one in ones)


# ---- the ladder


def reasons(app):
    return " ".join(continuations.obstacles(app, broker_native=True, results_native=True))


def made(**conf):
    app = Celery("plain", broker="memory://", set_as_current=False)
    app.conf.update(conf)
    return app


class Overriding(Celery):
    def send_task(self, *args, **kwargs):
        return super().send_task(*args, **kwargs)


def test_a_plain_app_has_native_continuations(monkeypatch):
    monkeypatch.delenv(continuations.SWITCH, raising=False)
    app = made(task_routes={"a.*": "q"})
    assert continuations.decide(app, broker_native=True, results_native=True).native
    monkeypatch.setenv(continuations.SWITCH, "python")
    rung = continuations.decide(app, broker_native=True, results_native=True)
    assert (rung.native, rung.reasons) == (False, [f"{continuations.SWITCH}=python"])


@pytest.mark.parametrize(
    ("conf", "reason"),
    [
        ({"task_serializer": "pickle"}, "task_serializer is pickle"),
        ({"task_compression": "gzip"}, "task_compression is gzip"),
        ({"task_protocol": 1}, "task_protocol is 1"),
        ({"task_send_sent_event": True}, "task_send_sent_event"),
        ({"task_always_eager": True}, "task_always_eager"),
        ({"broker_write_url": "redis://other"}, "broker_write_url"),
        ({"task_routes": (lambda *args, **kwargs: None,)}, "task_routes has a function"),
    ],
)
def test_settings_that_ask_for_celerys_own_code(conf, reason):
    assert reason in reasons(made(**conf))


def test_an_app_that_sends_tasks_itself_goes_on_doing_so():
    assert "send_task" in reasons(Overriding("own", broker="memory://", set_as_current=False))


@pytest.mark.parametrize("name", ["before_task_publish", "after_task_publish"])
def test_receivers_of_the_signals_around_publishing_see_each_message(name):
    def receiver(**kwargs):
        pass

    signal = getattr(signals, name)
    signal.connect(receiver)
    try:
        assert f"{name} has a receiver" in reasons(made())
        assert continuations.watched()
    finally:
        signal.disconnect(receiver)
    assert not continuations.watched()


@pytest.mark.parametrize(
    ("owner", "name"), [(Task, "apply_async"), (Router, "route"), (continuations.messaging.Producer, "publish")]
)
def test_functions_that_an_integration_has_wrapped_go_on_being_called(monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: None)
    assert f"{owner.__name__}.{name} was replaced" in reasons(made())


def test_tasks_of_a_class_with_its_own_way_of_sending_are_sent_by_celery():
    class Own(Task):
        def apply_async(self, *args, **kwargs):
            return super().apply_async(*args, **kwargs)

    def nothing():
        pass

    app = made()
    for name, options in {"own": {"base": Own}, "pickled": {"serializer": "pickle"}, "plain": {}}.items():
        app.task(nothing, name=name, shared=False, **options)
    app.finalize()
    assert "apply_async" in continuations.of_task(app.tasks["own"])[0]
    assert continuations.of_task(app.tasks["pickled"]) == ["serializer is 'pickle'"]
    assert continuations.of_task(app.tasks["plain"]) == []
    with pytest.raises(LookupError, match="pickle"):
        continuations.target(app, "pickled", {})


def test_the_doctor_shows_the_rung(monkeypatch):
    monkeypatch.delenv(continuations.SWITCH, raising=False)
    app = made(broker_url="redis://localhost:1")
    assert ladder.continuations(app).rung == "native"
    app = made(broker_url="memory://")
    assert "not spoken natively" in ladder.continuations(app).reasons[0]
