"""What monitors see: Celery's own event receiver in a thread; events in a form that two workers can be compared by."""

import datetime
import threading

from support.lines import plain
from support.waiting import until

# A task for which one of these came has come to its end; `task-retried` and `task-rejected` may be followed by more.
LAST = {"task-succeeded", "task-failed", "task-revoked"}

# Different from run to run; that they are there, and of what kind, is compared.
FLEETING = ("timestamp", "local_received", "clock", "pid", "utcoffset", "runtime", "loadavg", "processed", "active")

# What the original says of an error of the parent process: it shows what it has put around it. Ours shows the error.
HIDDEN = ("ExceptionWithTraceback(", "WorkerLostError(", "TimeLimitExceeded(")


class Watcher:
    """`with Watcher(stage) as watcher:` collects every event of the stage's broker in `watcher.events`."""

    def __init__(self, stage, state=None):
        self.stage = stage
        self.events = []
        self.state = state
        self.connection = stage.app.connection_for_read()
        self.receiver = stage.app.events.Receiver(self.connection, handlers={"*": self.see})
        self.error = None
        self.thread = threading.Thread(target=self.run, name="events", daemon=True)

    def see(self, event):
        self.events.append(event)
        if self.state is not None:
            self.state.event(event)

    def run(self):
        try:
            for _ in self.receiver.consume(limit=None, timeout=None, wakeup=False):
                pass
        except Exception as error:
            self.error = error

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.receiver.should_stop = True
        self.thread.join(10)
        self.connection.release()

    def listen(self, node="w0@here"):
        """Until an event of the worker was seen, so that none is missed from here on."""
        self.wait(lambda event: event["type"] == "worker-heartbeat" and event["hostname"] == node)

    def wait(self, wanted, count=1, timeout=30):
        """The events for which `wanted` is true, once there are so many."""

        def enough():
            assert self.error is None, self.error
            found = [event for event in list(self.events) if wanted(event)]
            return found if len(found) >= count else None

        def describe():
            return f"{count} such events among {[e['type'] for e in self.events]}\n{self.stage.logs()}"

        return until(enough, describe, timeout)

    def of(self, task_id):
        """The events of a task, in the order in which they came."""
        return [event for event in list(self.events) if event.get("uuid") == task_id]

    def ended(self, task_id, last=LAST):
        """The events of a task, once one of these came."""
        self.wait(lambda event: event.get("uuid") == task_id and event["type"] in last)
        return self.of(task_id)


def comparable(event):
    """An event without what differs from run to run."""
    found = {}
    for name, value in event.items():
        if name in FLEETING:
            found[name] = "number" if isinstance(value, int | float) else type(value).__name__
        elif name == "traceback":
            found[name] = plain(value).strip().splitlines()[-1:]
        elif name == "exception" and value.startswith(HIDDEN):
            found[name] = "hidden"
        elif name in ("eta", "expires") and value:
            found[name] = str(datetime.datetime.fromisoformat(value).tzinfo)
        else:
            found[name] = plain(value) if isinstance(value, str) else value
    return found
