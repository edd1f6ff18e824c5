"""What happened in a while, over all runs or those of one pipeline: each part is one statement that an index serves.

Runs and dead letters count by their creation, attempts by their start, the rest by its event: all since one time. How
much that is, is for whoever asks: a statement that takes longer than STATEMENT_TIMEOUT_MS is given up.
"""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import Integer, Interval, Text

from app.errors import NotReady

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from app.pipelines.model import Json

# Of each list, the rows that come first.
ROWS_MAX = 20

_OF = "(:pipeline is null or r.pipeline = :pipeline)"
_EVENTS = f"stepfast.events e join stepfast.runs r on r.id = e.run_id where e.at >= :since and {_OF}"
_ATTEMPTS = f"stepfast.attempts a join stepfast.runs r on r.id = a.run_id where a.started_at >= :since and {_OF}"

PARTS = {
    "runs": f"""
        select state, partial, count(*) as count from stepfast.runs r
        where r.created_at >= :since and {_OF} group by state, partial order by state, partial limit :rows""",
    "events": f"""
        select e.name, count(*) as count from {_EVENTS}
          and e.name in ('step.rescued', 'step.retry_scheduled', 'step.fenced', 'step.rerun', 'run.resumed')
        group by e.name""",
    "retries": f"""
        select r.pipeline, e.agent, e.data->>'code' as code, count(*) as count from {_EVENTS}
          and e.name = 'step.retry_scheduled' group by 1, 2, 3 order by count(*) desc, 1, 2, 3 limit :rows""",
    # From when a worker was first in doubt to when another began its step.
    "recoveries": f"""
        select e.data->>'reason' as reason, count(*) as count, count(n.at) as begun_again,
               percentile_cont(0.5) within group (order by n.seconds) as p50_s,
               percentile_cont(0.95) within group (order by n.seconds) as p95_s, max(n.seconds) as max_s
        from (select e.* from {_EVENTS} and e.name = 'step.rescued') e
        left join stepfast.workers w on w.id = (e.data->>'worker')::bigint and e.data->>'reason' = 'died'
        left join lateral (
            select min(a.started_at) as at,
                   extract(epoch from min(a.started_at) - least(w.suspect_since, e.at))::float8 as seconds
            from stepfast.attempts a
            where a.run_id = e.run_id and a.agent = e.agent and a.item = e.item and a.started_at >= e.at) n on true
        group by 1 order by 2 desc, 1 limit :rows""",
    "workers_lost": f"""
        select (e.data->>'worker')::bigint as worker, w.host, w.pid, w.ended_at, count(*) as steps,
               array_agg(distinct r.pipeline || '.' || e.agent) as agents, count(*) over () as workers_of_all
        from (select e.* from {_EVENTS} and e.name = 'step.rescued' and e.data->>'reason' = 'died') e
        join stepfast.runs r on r.id = e.run_id
        left join stepfast.workers w on w.id = (e.data->>'worker')::bigint
        group by 1, 2, 3, 4 order by w.ended_at desc nulls last, 1 desc limit :rows""",
    # Paid for and not used. Of calls that were lost with their worker nobody knows: they are estimated at what the same
    # agent's calls cost on average.
    "wasted": f"""
        select 'failed' as how, a.error->>'code' as code, count(*) as calls, sum(a.cost_usd)::float8 as cost_usd,
               count(*) filter (where a.cost_usd is null) as unpriced, null::float8 as estimate_usd
        from {_ATTEMPTS} and a.state = 'failed' and a.usage is not null group by 2
        union all
        select 'fenced', e.data->>'code', count(*), sum((e.data->>'cost_usd')::float8),
               count(*) filter (where e.data->>'cost_usd' is null), null
        from {_EVENTS} and e.name = 'step.fenced' and e.data->'usage' <> 'null' group by 2
        union all
        select 'lost', l.code, count(*), null, count(*), sum(m.mean)::float8 from (
            select r.pipeline, a.agent, a.error->>'code' as code from {_ATTEMPTS}
              and a.state = 'lost' and a.code_hash is null and a.decided_by is null
              and not exists (select from stepfast.events f where f.run_id = a.run_id and f.attempt_id = a.id
                              and f.name = 'step.fenced')) l
        left join (select r.pipeline, a.agent, avg(a.cost_usd) as mean from {_ATTEMPTS} and a.cost_usd is not null
                   group by 1, 2) m on m.pipeline = l.pipeline and m.agent = l.agent
        group by 2
        order by 1, 2""",
    "dead_letters": f"""
        select d.error_fingerprint, min(r.pipeline) as pipeline, min(d.agent) as agent, min(d.code) as code,
               count(*) as count, count(*) filter (where d.resolved_at is null) as open, max(d.created_at) as newest,
               (array_agg(d.run_id order by d.created_at desc))[1] as run_id,
               (array_agg(d.payload->>'message' order by d.created_at desc))[1] as message
        from stepfast.dead_letters d join stepfast.runs r on r.id = d.run_id
        where d.created_at >= :since and {_OF}
        group by d.error_fingerprint order by count(*) desc, max(d.created_at) desc limit :rows""",
    "slowest": f"""
        select pipeline, agent, count(*) as attempts, percentile_cont(0.5) within group (order by seconds) as p50_s,
               percentile_cont(0.95) within group (order by seconds) as p95_s, max(seconds) as max_s
        from (select r.pipeline, a.agent, extract(epoch from a.ended_at - a.started_at)::float8 as seconds
              from {_ATTEMPTS} and a.state = 'completed' and a.reused_from is null and a.decided_by is null) took
        group by 1, 2 order by p95_s desc, 1, 2 limit :rows""",
    "costs": f"""
        select pipeline, coalesce(model, 'unknown') as model, count(*) as calls,
               sum((usage->>'input_tokens')::bigint)::bigint as input_tokens,
               sum((usage->>'output_tokens')::bigint)::bigint as output_tokens,
               sum(cost_usd)::float8 as cost_usd, count(*) filter (where cost_usd is null) as unpriced,
               (sum(sum(cost_usd)) over ())::float8 as usd_of_all,
               (sum(count(*) filter (where cost_usd is null)) over ())::bigint as unpriced_of_all
        from (select r.pipeline, a.model, a.usage, a.cost_usd from {_ATTEMPTS} and a.usage is not null
              union all
              select r.pipeline, e.data->>'model', e.data->'usage', (e.data->>'cost_usd')::numeric from {_EVENTS}
                and e.name = 'step.fenced' and e.data->'usage' <> 'null') paid
        group by 1, 2 order by cost_usd desc nulls last, 1, 2 limit :rows""",
}  # ours, without a value of anybody's
_NOW = text("select stepfast.now()")
_AGO = text("select stepfast.now() - :ago").bindparams(bindparam("ago", type_=Interval()))
_TOOK_TOO_LONG = "57014"


