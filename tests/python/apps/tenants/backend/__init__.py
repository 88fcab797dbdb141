"""A database engine whose connections know a schema, as those of django-tenants do; SQLite has none."""
