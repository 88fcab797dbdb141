"""The configuration that the core is given, from apps of three kinds, field by field."""

import json
import platform
import sys

import celery
import pytest
from celeriac import config
from support.command import finish, python

BUILD = """
import json, sys
from celery.app.utils import find_app
from celeriac import config, doctor
app = find_app(sys.argv[1])
worker = app.subclass_with_self(doctor.Patient)(hostname="w@h", loglevel="ERROR", **json.loads(sys.argv[2]))
print("CONFIG " + json.dumps(config.build(worker)))
"""


def config_of(app, **options):
    for line in python(BUILD, app, json.dumps(options)).splitlines():
        if line.startswith("CONFIG "):
            return json.loads(line.removeprefix("CONFIG "))
    raise AssertionError("no configuration")


@pytest.fixture(scope="module")
def plain():
    return config_of("plain_config", concurrency=3)


@pytest.fixture(scope="module")
def rich():
    return config_of("rich_config", concurrency=4, queues="video,audio,both,unread", exclude_queues="unread")


@pytest.fixture(scope="module")
def odd():
    return config_of("odd_config", concurrency=8, time_limit=5.5)


NAMED_EXCHANGE = {
    "name": "celery", "type": "direct", "durable": True, "auto_delete": False,
    "passive": False, "no_declare": False, "arguments": {},
}  # fmt: skip
POLICY = {
    "acks_late": False, "acks_on_failure": True, "acks_on_timeout": True, "reject_on_worker_lost": False,
    "retry_on_worker_lost": False, "time_limit": None, "soft_time_limit": None, "rate_limit": None,
    "rate_limit_text": None, "ignore_result": False, "send_events": True, "hosting": "native",
    "asynchronous": False,
}  # fmt: skip


def test_the_defaults_are_celery_s(plain):
    tasks = plain.pop("tasks")
    assert tasks["plain_config.add"] == POLICY
    assert tasks["celery.chord_unlock"]["ignore_result"] is True
    control = plain.pop("control")
    assert control["exchange"] == "celery"
    assert (control["queue_ttl"], control["queue_expires"]) == (300.0, 10.0)
    assert control["serializer"] == "json"
    # What `inspect active_queues` shows is kombu's own.
    assert plain["queues"][0].pop("shown")["exchange"]["name"] == "celery"
    cluster = plain.pop("cluster")
    heard = cluster["gossip"]
    assert cluster["mingle"] is True
    assert (heard["name"], heard["bindings"][0]["routing_key"]) == ("celeryev", "worker.#")
    assert heard["arguments"] == {"x-expires": 60000, "x-message-ttl": 5000}
    # RabbitMQ 4.3 forbids queues that are neither.
    assert control["queue_exclusive"] is heard["exclusive"] is (celery.VERSION >= (5, 7))
    assert plain == {
        "hostname": "w@h",
        "broker": {
            "urls": ["amqp://guest:guest@localhost:5672//"],
            "transport_options": {},
            "use_ssl": False,
            "heartbeat": 120,
            "connection_timeout": 4,
            "retry": True,
            "retry_on_startup": True,
            "max_retries": 100,
            "failover_strategy": None,
            "login_method": plain["broker"]["login_method"],
        },
        "queues": [
            {
                "name": "celery",
                "bindings": [{"exchange": NAMED_EXCHANGE, "routing_key": "celery", "arguments": {}}],
                "durable": True,
                "exclusive": False,
                "auto_delete": False,
                "no_declare": False,
                "no_ack": False,
                "arguments": {},
                "consumer_arguments": {},
                "alias": None,
            }
        ],
        "backend": {
            "url": "",
            "native": True,
            "transport_options": {},
            "expires": 86400,
            "use_ssl": False,
            "persistent": True,
        },
        "autoscale": None,
        "pool": {
            "kind": "prefork",
            "concurrency": 3,
            "max_tasks_per_child": None,
            "max_memory_per_child": None,
            "proc_alive_timeout": 4.0,
            "loops": 0,
            "async_concurrency": 0,
        },
        "prefetch_multiplier": 4,
        "disable_prefetch": False,
        "eta_task_limit": None,
        "rate_limits": True,
        "revoked": [],
        "clock": 0,
        "accept_content": ["application/json"],
        "timezone": "UTC",
        "time_limit": None,
        "soft_time_limit": None,
        "shutdown": {
            "soft_timeout": 0.0,
            "soft_on_idle": False,
            "term_is_quit": False,
            "hup_restarts": True,
            "cancel_on_connection_loss": False,
        },
        "app_has_stats": False,
        "heartbeat": 2.0,
        "heartbeat_signal": False,
        "events": {
            "enabled": True,
            "task_events": False,
            "exchange": "celeryev",
            "exchange_type": "topic",
            "serializer": "json",
            "software": {"sw_ident": "py-celery", "sw_ver": celery.__version__, "sw_sys": platform.system()},
        },
        "lines": {
            "format": "[%(asctime)s: %(levelname)s/%(processName)s] %(message)s",
            "json": False,
            "path": None,
        },
        "log_tasks": False,
        "http": None,
        "rungs": [],
        "rung_tasks": [],
        "log_info": False,
        "log_debug": False,
    }


