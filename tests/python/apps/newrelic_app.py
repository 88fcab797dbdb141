"""An app for `newrelic-admin run-program`. The agent is in developer mode; what it records of transactions is written
down where it takes them into its statistics."""

from base import make_app, record
from newrelic.common.object_wrapper import wrap_function_wrapper
from watched import add_tasks

app = make_app("newrelic_app")
add_tasks(app)


def recorded(wrapped, instance, args, kwargs):
    transaction = args[0] if args else kwargs["transaction"]
    record(
        "transaction",
        name=transaction.path,
        background=transaction.base_name != transaction.name,
        errors=[error.type for error in transaction.errors],
        trace=transaction.trace_id,
    )
    return wrapped(*args, **kwargs)


wrap_function_wrapper("newrelic.core.stats_engine", "StatsEngine.record_transaction", recorded)
