"""Read-only models over the views. They read from the database that STEPFAST names, and need no migration."""

from typing import Any

from django.db import models

from stepfast.django.conf import configuration


class ViewManager(models.Manager):
    def get_queryset(self) -> Any:  # Django ships no types
        return super().get_queryset().using(configuration().database)


class View(models.Model):
    """A row that is only read: what changes a run are `RunHandle`'s methods."""

    objects = ViewManager()

    class Meta:
        abstract = True

    def save(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("A view is only read.")

    def delete(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("A view is only read.")


class Run(View):
    id = models.UUIDField(primary_key=True)
    tenant = models.TextField()
    pipeline = models.TextField()
    version = models.TextField()
    pipeline_hash = models.TextField()
    state = models.TextField()
    partial = models.BooleanField()
    key = models.TextField(null=True)
    labels = models.JSONField()
    priority = models.SmallIntegerField()
    deadline_at = models.DateTimeField(null=True)
    created_at = models.DateTimeField()
    started_at = models.DateTimeField(null=True)
    ended_at = models.DateTimeField(null=True)
    steps = models.IntegerField()
    completed = models.IntegerField()
    cost_usd = models.DecimalField(max_digits=20, decimal_places=6, null=True)

    class Meta:
        managed = False
        db_table = '"stepfast"."v_runs"'
        default_permissions = ("view",)
        permissions = (
            ("resume_run", "Can resume runs"),
            ("approve_run", "Can approve and reject what runs wait for"),
            ("cancel_run", "Can cancel runs"),
        )

    def __str__(self) -> str:
        return f"{self.pipeline} {str(self.id)[:8]}"


class OfRun(View):
    run = models.ForeignKey(Run, models.DO_NOTHING, db_constraint=False, related_name="+")
    agent = models.TextField()
    item = models.TextField()
    generation = models.IntegerField()

    class Meta:
        abstract = True


class Step(OfRun):
    id = models.TextField(primary_key=True)
    state = models.TextField()
    failure_mode = models.TextField()
    queue = models.TextField()
    attempts = models.IntegerField()
    failures = models.IntegerField()
    worker_losses = models.IntegerField()
    waits = models.IntegerField()
    scheduled_at = models.DateTimeField(null=True)
    ended_at = models.DateTimeField(null=True)

    class Meta:
        managed = False
        db_table = '"stepfast"."v_steps"'
        default_permissions = ("view",)

    def __str__(self) -> str:
        return str(self.agent)


class Attempt(OfRun):
    id = models.UUIDField(primary_key=True)
    number = models.IntegerField()
    state = models.TextField()
    host = models.TextField(null=True)
    pid = models.IntegerField(null=True)
    decided_by = models.TextField(null=True)
    model = models.TextField(null=True)
    input_tokens = models.BigIntegerField(null=True)
    output_tokens = models.BigIntegerField(null=True)
    cost_usd = models.DecimalField(max_digits=20, decimal_places=6, null=True)
    started_at = models.DateTimeField()
    ended_at = models.DateTimeField(null=True)
    error_code = models.TextField(null=True)
    error_message = models.TextField(null=True)
    error_next_step = models.TextField(null=True)

    class Meta:
        managed = False
        db_table = '"stepfast"."v_attempts"'
        default_permissions = ("view",)

    def __str__(self) -> str:
        return f"{self.agent}, attempt {self.number}"


class DeadLetter(OfRun):
    id = models.UUIDField(primary_key=True)
    pipeline = models.TextField()
    code = models.TextField()
    message = models.TextField()
    next_step = models.TextField()
    error_fingerprint = models.TextField()
    created_at = models.DateTimeField()
    resolved_at = models.DateTimeField(null=True)
    resolution = models.TextField(null=True)
    resolved_by = models.TextField(null=True)

    class Meta:
        managed = False
        db_table = '"stepfast"."v_dead_letters"'
        default_permissions = ("view",)

    def __str__(self) -> str:
        return f"{self.pipeline}, {self.agent} ({self.code})"
