"""Retention: what ended long ago, and what is left over, is deleted in batches, each a short transaction of its own.

Nothing is remembered between batches but a place in the order of ending, so whoever is killed has lost nothing: the
next one begins anew and finds less. What a worker or a person holds just now is skipped.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.types import Boolean, Integer, Interval

from app.runs.metrics import Metrics
from app.runs.statements import call

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import timedelta

    from sqlalchemy import Engine

# A batch ends at whichever comes first; its transaction takes some 10 ms (a run's rows are about twice its events).
BATCH_RUNS_MAX = 100
BATCH_EVENTS_MAX = 500

# Of what is left over. A definition may be large: it is stored in a thousand pieces.
BATCH_WORKERS_MAX = 500
BATCH_DEFINITIONS_MAX = 10

# Why a run that ended stays, as `kept_because` names it.
KEPT = {
    "unfinished": "something of it executes or waits",
    "dead_letter": "a dead letter of it is open",
    "key": "an idempotency key of it is reserved, or its outcome unknown",
    "request": "what a person ordered of it waits to be carried out",
    "recent": "something happened to it since, or is not counted in the metrics yet",
    "busy": "somebody held it just then",
}

_PRUNE = call(
    "prune_runs_v1",
    ("before", TIMESTAMP(timezone=True)),
    ("after_at", TIMESTAMP(timezone=True)),
    ("after_id", PG_UUID()),
    ("runs_max", Integer()),
    ("events_max", Integer()),
    ("dry_run", Boolean()),
)
_PRUNE_REST = call(
    "prune_rest_v1",
    ("before", TIMESTAMP(timezone=True)),
    ("workers_max", Integer()),
    ("definitions_max", Integer()),
)
_BEFORE = text("select stepfast.now() - :age").bindparams(bindparam("age", type_=Interval()))
_COUNT = text("""
    select count(*) from (select from stepfast.runs where ended_at < stepfast.now() - :age limit :limit) found
""").bindparams(bindparam("age", type_=Interval()), bindparam("limit", type_=Integer()))
_FIRST = (datetime.fromisoformat("0001-01-01T00:00:00+00:00"), UUID(int=0))


@dataclass(frozen=True, slots=True)
class Batch:
    """What became of the runs of one transaction. `kept` counts by KEPT."""

    looked_at: int
    pruned: int
    kept: dict[str, int]


class Pruning:
    """Of the runs that had ended so long before this was made."""

    def __init__(self, engine: "Engine", older_than: "timedelta") -> None:
        self._engine = engine
        with engine.connect() as connection:
            self.before: datetime = connection.execute(_BEFORE, {"age": older_than}).scalar_one()

    def count_events(self) -> "Iterator[float]":
        """Counts for the metrics what is about to go. Yields the seconds of events that are left, every few seconds."""
        metrics = Metrics(self._engine)
        while left_s := metrics.count():
            yield left_s

    def batches(self, *, dry_run: bool) -> "Iterator[Batch]":
        """Prunes, or with `dry_run` only judges, batch by batch, the longest ended first."""
        after_at, after_id = _FIRST
        bounds: dict[str, Any] = {
            "before": self.before,
            "runs_max": BATCH_RUNS_MAX,
            "events_max": BATCH_EVENTS_MAX,
            "dry_run": dry_run,
        }
        while True:
            with self._engine.connect() as connection:
                found = connection.execute(_PRUNE, {**bounds, "after_at": after_at, "after_id": after_id}).scalar_one()
            if not found["looked_at"]:
                return
            yield Batch(found["looked_at"], found["pruned"], found["kept"])
            after_at, after_id = datetime.fromisoformat(found["last_at"]), UUID(found["last_id"])

    def rest(self) -> "Iterator[tuple[int, int]]":
        """Prunes workers that ended before, and definitions that no run has. Yields how many of each, by batch."""
        bounds = {
            "before": self.before,
            "workers_max": BATCH_WORKERS_MAX,
            "definitions_max": BATCH_DEFINITIONS_MAX,
        }
        while True:
            with self._engine.connect() as connection:
                found = connection.execute(_PRUNE_REST, bounds).scalar_one()
            if not any(found.values()):
                return
            yield found["workers"], found["definitions"]


def prunable_count(engine: "Engine", older_than: "timedelta", limit: int) -> int:
    """How many runs ended so long ago, counted up to `limit`."""
    with engine.connect() as connection:
        return int(connection.execute(_COUNT, {"age": older_than, "limit": limit}).scalar_one())
