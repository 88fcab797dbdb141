"""A setting for every field of the core's configuration."""

import ssl
from datetime import timedelta

from celery import Celery
from kombu import Exchange, Queue, binding

app = Celery("rich_config")
media = Exchange("media", type="topic", durable=False, auto_delete=True, arguments={"alternate-exchange": "lost"})
app.conf.update(
    broker_url=["amqp://one/vhost", "amqp://u:p%40w@two:5673//"],
    broker_user="worker",
    broker_password="s/ecret",
    broker_transport_options={
        "confirm_publish": True,
        "socket_keepalive_options": {4: 60},
        "wait": timedelta(seconds=3),
    },
    broker_use_ssl={"ca_certs": "/ca.pem", "cert_reqs": ssl.CERT_REQUIRED},
    broker_heartbeat=30,
    broker_connection_timeout=2.5,
    broker_connection_retry=False,
    broker_connection_max_retries=None,
    broker_failover_strategy="shuffle",
    broker_login_method="EXTERNAL",
    task_queues=[
        Queue("video", media, routing_key="video.#", queue_arguments={"x-queue-type": "quorum"}, message_ttl=1.5),
        Queue(
            "audio",
            media,
            routing_key="audio.#",
            max_priority=5,
            expires=60,
            consumer_arguments={"x-priority": 1},
        ),
        Queue(
            "both",
            bindings=[binding(media, routing_key="b"), binding(Exchange("amq.direct"), routing_key="a")],
            durable=False,
            auto_delete=True,
        ),
        Queue("unread", routing_key="unread"),
    ],
    task_default_queue="video",
    task_create_missing_queues=False,
    task_acks_late=True,
    task_time_limit=30,
    task_soft_time_limit=20,
    task_default_rate_limit="30/m",
    result_backend="rediss://:pw@results/3",
    result_expires=timedelta(hours=1),
    result_backend_transport_options={"global_keyprefix": "p:"},
    redis_backend_use_ssl={"ssl_cert_reqs": "required"},
    worker_prefetch_multiplier=2,
    worker_max_tasks_per_child=100,
    worker_max_memory_per_child=50000,
    worker_proc_alive_timeout=9.0,
    worker_cancel_long_running_tasks_on_connection_loss=True,
    accept_content=["json", "application/x-yaml"],
    timezone="Europe/Berlin",
    control_exchange="ctl",
    control_queue_ttl=1.0,
    control_queue_expires=2.0,
)


@app.task(acks_late=False, acks_on_failure_or_timeout=False, reject_on_worker_lost=True, rate_limit="1/s")
def early():
    pass


@app.task(time_limit=1.5, soft_time_limit=1, ignore_result=True, rate_limit=None)
def limited():
    pass
