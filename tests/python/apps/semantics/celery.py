"""The app, and what all of its tasks leave in the journal."""

from base import make_app, record

app = make_app("semantics")

#: What is not equal from run to run.
VOLATILE = {"hostname", "origin", "reply_to", "eta", "expires", "properties", "delivery_info", "correlation_id"}


def note(task, event="run", **more):
    """A line about a run of this task, with what it was asked to do."""
    request = task.request
    info = request.delivery_info or {}
    record(
        event,
        id=request.id,
        args=list(request.args),
        kwargs=request.kwargs,
        retries=request.retries,
        priority=info.get("priority"),
        redelivered=info.get("redelivered"),
        timed=[request.eta is not None, request.expires is not None],
        timelimit=request.timelimit,
        headers=request.headers,
        shadow=request.shadow,
        ignore_result=request.ignore_result,
        group_index=request.group_index,
        family=[request.root_id, request.parent_id, request.group],
        **more,
    )


from . import classes, retries, states, workflows  # noqa: E402, F401