def test_the_broker_is_described_in_full(rich):
    assert rich["broker"] == {
        "urls": ["amqp://worker:s%2Fecret@one/vhost", "amqp://u:p%40w@two:5673//"],
        "transport_options": {"confirm_publish": True, "socket_keepalive_options": {"4": 60}, "wait": 3.0},
        "use_ssl": {"ca_certs": "/ca.pem", "cert_reqs": "CERT_REQUIRED"},
        "heartbeat": 30,
        "connection_timeout": 2.5,
        "retry": False,
        "retry_on_startup": False,
        "max_retries": None,
        "failover_strategy": "shuffle",
        "login_method": "EXTERNAL",
    }


def test_queues_are_described_as_kombu_declares_them(rich):
    video, audio, both = rich["queues"]
    media = {
        "name": "media", "type": "topic", "durable": False, "auto_delete": True, "passive": False,
        "no_declare": False, "arguments": {"alternate-exchange": "lost"},
    }  # fmt: skip
    assert video["name"] == "video"
    assert video["arguments"] == {"x-queue-type": "quorum", "x-message-ttl": 1500}
    assert video["bindings"] == [{"exchange": media, "routing_key": "video.#", "arguments": {}}]
    assert audio["arguments"] == {"x-max-priority": 5, "x-expires": 60000}
    assert audio["consumer_arguments"] == {"x-priority": 1}
    assert (both["durable"], both["auto_delete"]) == (False, True)
    # Not to the default exchange, which Celery gives it and kombu takes away as it declares.
    assert [(one["exchange"]["name"], one["routing_key"]) for one in both["bindings"]] == [
        ("amq.direct", "a"),
        ("media", "b"),
    ]
    assert both["bindings"][0]["exchange"]["no_declare"] is True


def test_tasks_carry_their_own_attributes_and_those_of_the_settings(rich):
    # Before 5.7 the limits of the settings are the pool's alone, `time_limit` beside the tasks.
    inherited = {"time_limit": 30, "soft_time_limit": 20} if celery.VERSION >= (5, 7) else {}
    assert rich["tasks"]["rich_config.early"] == POLICY | inherited | {
        "acks_on_failure": False,
        "acks_on_timeout": False,
        "reject_on_worker_lost": True,
        "rate_limit": 1.0,
        "rate_limit_text": "1/s",
    }
    assert rich["tasks"]["rich_config.limited"] == POLICY | {
        "acks_late": True, "time_limit": 1.5, "soft_time_limit": 1, "ignore_result": True, "rate_limit": 0.5,
        "rate_limit_text": "30/m",
    }  # fmt: skip


@pytest.mark.skipif(celery.VERSION < (5, 7), reason="the flags were split in 5.7")
def test_failure_and_time_out_may_be_acknowledged_apart():
    source = BUILD.replace("worker = app", "app.tasks['plain_config.add'].acks_on_failure = False\nworker = app")
    found = python(source, "plain_config", "{}").split("CONFIG ")[1]
    policy = json.loads(found)["tasks"]["plain_config.add"]
    assert (policy["acks_on_failure"], policy["acks_on_timeout"]) == (False, True)


