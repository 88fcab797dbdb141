"""The tasks of workflows. Each run is noted with its workflow (`w`), so that all that ran can be compared."""

from base import record
from celery import chain, chord, group
from celery.exceptions import Ignore, Reject

from .celery import app


def note(request, op, args, w):
    record(
        "ran",
        op=op,
        args=args,
        w=w,
        id=request.id,
        parent=request.parent_id,
        root=request.root_id,
        group=request.group,
        index=request.group_index,
        retries=request.retries,
        priority=(request.delivery_info or {}).get("priority"),
        nesting=request.replaced_task_nesting,
        stamps=[request.stamped_headers, request.stamps],
        ignores=request.ignore_result,
    )


def flat(values):
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from flat(value)
        else:
            yield value


def work(op, *args, w, **options):
    """A signature of the one task that does everything."""
    return task.signature(args, {"op": op, "w": w}, **options)


def substitutes(w, x):
    """What a task may be replaced by."""
    return {
        "task": lambda: work("add", x, 1, w=w),
        "chain": lambda: chain(work("add", x, 1, w=w), work("add", 2, w=w)),
        "group": lambda: group(work("add", x, n, w=w) for n in range(2)),
        "one": lambda: group([work("add", x, 7, w=w)]),
        "nothing": lambda: group([]),
        "chord": lambda: chord([work("add", x, n, w=w) for n in range(2)], work("add", w=w)),
        "linked": lambda: work("add", x, 1, w=w).on_error(errback.s(w=w)) | work("echo", w=w),
        "failing": lambda: work("fail", w=w, immutable=True),
        "again": lambda: work("replace", "task", x, w=w),
        "empty_chain": lambda: chain(),
    }


@app.task(name="workflows.task", bind=True)
def task(self, *args, op, w):
    note(self.request, op, args, w)
    match op:
        case "add":
            return sum(flat(args))
        case "echo":
            return list(args)
        case "none":
            return None
        case "fail":
            raise ValueError("fails")
        case "ignore":
            raise Ignore("not wanted")
        case "reject":
            raise Reject("rejected", requeue=False)
        case "retry":
            if not self.request.retries:
                # Later than the producer takes to send what comes behind it.
                raise self.retry(countdown=1, exc=ValueError("once more"))
            return sum(flat(args))
        case "retry_in_vain":
            raise self.retry(countdown=0, max_retries=1, exc=ValueError("in vain"))
        case "replace":
            # A result of the task before comes first.
            *before, how, x = args
            return self.replace(substitutes(w, x + sum(before))[how]())
        case "add_to_chord":
            # As much as this one: which of the two comes first in the body is open.
            self.add_to_chord(work("add", *args, w=w))
            return sum(flat(args))
        case "unencodable":
            return object
        case "sends_chord":
            return str(chord([work("add", n, w=w) for n in range(2)])(work("add", w=w)).id != "")


@app.task(name="workflows.one")
def one(x, w=None):
    return x + 1


@app.task(name="workflows.two")
def two(x, y):
    return x * y


@app.task(name="workflows.errback")
def errback(request, exc, traceback, w=None):
    of = request.kwargs.get("op") if request.kwargs else None
    record("errback", w=w, of=of, exc=repr(exc), traceback=bool(traceback))


@app.task(name="workflows.old_errback")
def old_errback(task_id, w=None):
    record("old_errback", w=w, id=task_id)


@app.task(name="workflows.failing_errback")
def failing_errback(request, exc, traceback, w=None):
    record("failing_errback", w=w)
    raise RuntimeError("an errback that fails")
