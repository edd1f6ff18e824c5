"""What `stepfast doctor` asks Postgres: its clock, the workers, what is not sent, and runs that nothing moves."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import Integer, Text

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from datetime import datetime

    from sqlalchemy import Engine, TextClause

    from app.pipelines.model import Json

# What changed so recently is under way: sweeps come twice a second.
GRACE_S = 10
# A step whose message was sent so long ago, and whose queue is empty, is stuck.
MESSAGE_MAX_S = 300

_SERVER = text("""
    select clock_timestamp() as now, current_setting('server_version') as version, pg_backend_pid() as backend_pid,
           current_setting('statement_timeout') <> '0' as is_limited
""")
_WORKERS = text("""
    select id, host, pid, code_version, has_session
    from stepfast.workers where ended_at is null and lease_until > stepfast.now() order by id limit 1000
""")
_LETTERS = text("""
    select count(*) filter (where resolved_at is null) as open, count(*) filter (
        where published_at is null and created_at < stepfast.now() - :grace * interval '1 s') as unsent
    from stepfast.dead_letters where resolved_at is null or published_at is null
""").bindparams(bindparam("grace", type_=Integer()))
_WAITING = text("""
    select queue, count(*) as steps from stepfast.steps
    where state = 'available' group by queue order by queue limit 100
""")
# Rule 5: every unfinished run has a live lease, a scheduled retry, a message on its way, or a person, key or run that
# it waits for. The first of its steps that should move says what is wrong.
_STUCK = text("""
    with clock as (select stepfast.now() as now)
    select r.id as run_id, r.pipeline, s.agent, s.state, count(*) over () as runs
    from clock, stepfast.runs r left join lateral (
        select agent, state from stepfast.steps where run_id = r.id
          and state in ('executing', 'available', 'retryable', 'suspended') order by state, agent limit 1) s on true
    where r.state in ('pending', 'running', 'suspended')
      and not exists (select from stepfast.events e where e.run_id = r.id and e.seq = r.event_seq
                      and e.at > clock.now - :grace * interval '1 s')
      and not exists (
        select from stepfast.steps m
        left join stepfast.attempts a on a.run_id = m.run_id and a.id = m.attempt_id
        left join stepfast.workers w on w.id = a.worker_id
        where m.run_id = r.id and case m.state
            when 'executing' then w.ended_at is null and w.lease_until > clock.now
            when 'retryable' then m.scheduled_at > clock.now - :grace * interval '1 s'
            when 'available' then m.queue = any (:busy) or m.sent_at > clock.now - :message * interval '1 s'
                or (m.sent_at is null and exists (  -- it waits behind what is sent, and is sent as that begins
                    select from stepfast.steps b where b.queue = m.queue and b.state = 'available'
                      and b.sent_at > clock.now - :message * interval '1 s'))
            when 'suspended' then exists (
                select from stepfast.approvals p where p.run_id = m.run_id and p.agent = m.agent
                  and p.state = 'requested' and coalesce(p.expires_at > clock.now - :grace * interval '1 s', true))
            else false end)
      and coalesce(stepfast.run_under_way(r.tenant, r.pipeline, r.concurrency_key), r.id) = r.id
    order by r.created_at limit :limit
""").bindparams(
    *(bindparam(name, type_=Integer()) for name in ("grace", "message", "limit")),
    bindparam("busy", type_=ARRAY(Text())),
)
# Unfinished runs of which nothing executes and no retry is due later, in which nothing happened for so long but that a
# step was put off again; and not those that wait in a backlog: a worker executes steps of the queue that they wait in.
_STILL = text("""
    with clock as (select stepfast.now() as now),
    unfinished as materialized (
        select id, pipeline, state, created_at, event_seq from stepfast.runs r
        where state in ('pending', 'running', 'suspended') and (:pipeline is null or pipeline = :pipeline)
        order by created_at limit :considered),
    served as materialized (
        select distinct s.queue
        from stepfast.attempts a join stepfast.workers w on w.id = a.worker_id
        join stepfast.steps s on s.run_id = a.run_id and s.agent = a.agent and s.item = a.item, clock
        where a.state = 'executing' and w.ended_at is null and w.lease_until > clock.now)
    select u.id as run_id, u.pipeline, u.state, u.created_at, l.at as since
    from clock, unfinished u cross join lateral (
        select e.at from stepfast.events e
        where e.run_id = u.id and e.name <> 'step.deferred' order by e.seq desc limit 1) l
    where l.at < clock.now - :still_s * interval '1 s'
      and not exists (
        select from stepfast.steps m
        left join stepfast.attempts a on a.run_id = m.run_id and a.id = m.attempt_id
        left join stepfast.workers w on w.id = a.worker_id
        where m.run_id = u.id and case m.state
            when 'executing' then w.ended_at is null and w.lease_until > clock.now
            when 'retryable' then m.scheduled_at > clock.now and m.failures > 0
            when 'available' then m.queue in (select queue from served)
            else false end)
    order by l.at limit :limit
""").bindparams(
    *(bindparam(name, type_=Integer()) for name in ("still_s", "considered", "limit")),
    bindparam("pipeline", type_=Text()),
)
STILL_CONSIDERED_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Server:
    """`is_pooled`: something stands between. `is_limited`: a statement there ends in time by itself."""

    now: "datetime"
    version: str
    is_pooled: bool
    is_limited: bool


class Health:
    """Questions over one engine, each of one statement."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    def _all(self, statement: "TextClause", **parameters: object) -> "list[Json]":
        with self._engine.connect() as connection:
            return [dict(row) for row in connection.execute(statement, parameters).mappings()]

    def server(self) -> "Server":
        """What the server says of itself and of our connection to it."""
        with self._engine.connect() as connection:
            row = connection.execute(_SERVER).one()
            driver = connection.connection.driver_connection
        assert driver is not None
        # As in Presence: a pooler tells its clients another pid than its backend's.
        return Server(row.now, row.version, row.backend_pid != driver.info.backend_pid, row.is_limited)

    def workers(self) -> "Sequence[Json]":
        """Processes that execute steps, with a live lease: id, host, pid, code_version, has_session."""
        return self._all(_WORKERS)

    def dead_letters(self) -> tuple[int, int]:
        """How many are open, and how many should have been sent to the broker and are not."""
        (row,) = self._all(_LETTERS, grace=GRACE_S)
        return row["open"], row["unsent"]

    def available(self) -> dict[str, int]:
        """How many steps wait for a worker, by queue."""
        return {row["queue"]: row["steps"] for row in self._all(_WAITING)}

    def stuck(self, *, busy: "Collection[str]", limit: int) -> "Sequence[Json]":
        """Unfinished runs that nothing will move, oldest first; `busy` are the queues that hold messages.

        Keys: run_id, pipeline, agent and state of a step, and runs: how many there are.
        """
        return self._all(_STUCK, grace=GRACE_S, message=MESSAGE_MAX_S, busy=list(busy), limit=limit)

    def still(self, *, still_s: int, pipeline: str | None, limit: int) -> "Sequence[Json]":
        """Unfinished runs that do not go on, whatever they wait for, those that stand longest first.

        Of the oldest STILL_CONSIDERED_MAX. Keys: run_id, pipeline, state, created_at, since (of the last event).
        """
        return self._all(_STILL, still_s=still_s, pipeline=pipeline, limit=limit, considered=STILL_CONSIDERED_MAX)
