"""An app in a control group that the test made up: where Celery looks for the processor quota."""

import os

from base import make_app
from celery.utils import sysinfo

sysinfo.CGROUP_ROOT = os.environ["BOX"]
sysinfo.PROC_SELF_CGROUP = os.path.join(os.environ["BOX"], "own")

app = make_app("boxed")