def statement(query: str, since: datetime, pipeline: str | None) -> Any:  # noqa: ANN401  # SQLAlchemy's type
    """A part of the report, with its bounds."""
    bounds = (
        bindparam("since", since, TIMESTAMP(timezone=True)),
        bindparam("pipeline", pipeline, Text()),
        bindparam("rows", ROWS_MAX, Integer()),
    )
    return text(query).bindparams(*(bound for bound in bounds if f":{bound.key}" in query))


def report(engine: "Engine", *, since: datetime | timedelta, pipeline: str | None) -> "Json":
    """The report, of plain JSON types. Raises NotReady where it is too much for one statement.

    Keys: since, until, pipeline; runs ({state: count}; those that completed in part are `partial`); recoveries
    (reason, count, begun_again, p50_s, p95_s, max_s: from the first doubt to the next attempt); workers_lost (worker,
    host, pid, ended_at, steps, agents); resumed (runs, by people), retries (pipeline, agent, code, count), reruns
    (review rounds), fence_refusals; costs (by pipeline and model), wasted (how: failed, fenced or lost; code, calls,
    cost_usd, unpriced, estimate_usd), cost_usd and wasted_usd (sums of what is priced); dead_letters (by fingerprint:
    count, open, newest, …); slowest (agents by p95: attempts, p50_s, p95_s, max_s). Each list has at most ROWS_MAX
    rows; workers_lost_total, rescued_total, retries_total, unpriced_total and cost_usd are of all that there are.
    """
    with engine.connect() as connection:
        until = connection.execute(_NOW).scalar_one()
        begin = connection.execute(_AGO, {"ago": since}).scalar_one() if isinstance(since, timedelta) else since
        parts = {name: _rows(connection, query, begin, pipeline) for name, query in PARTS.items()}
    events = {row["name"]: row["count"] for row in parts["events"]}
    return {
        "since": _plain(begin),
        "until": _plain(until),
        "pipeline": pipeline,
        "runs": {"partial" if row["partial"] else row["state"]: row["count"] for row in parts["runs"]},
        "rescued_total": events.get("step.rescued", 0),
        "recoveries": parts["recoveries"],
        "workers_lost_total": _of_all(parts["workers_lost"], "workers"),
        "workers_lost": parts["workers_lost"],
        "resumed": events.get("run.resumed", 0),
        "retries_total": events.get("step.retry_scheduled", 0),
        "retries": parts["retries"],
        "reruns": events.get("step.rerun", 0),
        "fence_refusals": events.get("step.fenced", 0),
        "cost_usd": _of_all(parts["costs"], "usd"),
        "unpriced_total": _of_all(parts["costs"], "unpriced"),
        "wasted_usd": round(sum(row["cost_usd"] or 0.0 for row in parts["wasted"]), 6),
        **{name: parts[name] for name in ("costs", "wasted", "dead_letters", "slowest")},
    }


def _rows(connection: "Connection", query: str, since: datetime, pipeline: str | None) -> "list[Json]":
    try:
        found = connection.execute(statement(query, since, pipeline)).mappings()
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) != _TOOK_TOO_LONG:
            raise
        raise NotReady(
            "There is too much to report of: a part of it took too long.",
            next_step="Ask for less: --since 1h, or --pipeline NAME.",
        ) from error
    return [{name: _plain(value) for name, value in row.items()} for row in found]


def _of_all(rows: "list[Json]", what: str) -> float:
    """Takes out of each row what stands in all of them: a sum over all rows, also those that did not come first."""
    return max((row.pop(f"{what}_of_all") or 0 for row in rows), default=0)


def _plain(value: object) -> object:
    match value:
        case datetime():
            return value.astimezone(UTC).isoformat(timespec="milliseconds")
        case float():
            return round(value, 6)
        case None | int() | list():
            return value
    return str(value)
