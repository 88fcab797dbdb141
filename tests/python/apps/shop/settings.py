"""Settings: the broker comes from the test, results go to the database."""

import json
import os

SECRET_KEY = "of no use"
USE_TZ = True
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes", "django_celery_results", "shop"]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ["SHOP_DATABASE"],
        "OPTIONS": {"timeout": 30},
    }
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

_given = json.loads(os.environ.get("APP_CONF", "{}"))
CELERY_BROKER_URL = _given.get("broker_url")
CELERY_TASK_DEFAULT_QUEUE = _given.get("task_default_queue", "celery")
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_RESULT_BACKEND = "django-db"
CELERY_RESULT_EXTENDED = True
