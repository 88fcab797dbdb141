"""Tasks that use the database."""

from celery import shared_task
from django.contrib.auth.models import Group
from django.db import transaction


@shared_task
def add_group(name):
    with transaction.atomic():
        Group.objects.create(name=name)
    return Group.objects.count()


@shared_task
def fail():
    raise ValueError("in the shop")


@shared_task
def kind_of_task():
    return [base.__module__ for base in type(kind_of_task._get_current_object()).__mro__]
