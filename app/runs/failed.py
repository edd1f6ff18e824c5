"""Failed and partial runs in bulk: which of them a resume can mend, counted by what went wrong, read in pages."""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.types import Integer, Interval, Text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import timedelta

    from sqlalchemy import Engine, TextClause

PAGE_RUNS = 500
KINDS_MAX = 1_000
_FIRST = (datetime.fromisoformat("0001-01-01T00:00:00+00:00"), UUID(int=0))

# In which way each failed run may or may not be mended is the view's to say.
_JUDGED = """
    select * from stepfast.v_failed_runs
    where ended_at <= :until and (:since is null or ended_at >= :since) and (:pipeline is null or pipeline = :pipeline)
"""


def _statement(query: str, **parameters: Any) -> "TextClause":  # noqa: ANN401  # SQLAlchemy's types
    types = {
        "until": TIMESTAMP(timezone=True),
        "since": TIMESTAMP(timezone=True),
        "pipeline": Text(),
        "limit": Integer(),
    } | parameters
    return text(query).bindparams(*(bindparam(name, type_=kind) for name, kind in types.items()))


_COUNT = _statement(f"""
    select held, pipeline, agent, code, error_fingerprint, count(*) as count, min(message) as message,
        (array_agg(id order by created_at))[1] as example
    from ({_JUDGED}) judged group by held, pipeline, agent, code, error_fingerprint
    order by held is not null, count(*) desc, pipeline, agent, error_fingerprint limit :limit
""")  # noqa: S608  # the query is ours
_PAGE = _statement(
    f"""
    select id, created_at
    from ({_JUDGED} and created_at >= :after_at and (created_at, id) > (:after_at, :after_id)) judged
    where held is null and pipeline = :of and error_fingerprint is not distinct from :fingerprint
    order by created_at, id limit :limit
""",  # noqa: S608
    after_at=TIMESTAMP(timezone=True),
    after_id=PG_UUID(),
    of=Text(),
    fingerprint=Text(),
)
_NOW = text("select stepfast.now()")
_AGO = text("select stepfast.now() - :ago").bindparams(bindparam("ago", type_=Interval()))
_PROGRESS = text("""
    select r.state as run_state, s.state, d.error_fingerprint, d.code, d.payload->>'message' as message
    from stepfast.runs r left join stepfast.steps s on s.run_id = r.id and s.agent = :agent
    left join stepfast.dead_letters d on d.run_id = s.run_id and d.agent = s.agent and d.resolved_at is null
    where r.id = :run
""").bindparams(bindparam("run", type_=PG_UUID()), bindparam("agent", type_=Text()))


@dataclass(frozen=True, slots=True)
class Kind:
    """Failed runs of one cause. `held` says why a resume would not help them, and is None where it may.

    `agent`, `code` and `error_fingerprint` are None where no dead letter is open. `example` is the oldest run.
    """

    held: str | None
    pipeline: str
    agent: str | None
    code: str | None
    error_fingerprint: str | None
    count: int
    message: str | None
    example: UUID


class FailedRuns:
    """Those that had failed when this was made, of one pipeline and since a time, where given."""

    def __init__(self, engine: "Engine", *, pipeline: str | None, since: "datetime | timedelta | None") -> None:
        self._engine = engine
        with engine.connect() as connection:
            until = connection.execute(_NOW).scalar_one()
            if since is not None and not isinstance(since, datetime):
                since = connection.execute(_AGO, {"ago": since}).scalar_one()
        # What fails again while this is read is left out, so that reading ends.
        self._bounds = {"until": until, "since": since, "pipeline": pipeline}

    def kinds(self) -> tuple[Kind, ...]:
        """What went wrong, how often: what a resume may mend first, the most frequent first; at most KINDS_MAX."""
        with self._engine.connect() as connection:
            rows = connection.execute(_COUNT, {**self._bounds, "limit": KINDS_MAX}).all()
        return tuple(Kind(**row._mapping) for row in rows)  # noqa: SLF001  # a row's own dictionary

    def pages(self, kind: Kind) -> "Iterator[list[UUID]]":
        """The ids of a kind's runs, oldest first, PAGE_RUNS at a time. What is resumed meanwhile moves no page."""
        after_at, after_id = _FIRST
        while True:
            given = {"of": kind.pipeline, "fingerprint": kind.error_fingerprint, "limit": PAGE_RUNS}
            with self._engine.connect() as connection:
                rows = connection.execute(
                    _PAGE, {**self._bounds, **given, "after_at": after_at, "after_id": after_id}
                ).all()
            if rows:
                yield [row.id for row in rows]
            if len(rows) < PAGE_RUNS:
                return
            after_at, after_id = rows[-1].created_at, rows[-1].id

    def progress(self, run_id: UUID, agent: str | None) -> "Mapping[str, str | None]":
        """How a run that was resumed stands.

        Keys: run_state; state of the agent; error_fingerprint, code and message of its open dead letter.
        """
        with self._engine.connect() as connection:
            return dict(connection.execute(_PROGRESS, {"run": run_id, "agent": agent}).one()._mapping)  # noqa: SLF001
