"""Settings given in their oldest or oddest form."""

from celery import Celery

app = Celery("odd_config")
app.conf.update(
    broker_host="old",
    broker_port=6380,
    broker_vhost="2",
    broker_transport="redis",
    result_backend="rpc",
    worker_enable_remote_control=False,
    worker_disable_rate_limits=True,
    worker_prefetch_multiplier=0,
    worker_pool="solo",
    enable_utc=False,
    accept_content=["json", "pickle"],
    broker_connection_retry_on_startup=False,
)


@app.task(rate_limit="5/s")
def add(x, y):
    return x + y
