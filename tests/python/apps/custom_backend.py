"""A result backend that no worker has seen before: one file a result, in a format of its own."""

import json
import os
from pathlib import Path

from celery.backends.base import BaseBackend


class NotebookBackend(BaseBackend):
    def __init__(self, *args, url=None, **kwargs):
        super().__init__(*args, url=url, **kwargs)
        self.folder = Path(os.environ.get("NOTEBOOK", self.app.conf.get("notebook_folder", ".")))

    def _store_result(self, task_id, result, state, traceback=None, request=None, **kwargs):
        page = {
            "result": result,
            "status": state,
            "traceback": traceback,
            "children": self.current_task_children(request),
        }
        path = self.folder / f"{task_id}.page"
        path.with_suffix(".new").write_text(json.dumps(page, default=repr))
        path.with_suffix(".new").rename(path)
        return result

    def _get_task_meta_for(self, task_id):
        path = self.folder / f"{task_id}.page"
        if not path.exists():
            return {"status": "PENDING", "result": None}
        return self.meta_from_decoded(json.loads(path.read_text()))
