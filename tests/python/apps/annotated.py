"""Tasks that task_annotations changes: by name, by a pattern of an object's own, all of them, with functions."""

from base import make_app, record

app = make_app("annotated")


class ByPrefix:
    """An annotation of the app's own kind."""

    def annotate(self, task):
        if task.name.startswith("report."):
            return {"rate_limit": "30/m", "time_limit": 77}
        return None

    def annotate_any(self):
        return None


def on_failure(self, exc, task_id, args, kwargs, einfo):
    record("annotated", task=self.name, error=repr(exc))


app.conf.task_annotations = [
    {"add": {"rate_limit": "5/s"}, "*": {"on_failure": on_failure}},
    ByPrefix(),
    {"report.mail": {"rate_limit": None}},
]


@app.task(name="add")
def add(x, y):
    return x + y


@app.task(name="report.daily", bind=True)
def daily(self):
    return [self.rate_limit, self.time_limit]


@app.task(name="report.mail", rate_limit="1/h")
def mail():
    raise ValueError("no address")
