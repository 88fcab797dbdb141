"""An app watched by Elastic APM, set up as its documentation says."""

import os

from base import make_app
from elasticapm import Client
from elasticapm.contrib.celery import register_exception_tracking, register_instrumentation
from watched import add_tasks

app = make_app("elastic_app")
client = Client(
    service_name="watched",
    server_url=os.environ["SINK"],
    api_request_time="200ms",
    central_config=False,
    metrics_interval="0s",
    cloud_provider="none",
)
register_exception_tracking(client)
register_instrumentation(client)
add_tasks(app)
