"""An app traced by OpenTelemetry, set up as its documentation says: a provider for each child."""

import asyncio

from base import make_app, record
from celery.signals import worker_process_init
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

app = make_app("otel_app")


class Recording(SpanExporter):
    def export(self, spans):
        for span in spans:
            record(
                "span",
                name=span.name,
                kind=span.kind.name,
                status=span.status.status_code.name,
                task=span.attributes.get("celery.task_name"),
                state=span.attributes.get("celery.state"),
                id=span.attributes.get("messaging.message.id"),
                trace=f"{span.context.trace_id:x}",
                span=f"{span.context.span_id:x}",
                parent=span.parent and f"{span.parent.span_id:x}",
                took=(span.end_time - span.start_time) / 1e9,
                exceptions=[event.name for event in span.events],
            )
        return SpanExportResult.SUCCESS


@worker_process_init.connect(weak=False)
def set_up_tracing(**_):
    trace.set_tracer_provider(TracerProvider())
    # A batch every ten minutes: what arrives sooner was flushed when the child left.
    trace.get_tracer_provider().add_span_processor(BatchSpanProcessor(Recording(), schedule_delay_millis=600_000))
    CeleryInstrumentor().instrument()


@app.task(name="add")
def add(x, y):
    return x + y


@app.task(name="fail")
def fail():
    raise ValueError("seen by OpenTelemetry")


@app.task(name="parent_of")
def parent_of():
    return add.delay(1, 1).id


@app.task(name="interleaved", bind=True)
async def interleaved(self, number, seconds):
    with trace.get_tracer(__name__).start_as_current_span(self.request.id):
        await asyncio.sleep(seconds)
    return add.delay(number, 1).id
