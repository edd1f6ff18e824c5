"""The outbox of traces: which runs have something to export, what is recorded of them, and what was exported.

Whoever takes a run reaches its provider. At least once: it has the run for a while, and the run is due again where
nobody confirms. Ids of spans are hashes: one that is exported twice is the same span.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import bindparam, func, select, text
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
ERROR_MAX_CHARS = 1_000
# By these a run ends and goes on: they bound its segments.
ENDS = ("run.completed", "run.failed", "run.cancelled")
RESUMED = "run.resumed"

_TAKE = text("""
    update stepfast.traces t set due_at = stepfast.now() + :lease_s * interval '1 s'
    from (select run_id from stepfast.traces where provider = :provider and due_at <= stepfast.now()
          order by due_at limit :limit for update skip locked) due
    where t.run_id = due.run_id returning t.run_id, t.traceparent, t.due_at, t.sent
""")
# Due for somebody else's change meanwhile, it stays due; where there is more of it, it is due again at once.
_CONFIRM = text("""
    update stepfast.traces
    set sent = sent || :sent, due_at = case when due_at <> :taken then due_at when :more then stepfast.now() end
    where run_id = :run
""").bindparams(bindparam("sent", type_=ARRAY(Text())), bindparam("run", type_=PG_UUID()))
_GIVE_UP = text("""
    update stepfast.traces t set due_at = null
    from (select run_id from stepfast.traces
          where provider = any (:providers) and due_at < stepfast.now() - :tried_s * interval '1 s'
          limit :limit for update skip locked) old
    where t.run_id = old.run_id
""").bindparams(bindparam("providers", type_=ARRAY(Text())))
_RUN = ("id", "pipeline_hash", "tenant", "labels", "input", "created_at", "ended_at")
_STEP = ("agent", "generation", "state", "attempt_id", "ended_at")
_ATTEMPT = (
    *("id", "agent", "item", "generation", "number", "state", "worker_id", "decided_by", "reads", "started_at"),
    *("ended_at", "reused_from", "model", "usage", "cost_usd"),
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

    def take(self, provider: str, lease_s: float, limit: int) -> list[Due]:
        """Takes runs of a provider that are due, which are due again after `lease_s`."""
        with self._engine.connect() as connection:
            rows = connection.execute(_TAKE, {"provider": provider, "lease_s": lease_s, "limit": limit}).all()
        return [Due(row.run_id, row.traceparent, row.due_at, frozenset(row.sent)) for row in rows]

    def confirm(self, due: Due, sent: "Collection[str]", *, more: bool = False) -> None:
        """Records what was exported, and whether there is more."""
        values = {"run": due.run_id, "taken": due.taken, "sent": sorted(sent), "more": more}
        with self._engine.connect() as connection:
            connection.execute(_CONFIRM, values)

    def give_up(self, providers: "Collection[str]", tried_s: float, limit: int) -> int:
        """Gives up what nobody took for so long: no worker reaches its provider. Returns of how many runs."""
        values = {"providers": list(providers), "tried_s": tried_s, "limit": limit}
        with self._engine.connect() as connection:
            return connection.execute(_GIVE_UP, values).rowcount

    def record(self, run_id: UUID) -> "Json":
        """{"run", "steps", "attempts" (without outputs, oldest first), "turns": [{"name", "at"}]}, each row a dict.

        What a lost attempt came with too late stands at it: it was paid for.
        """
        turns = select(events.c.name, events.c.at).where(events.c.run_id == run_id, events.c.name.in_((*ENDS, RESUMED)))
        error = attempts.c.error
        tried = select(
            *(attempts.c[name] for name in _ATTEMPT),
            error["code"].astext.label("code"),
            func.left(error["message"].astext, ERROR_MAX_CHARS).label("message"),
        ).where(attempts.c.run_id == run_id)
        fenced = select(events.c.attempt_id, events.c.data).where(
            events.c.run_id == run_id, events.c.name == "step.fenced"
        )
        with self._engine.connect() as connection:

            def rows(query: "Select[Any]") -> "list[Json]":
                return [dict(row) for row in connection.execute(query).mappings()]

            found: Json = {
                "run": rows(select(*(runs.c[name] for name in _RUN)).where(runs.c.id == run_id))[0],
                "turns": rows(turns.order_by(events.c.seq).limit(TURNS_MAX)),
                "steps": rows(select(*(steps.c[name] for name in _STEP)).where(steps.c.run_id == run_id)),
                "attempts": rows(tried.order_by(attempts.c.started_at, attempts.c.number).limit(ATTEMPTS_MAX)),
            }
            if any(entry["state"] == "lost" for entry in found["attempts"]):
                paid = {row["attempt_id"]: row["data"] for row in rows(fenced.limit(ATTEMPTS_MAX))}
                for entry in found["attempts"]:
                    entry |= {name: paid[entry["id"]][name] for name in ("usage", "cost_usd") if entry["id"] in paid}
            return found

    def output(self, run_id: UUID, attempt_id: UUID) -> "Json | None":
        """The output of an attempt, if it has one. It may be large: who reads many keeps none."""
        query = select(attempts.c.output).where(attempts.c.run_id == run_id, attempts.c.id == attempt_id)
        with self._engine.connect() as connection:
            return connection.execute(query).scalar()
