"""``python -m celeriac``."""

from __future__ import annotations

import os
import sys

# A worker that restarts on SIGHUP is run as `python …/celeriac/__main__.py`, which puts this directory first
# on the path: a user's own `config` or `worker` module would then be ours.
if sys.path and os.path.abspath(sys.path[0] or ".") == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]

from celeriac.cli import main

if __name__ == "__main__":
    main()
