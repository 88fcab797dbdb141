"""The connection."""

from base import record
from django.db.backends.sqlite3.base import DatabaseWrapper as Sqlite


class DatabaseWrapper(Sqlite):
    schema_name = "public"
    include_public_schema = True

    def set_schema(self, schema_name, include_public=True):
        record("schema", to=schema_name)
        self.schema_name, self.include_public_schema = schema_name, include_public

    def set_tenant(self, tenant, include_public=True):
        self.set_schema(tenant.schema_name, include_public)

    def set_schema_to_public(self):
        self.set_schema("public")
