"""Stand-ins for what django-tenants gives tenant-schemas-celery: a connection with a schema, and the tenants."""
