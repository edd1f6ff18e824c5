"""What Postgres knows for metrics: counts that only grow, and how things stand now. Its cost has a bound.

Counts are kept in a table: each question adds what happened since the one before, by whoever asks it, so that they are
right for any number of workers, and go on after every restart. How things stand is read from partial indexes of what
has not ended, and no more than ROWS_MAX of each.
"""

import time
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import bindparam, select, text
from sqlalchemy.types import Integer

from app.runs.database import STATEMENT_TIMEOUT_MS
from app.runs.statements import call
from app.runs.tables import metric_totals

if TYPE_CHECKING:
    from sqlalchemy import Engine

# Later than any statement of ours can commit: what it counts does not change any more.
LAG_MS = STATEMENT_TIMEOUT_MS + 5_000
# Where nobody asked for long, what happened is counted in pieces, for so long a time at once. After a quick piece the
# next one is twice as long: a week in which little happened takes a dozen.
SLICE_MS = 60_000
SLICE_MAX_MS = 86_400_000
QUICK_S = 0.2
COUNTING_MAX_S = 3.0
# Combinations of labels a metric; what comes later is counted as `other`.
SERIES_MAX = 500
ROWS_MAX = 100_000
LABELS_MAX = 50

_COUNT = call("count_events_v1", ("lag_ms", Integer()), ("slice_ms", Integer()), ("series_max", Integer()))


def _capped(name: str, label: str, table: str, where: str) -> str:
    """A part of the statement: how many rows a condition holds for."""
    counted = f"select from stepfast.{table} where {where} limit :rows"  # ours
    return f"select '{name}', '{label}', (select count(*) from ({counted}) found)::float8"  # noqa: S608


# Conditions are written out, so that each is served by the partial index of what has not ended.
_STANDING = text(
    "\n union all ".join(
        [
            *(
                _capped("runs", state, "runs", f"state = '{state}'")
                for state in ("pending", "running", "suspended", "failed")
            ),
            _capped("steps", "executing", "attempts", "state = 'executing'"),
            _capped("steps", "retryable", "steps", "state = 'retryable'"),
            _capped("steps", "unsent", "steps", "state = 'available' and sent_at is null"),
            _capped("steps", "sent", "steps", "state = 'available' and sent_at is not null"),
            _capped("approvals", "", "approvals", "state = 'requested'"),
            _capped("workers", "", "workers", "ended_at is null and lease_until > stepfast.now()"),
            """(select 'letters', code, count(*) from (
                select code from stepfast.dead_letters where resolved_at is null limit :rows) found
              group by code order by count(*) desc, code limit :labels)""",
            # What nobody has sent is as old as what happened to its run last.
            """(select 'queue_age', queue, greatest(0, extract(epoch from stepfast.now() - min(since))) from (
                (select queue, sent_at as since from stepfast.steps
                 where state = 'available' and sent_at is not null order by sent_at limit :rows)
                union all
                (select s.queue, e.at from stepfast.steps s join stepfast.runs r on r.id = s.run_id
                 join stepfast.events e on e.run_id = r.id and e.seq = r.event_seq
                 where s.state = 'available' and s.sent_at is null limit :rows)) waiting
              group by queue order by queue limit :labels)""",
        ]
    )
).bindparams(bindparam("rows", ROWS_MAX, Integer()), bindparam("labels", LABELS_MAX, Integer()))


class Total(NamedTuple):
    """A count since this database was made. `metric`, `label`: see count_events_v1."""

    metric: str
    pipeline: str
    agent: str
    label: str
    total: float


class Metrics:
    """Over one engine."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    def count(self) -> float:
        """Counts what happened until LAG_MS ago, for COUNTING_MAX_S at most. Returns the seconds that are left."""
        now_s = time.monotonic()
        deadline_s, slice_ms = now_s + COUNTING_MAX_S, SLICE_MS
        with self._engine.connect() as connection:
            while True:
                began_s = now_s
                bounds = {"lag_ms": LAG_MS, "slice_ms": slice_ms, "series_max": SERIES_MAX}
                left_s = float(connection.execute(_COUNT, bounds).scalar_one())
                now_s = time.monotonic()
                if left_s == 0 or now_s > deadline_s:
                    return left_s
                slice_ms = min(slice_ms * 2, SLICE_MAX_MS) if now_s - began_s < QUICK_S else SLICE_MS

    def totals(self) -> tuple[Total, ...]:
        """All counts, as one moment knew them."""
        with self._engine.connect() as connection:
            return tuple(Total(*row) for row in connection.execute(select(metric_totals)))

    def standing(self) -> dict[tuple[str, str], float]:
        """How things stand, by name and label.

        runs by state; steps that are executing, retryable, unsent or sent; approvals that are asked for; workers that
        live; letters (open dead letters) by code; queue_age in seconds by queue, of the oldest step that waits in it.
        """
        with self._engine.connect() as connection:
            return {(name, label): float(value) for name, label, value in connection.execute(_STANDING)}
