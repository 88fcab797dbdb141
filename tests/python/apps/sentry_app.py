"""An app watched by Sentry; what would go to the server is recorded."""

import asyncio

import sentry_sdk
from base import make_app, record
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.transport import Transport


class Recording(Transport):
    def capture_envelope(self, envelope):
        for item in envelope.items:
            event = item.payload.json or {}
            trace = event.get("contexts", {}).get("trace", {})
            record(
                f"sentry.{item.type}",
                transaction=event.get("transaction"),
                op=trace.get("op"),
                status=trace.get("status"),
                trace=trace.get("trace_id"),
                spans=sorted(span["op"] for span in event.get("spans", [])),
                inner=[
                    {"name": span["description"], "trace": span["trace_id"], "parent": span["parent_span_id"]}
                    for span in event.get("spans", [])
                    if span["op"] == "inner"
                ],
                process=[span["span_id"] for span in event.get("spans", []) if span["op"] == "queue.process"],
                began=event.get("start_timestamp"),
                ended=event.get("timestamp"),
                tags=event.get("tags"),
                errors=[value["type"] for value in event.get("exception", {}).get("values", [])],
                task=event.get("extra", {}).get("celery-job", {}).get("task_name"),
            )


sentry_sdk.init(
    dsn="http://key@127.0.0.1:1/1",
    transport=Recording,
    traces_sample_rate=1.0,
    integrations=[CeleryIntegration()],
    default_integrations=True,
)
app = make_app("sentry_app")


@app.task(name="add")
def add(x, y):
    return x + y


@app.task(name="fail")
def fail():
    raise ValueError("seen by Sentry")


@app.task(name="parent_of")
def parent_of():
    return add.delay(1, 1).id


@app.task(name="interleaved", bind=True)
async def interleaved(self, number, seconds):
    sentry_sdk.set_tag("number", str(number))
    with sentry_sdk.start_span(op="inner", name=self.request.id):
        await asyncio.sleep(seconds)
    if number % 2:
        raise ValueError(number)
