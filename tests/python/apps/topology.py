"""Queues, exchanges and routes of every sort, put on an app: the worker's and, in the test, the producer's."""

import re

from kombu import Exchange, Queue, binding
from kombu.common import Broadcast


def queues(app):
    """One queue of each sort that users declare."""
    topic, headers = Exchange("news", type="topic"), Exchange("marked", type="headers")
    app.conf.update(
        task_default_queue="main",
        task_queue_max_priority=4,
        task_queues=[
            Queue("main"),
            Queue("ranked", Exchange("ranked"), routing_key="ranked", max_priority=9),
            Queue("sport", topic, routing_key="news.sport.#"),
            Queue("all_news", topic, routing_key="news.#", queue_arguments={"x-queue-mode": "lazy"}),
            Queue("marked", headers, routing_key="", binding_arguments={"x-match": "all", "color": "red"}),
            Queue("every", Exchange("every", type="fanout"), routing_key=""),
            Queue("twice", bindings=[binding(topic, routing_key="twice.*"), binding(Exchange("pair"), "pair")]),
            Queue("short", Exchange("short"), routing_key="short", expires=600, message_ttl=60, max_length=5,
                  max_length_bytes=5000),
            Queue("first", Exchange("first", durable=False), routing_key="first", durable=False,
                  consumer_arguments={"x-priority": 7}),
            Queue("given", Exchange("given"), routing_key="given", no_declare=True),
            Broadcast("everybody"),
        ],
    )  # fmt: skip


def some_queues(app):
    """What every broker has."""
    app.conf.update(
        task_default_queue="main",
        task_queues=[
            Queue("main"),
            Queue("a", Exchange("a"), routing_key="a"),
            Queue("b", Exchange("b", type="topic"), routing_key="b.#"),
            Queue("c", Exchange("c"), routing_key="key-of-c"),
            Broadcast("everybody"),
        ],
    )


def route_function(name, args, kwargs, options, task=None, **more):
    return {"queue": "c", "priority": 5} if name == "by.function" else None


class RouterClass:
    def route_for_task(self, task, args=None, kwargs=None):
        return {"exchange": "b", "exchange_type": "topic", "routing_key": "b.x"} if task == "by.class" else None


#: A route in each form, and the task that it is for.
ROUTES = {
    "by.default": None,
    "by.name": {"by.name": {"queue": "a"}},
    "by.text": {"by.text": "a"},
    "by.glob.one": {"by.glob.*": {"queue": "b", "routing_key": "b.glob"}},
    "by.regex.1": (re.compile(r"by\.regex\.\d"), {"queue": "c"}),
    "by.list": [("by.list", {"queue": "a", "priority": 2}), ("*.never", {"queue": "b"})],
    "by.function": route_function,
    "by.path": "topology.route_path",
    "by.class": RouterClass(),
    "by.missing": {"by.missing": {"queue": "made"}},
    "by.broadcast": {"by.broadcast": {"queue": "everybody"}},
}


def route_path(name, args, kwargs, options, task=None, **more):
    return {"queue": "a"} if name == "by.path" else None


def routes(app):
    some_queues(app)
    app.conf.task_routes = [[route] if isinstance(route, tuple) else route for route in ROUTES.values() if route]


def priorities(app):
    app.conf.update(
        task_default_queue="main",
        task_queues=[Queue("main", max_priority=9)],
        task_inherit_parent_priority=True,
    )


def selectable(app):
    """Some to be named with -Q, one with arguments of its own."""
    app.conf.update(
        task_default_queue="main",
        task_queues=[Queue("main"), Queue("ranked", Exchange("ranks"), routing_key="rank", max_priority=9)],
    )


def delayed(app):
    """Quorum queues; a direct exchange cannot delay."""
    quorum = {"x-queue-type": "quorum"}
    app.conf.update(
        task_default_queue="jobs",
        task_default_exchange="jobs",
        task_default_exchange_type="topic",
        task_default_routing_key="jobs",
        task_queues=[
            Queue("jobs", Exchange("jobs", type="topic"), routing_key="jobs", queue_arguments=quorum),
            Queue("plain", Exchange("plain"), routing_key="plain"),
            Queue("elsewhere", Exchange("elsewhere", type="topic"), routing_key="elsewhere.#"),
            Broadcast("everybody"),
        ],
    )


def nothing(app):
    """As the settings are."""
