"""celeriac: the Celery worker, rebuilt in Rust."""

from celeriac._core import __version__

__all__ = ["__version__"]
