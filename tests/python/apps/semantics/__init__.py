"""One app with every thing that a task may do; a module a subject."""

from .celery import app

__all__ = ("app",)