def test_everything_else_is_read_from_the_settings(rich):
    assert rich["backend"] == {
        "url": "rediss://:pw@results/3",
        "native": True,
        "transport_options": {"global_keyprefix": "p:"},
        "expires": 3600,
        "use_ssl": {"ssl_cert_reqs": "CERT_REQUIRED"},
        "persistent": True,
    }
    assert rich["pool"] == {
        "kind": "prefork",
        "concurrency": 4,
        "max_tasks_per_child": 100,
        "max_memory_per_child": 50000,
        "proc_alive_timeout": 9.0,
        "loops": 0,
        "async_concurrency": 0,
    }
    assert rich["prefetch_multiplier"] == 2
    assert rich["accept_content"] == ["application/json", "application/x-yaml"]
    assert rich["timezone"] == "Europe/Berlin"
    assert (rich["time_limit"], rich["soft_time_limit"]) == (30, 20)
    assert rich["shutdown"]["cancel_on_connection_loss"] is True
    assert (rich["control"]["exchange"], rich["control"]["queue_ttl"]) == ("ctl", 1.0)


def test_old_and_odd_forms_of_settings_are_understood(odd):
    assert odd["broker"]["urls"] == ["redis://old:6380/2"]
    assert (odd["broker"]["retry"], odd["broker"]["retry_on_startup"]) == (True, False)
    assert odd["control"] is None
    assert odd["rate_limits"] is False
    assert odd["tasks"]["odd_config.add"]["rate_limit"] == 5.0
    assert odd["prefetch_multiplier"] == 0
    assert (odd["pool"]["kind"], odd["pool"]["concurrency"]) == ("solo", 1)
    assert odd["accept_content"] == ["application/json", "application/x-python-serialize"]
    assert odd["time_limit"] == 5.5


@pytest.mark.parametrize(
    ("settings", "urls"),
    [
        ({"broker_url": "redis://a/0;redis://b/0"}, ["redis://a/0", "redis://b/0"]),
        ({"broker_read_url": "redis://reads", "broker_url": "redis://writes"}, ["redis://reads"]),
        ({"broker_url": "redis://h/0?ssl_cert_reqs=none"}, ["redis://h/0?ssl_cert_reqs=none"]),
        ({"broker_url": "redis://h/0", "broker_password": "pw"}, ["redis://:pw@h/0"]),
        ({"broker_url": "amqp://u:p@h//", "broker_user": "x", "broker_password": "y"}, ["amqp://u:p@h//"]),
        ({"broker_url": "filesystem://"}, ["filesystem://"]),
    ],
    ids=str,
)
def test_addresses_are_completed_and_otherwise_left_alone(settings, urls):
    source = f"""
from celery import Celery
from celeriac import config
app = Celery()
app.conf.update({settings!r})
print(config.broker_urls(app))
"""
    assert python(source).strip() == str(urls)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("'Asia/Kolkata'", "Asia/Kolkata"),
        ("None", "UTC"),
        ("'CET'", "CET"),
        ("datetime.timezone(datetime.timedelta(hours=2))", "Etc/GMT-2"),
        ("datetime.timezone(datetime.timedelta(hours=-5))", "Etc/GMT+5"),
    ],
)
def test_a_time_zone_has_a_name_of_the_database(given, name):
    source = f"""
import datetime
from celery import Celery
from celeriac import config
app = Celery()
app.conf.timezone = {given}
print(config.timezone(app))
"""
    assert python(source).strip() == name


