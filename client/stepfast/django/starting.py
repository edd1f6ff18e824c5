"""Starting runs from Django."""

from typing import Any
from uuid import UUID, uuid4

from django.db import connections, transaction

from stepfast import client
from stepfast.django.conf import configuration
from stepfast.django.databases import DjangoDatabase
from stepfast.runs import RunHandle


def enqueue(
    pipeline: str,
    input: dict[str, Any],  # noqa: A002  # what the pipeline calls it
    *,
    key: str | None = None,
    tenant: str | None = None,
    labels: dict[str, Any] | None = None,
    priority: int = 0,
    using: str = "default",
) -> RunHandle:
    """Starts a run together with what `transaction.atomic()` does on the database `using`.

    Where that database holds Stepfast, too, both happen or neither. Else the run is started after the commit: a
    rollback starts nothing, but a process that dies right after the commit leaves the run unstarted; and where a key
    had started one before, the handle's id is right only after the commit.
    """
    ours, made = client.default(), DjangoDatabase(configuration().database)
    options: dict[str, Any] = {"key": key, "tenant": tenant, "labels": labels, "priority": priority}
    if using == made.alias or not connections[using].in_atomic_block:
        return ours.enqueue(pipeline, input, connection=made, **options)
    ours.check(made, pipeline, input, **options)
    handle = RunHandle(uuid4(), made, ours.look_after)

    def start() -> None:
        started = ours.start(made, pipeline, input, handle.id, **options)
        handle.id, handle.created = started.id, started.created

    transaction.on_commit(start, using=using)
    return handle


def run(run_id: UUID | str) -> RunHandle:
    """A run by its id."""
    return client.default().run(run_id, connection=DjangoDatabase(configuration().database))
