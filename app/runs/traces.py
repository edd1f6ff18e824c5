"""The outbox of traces: which runs have something to export, what is recorded of them, and what was exported.

At least once: who takes a run has it for a while, and it is due again where nobody confirms. Ids of spans are hashes:
one that is exported twice is the same span.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import bindparam, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.types import Text

from app.runs.tables import attempts, events, runs, steps

if TYPE_CHECKING:
    from collections.abc import Collection
    from datetime import datetime

    from sqlalchemy import Engine, Select

    from app.pipelines.model import Json

# Of one run. What is beyond is not shown.
ATTEMPTS_MAX = 5_000
TURNS_MAX = 1_000
# By these a run ends and goes on: they bound its segments.
ENDS = ("run.completed", "run.failed", "run.cancelled")
RESUMED = "run.resumed"

_TAKE = text("""
    update stepfast.traces t set due_at = stepfast.now() + :lease_s * interval '1 s'
    from (select run_id from stepfast.traces where due_at <= stepfast.now()
          order by due_at limit :limit for update skip locked) due
    where t.run_id = due.run_id returning t.run_id, t.traceparent, t.due_at, t.sent
""")
# Due for somebody else's change meanwhile, it stays due.
_CONFIRM = text("""
    update stepfast.traces
    set sent = sent || :sent, due_at = case when due_at <> :taken then due_at end where run_id = :run
""").bindparams(bindparam("sent", type_=ARRAY(Text())), bindparam("run", type_=PG_UUID()))
_ATTEMPT = (
    *("id", "agent", "item", "generation", "number", "state", "worker_id", "decided_by", "reads", "started_at"),
    *("ended_at", "reused_from", "model", "usage", "cost_usd", "error"),
)


@dataclass(frozen=True, slots=True)
class Due:
    """A run that was taken, until `taken`. `sent` are the ids of the spans that were exported, in hexadecimal."""

    run_id: UUID
    traceparent: str | None
    taken: "datetime"
    sent: frozenset[str]


class Traces:
    """Over one engine. May raise SQLAlchemy's DBAPIError."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    def take(self, lease_s: float, limit: int) -> list[Due]:
        """Takes runs that are due, which are due again after `lease_s`."""
        with self._engine.connect() as connection:
            rows = connection.execute(_TAKE, {"lease_s": lease_s, "limit": limit}).all()
        return [Due(row.run_id, row.traceparent, row.due_at, frozenset(row.sent)) for row in rows]

    def confirm(self, due: Due, sent: "Collection[str]") -> None:
        """Records what was exported."""
        with self._engine.connect() as connection:
            connection.execute(_CONFIRM, {"run": due.run_id, "taken": due.taken, "sent": sorted(sent)})

    def record(self, run_id: UUID) -> "Json":
        """{"run", "steps", "attempts" (without outputs, oldest first), "turns": [{"name", "at"}]}, each row a dict."""
        turns = select(events.c.name, events.c.at).where(events.c.run_id == run_id, events.c.name.in_((*ENDS, RESUMED)))
        tried = select(*(attempts.c[name] for name in _ATTEMPT)).where(attempts.c.run_id == run_id)
        with self._engine.connect() as connection:

            def rows(query: "Select[Any]") -> "list[Json]":
                return [dict(row) for row in connection.execute(query).mappings()]

            return {
                "run": rows(select(runs).where(runs.c.id == run_id))[0],
                "turns": rows(turns.order_by(events.c.seq).limit(TURNS_MAX)),
                "steps": rows(select(steps).where(steps.c.run_id == run_id)),
                "attempts": rows(tried.order_by(attempts.c.started_at, attempts.c.number).limit(ATTEMPTS_MAX)),
            }

    def outputs(self, run_id: UUID, ids: "Collection[UUID]") -> "dict[UUID, Json]":
        """The outputs of these attempts, by their ids."""
        query = select(attempts.c.id, attempts.c.output).where(attempts.c.run_id == run_id, attempts.c.id.in_(ids))
        with self._engine.connect() as connection:
            return {row.id: row.output for row in connection.execute(query) if row.output is not None}
