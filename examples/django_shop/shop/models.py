"""An order."""

from django.db import models


class Order(models.Model):
    customer = models.CharField(max_length=100)
    item = models.CharField(max_length=100)
    quantity = models.PositiveIntegerField()
    state = models.CharField(max_length=10, default="new")
    note = models.TextField(blank=True)
    run_id = models.UUIDField(null=True, editable=False)

    def __str__(self) -> str:
        return f"{self.quantity} x {self.item} for {self.customer}"
