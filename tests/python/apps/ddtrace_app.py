"""An app for `ddtrace-run`: nothing of it is in the code."""

from base import make_app
from watched import add_tasks

app = make_app("ddtrace_app")
add_tasks(app)
