"""The table of settings knows every setting of Celery, and the page is made from it."""

from pathlib import Path

import celery
import pytest
from celeriac import settings
from celery.app.defaults import NAMESPACES, flatten

KNOWN = {name.lower() for name, _ in flatten(NAMESPACES)}


def test_every_setting_has_a_row():
    assert sorted(name for name in KNOWN if settings.find(name) is None) == []


@pytest.mark.skipif(celery.VERSION < (5, 7), reason="the rows are those of 5.7")
def test_every_row_is_a_setting():
    names = [row.name for row in settings.rows()]
    assert len(names) == len(set(names))
    assert sorted(name for name in names if "*" not in name and name not in KNOWN) == []
    readers = {reader for row in settings.rows() for reader in row.readers.split(",") if reader}
    assert readers <= set(settings.READERS)


@pytest.mark.skipif(celery.VERSION < (5, 7), reason="the defaults are those of 5.7")
def test_the_reference_is_made_from_the_table():
    page = Path(__file__).resolve().parents[2] / "docs" / "settings.md"
    assert page.read_text() == settings.reference(), "run `make docs`"
