"""The app, registry and task class of tenant-schemas-celery; django-tenants and PostgreSQL are stood in for."""

import sys
import types
from dataclasses import dataclass

import django
from base import make_app, record
from django.conf import settings

settings.configure(
    SECRET_KEY="of no use",
    DATABASES={"default": {"ENGINE": "tenants.backend", "NAME": ":memory:"}},
)
django.setup()


@dataclass
class Tenant:
    schema_name: str


class Tenants:
    @staticmethod
    def get(schema_name):
        record("tenant.looked_up", schema=schema_name)
        return Tenant(schema_name)


compat = types.ModuleType("tenant_schemas_celery.compat")
compat.get_public_schema_name = lambda: "public"
compat.get_tenant_model = lambda: types.SimpleNamespace(objects=Tenants)
sys.modules[compat.__name__] = compat

from django.db import connection  # noqa: E402
from tenant_schemas_celery.app import CeleryApp  # noqa: E402

app = make_app("tenant_app", CeleryApp)


@app.task(name="schema_here")
def schema_here():
    return connection.schema_name


@app.task(name="schema_of_child")
def schema_of_child():
    return [connection.schema_name, schema_here.delay().id]


@app.task(name="fail_here")
def fail_here():
    raise ValueError(connection.schema_name)


@app.task(name="kinds")
def kinds():
    task = kinds._get_current_object()
    return [type(app.tasks).__name__, [base.__name__ for base in type(task).__mro__ if "Tenant" in base.__name__]]