def test_the_environment_wins_over_the_settings():
    source = """
from celery import Celery
from celeriac import config
app = Celery(broker="redis://code")
print(config.broker_urls(app))
"""
    assert python(source, CELERY_BROKER_URL="redis://env").strip() == "['redis://env']"


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        ("app.conf.task_queues = [kombu.Queue('q', queue_arguments={'x': object()})]", "q: an argument"),
        ("app.conf.task_queues = [kombu.Queue('q', on_declared=print)]", "queue q has on_declared"),
        ("app.tasks['plain_config.add'].rate_limit = 'often'", "rate_limit 'often'"),
        (
            "app.tasks['plain_config.add'].Strategy = 'my.module:strategy'",
            "sets Strategy to 'my.module:strategy', which cannot be imported",
        ),
        (
            "app.tasks['plain_config.add'].Request = 'my.module:Request'",
            "sets Request to 'my.module:Request', which cannot be imported",
        ),
        ("app.conf.worker_consumer = 'my.module:Consumer'", "worker_consumer is my.module:Consumer"),
        ("app.conf.worker_pool = 'celery.concurrency.base:BasePool'", "celery.concurrency.base:BasePool"),
        (
            "app.conf.worker_timer = 'kombu.asynchronous.timer:Timer'",
            "worker_timer is kombu.asynchronous.timer:Timer, which is no subclass of celery.utils.timer2:Timer",
        ),
    ],
)
def test_what_cannot_be_hosted_ends_the_start_with_2_and_its_name(tmp_path, broken, named):
    (tmp_path / "proj.py").write_text(f"""
import kombu
from plain_config import app

app.conf.broker_url = "memory://"
app.finalize()
{broken}
""")
    command = [sys.executable, "-m", "celeriac", "-A", "proj", "worker"]
    done = finish(command, cwd=tmp_path, timeout=30)
    assert done.returncode == 2, done.stdout + done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("setting", "options", "env", "named"),
    [
        ("worker_autoscaler = 'my.module:Scaler'", [], {}, "worker_autoscaler is my.module:Scaler"),
        ("worker_pool = 'prefork'", ["-P", "threads"], {}, "--autoscale needs processes, and the pool is threads"),
        ("worker_pool = 'prefork'", [], {"AUTOSCALE_KEEPALIVE": "0"}, "AUTOSCALE_KEEPALIVE is 0"),
    ],
)
def test_an_autoscale_that_cannot_be_had_ends_the_start_with_2_and_its_reason(tmp_path, setting, options, env, named):
    (tmp_path / "proj.py").write_text(f"from plain_config import app\napp.conf.{setting}\n")
    command = [sys.executable, "-m", "celeriac", "-A", "proj", "worker", "--autoscale=4,1", *options]
    done = finish(command, cwd=tmp_path, timeout=30, **env)
    assert done.returncode == 2, done.stdout + done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_without_effect_are_named_in_one_warning(tmp_path):
    (tmp_path / "proj.py").write_text(
        "from show import app\napp.conf.broker_read_url = 'memory://other'\n"
        "from celery import signals\nfrom show import show\nsignals.celeryd_after_setup.disconnect(show)\n"
        "import celeriac.zygote\ndef stop(plan):\n    raise SystemExit(0)\nceleriac.zygote.start = stop\n"
    )
    done = finish([sys.executable, "-m", "celeriac", "-A", "proj", "worker"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Settings without effect in celeriac yet") == 1
    assert "broker_write_url for events" in done.stderr


@pytest.mark.parametrize(
    ("address", "settings", "told"),
    [
        ("redis://host/1", {"redis_password": "p@ss"}, "redis://:p%40ss@host/1"),
        ("redis://host:1/1", {"redis_username": "me", "redis_password": "p", "redis_db": 7}, "redis://me:p@host:1/1"),
        ("redis://:mine@/1", {"redis_password": "p", "redis_host": "h", "redis_port": 7}, "redis://:mine@h:7/1"),
        ("redis://[::1]/1", {"redis_port": 7, "redis_host": "h"}, "redis://[::1]:7/1"),
        ("rediss://?ssl_cert_reqs=none", {"redis_host": "h"}, "rediss://h?ssl_cert_reqs=none"),
        ("redis+socket:///s", {"redis_db": 3, "redis_password": "p"}, "redis+socket://:p@/s?virtual_host=3"),
        ("redis+socket:///s?virtual_host=1", {"redis_db": 3}, "redis+socket:///s?virtual_host=1"),
        ("redis://", {}, "redis://"),
        ("rpc://", {"redis_host": "h"}, "rpc://"),
    ],
)
def test_what_the_address_of_a_redis_backend_leaves_out_comes_from_the_settings(address, settings, told):
    app = celery.Celery("app", set_as_current=False)
    app.conf.update(result_backend=address, **settings)
    assert config.backend_url(app.conf) == told
