"""Stepfast in Django: add `stepfast.django` to INSTALLED_APPS, and set STEPFAST where the defaults do not fit.

from stepfast.django import enqueue

with transaction.atomic():
    order = Order.objects.create(...)
    run = enqueue("fulfilment", {"order": order.pk}, key=f"order-{order.pk}")
"""

from stepfast.django.signals import run_ended
from stepfast.django.starting import enqueue, run

__all__ = ["enqueue", "run", "run_ended"]
