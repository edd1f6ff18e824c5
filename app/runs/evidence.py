"""What is recorded of a run, read for the checker of the rules, and its event log, read from start to end.

Nothing here is shared with the code that changes or shows runs: no query, no function of the database. A run is read by
one statement, so that what is worked on meanwhile is seen at one moment.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

    from app.pipelines.model import Json

# Bounds the memory, together with the length of a run's log.
RUNS_A_READ = 50


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is recorded of one run, as the statement below reads it. Attempts and steps are by id and by agent."""

    run: "Json"
    agents: "dict[str, Json]"
    steps: "dict[str, Json]"
    attempts: "dict[str, Json]"
    events: "list[Json]"
    letters: "list[Json]"
    approvals: "list[Json]"
    others: "list[Json]"
    keys: "list[Json]"


@dataclass(slots=True)
class Told:
    """What events tell of a step up to some point. `attempt` executes it, or ended it; `last_commit` is an event."""

    state: str = "waiting"
    attempt: str | None = None
    last_commit: "Json | None" = None
    generation: int = 1
    approved: set[int] = field(default_factory=set)

    def tell(self, event: "Json") -> None:
        name = event["name"]
        self.state = _STATE_AFTER.get(name, self.state)
        if name != "step.fenced":  # which may come when the step is in a later one
            self.generation = event["generation"]
        if name == "step.approved":
            self.approved.add(event["generation"])
        if name in STARTS:
            self.attempt = event["attempt_id"]
        if name in COMMITS:
            self.last_commit = event


def strong_ancestors(facts: Facts, agent: str) -> set[str]:
    """What an agent depends on, directly or not, without a snapshot in between."""
    found: set[str] = set()
    waiting = [agent]
    while waiting:
        of = facts.agents[waiting.pop()]
        new = set(of["depends_on"]) - of["snapshots"].keys() - found
        found |= new
        waiting += new
    return found


_IDS = text("select id from stepfast.runs where id > :after order by id limit :limit")

# Letters: those that are open, and those that an event names. Others: runs of the same concurrency key of which
# something is under way. Record: what the keys tell of an attempt. Keys: every generation of the attempts' keys.
_FACTS = text("""
    select to_jsonb(r) - 'input' - 'labels' as run,
        (select jsonb_agg(jsonb_build_object('id', a->'id', 'depends_on', a->'depends_on', 'gate', a->'gate',
                    'failure_mode', a->'failure_mode', 'asks', a->'requires_human_approval', 'snapshots', (
                        select coalesce(jsonb_object_agg(d->>'agent', d), '{}')
                        from jsonb_array_elements(a->'declared') d where d->>'consistency' = 'snapshot')))
         from stepfast.pipelines p, jsonb_array_elements(p.definition->'agents') a
         where p.hash = r.pipeline_hash) as agents,
        (select coalesce(jsonb_agg(to_jsonb(s) - 'feedback'), '[]')
         from stepfast.steps s where s.run_id = r.id) as steps,
        (select coalesce(jsonb_agg(to_jsonb(a) - 'output' - 'usage' - 'error' || jsonb_build_object(
                    'code', a.error->>'code', 'paid', a.usage is not null, 'is_hashed', a.output is null or
                    a.output_hash = encode(sha256(convert_to(a.output::text, 'UTF8')), 'hex'),
                    'record', (select to_jsonb(k) || jsonb_build_object(
                                    'owner_state', o.state, 'owner_key', o.key,
                                    'output_hash', coalesce(o.output_hash, k.output_hash),
                                    'waits_for_a_person', exists (
                                        select from stepfast.steps t where t.run_id = k.run_id and t.agent = k.agent
                                        and t.attempt_id = k.attempt_id and t.state = 'discarded'))
                               from stepfast.keys k left join stepfast.attempts o
                                   on o.run_id = k.run_id and o.id = k.attempt_id
                               where k.tenant = r.tenant and k.pipeline = r.pipeline and k.agent = a.agent
                                 and k.key = a.key and (k.attempt_id in (a.id, a.reused_from)
                                                        or (a.state = 'executing' and k.state = 'completed'))
                               order by k.attempt_id = a.id desc, k.generation desc limit 1)) order by a.number), '[]')
         from stepfast.attempts a where a.run_id = r.id) as attempts,
        (select coalesce(jsonb_agg(to_jsonb(e) - 'run_id' order by e.seq), '[]')
         from stepfast.events e where e.run_id = r.id) as events,
        (select coalesce(jsonb_agg(to_jsonb(d) - 'payload'), '[]') from stepfast.dead_letters d
         where d.id in (select o.id from stepfast.dead_letters o where o.run_id = r.id and o.resolved_at is null
                        union select (e.data->>'dead_letter')::uuid from stepfast.events e
                        where e.run_id = r.id and e.name = 'step.discarded')) as letters,
        (select coalesce(jsonb_agg(to_jsonb(v)), '[]') from stepfast.approvals v
         where v.run_id = r.id and v.state in ('requested', 'approved')) as approvals,
        (select coalesce(jsonb_agg(o.id), '[]')
         from stepfast.runs o where o.tenant = r.tenant and o.pipeline = r.pipeline and o.id <> r.id
            and o.concurrency_key = r.concurrency_key and exists (
                select from stepfast.steps t where t.run_id = o.id
                and t.state in ('available', 'executing', 'retryable', 'suspended'))) as others,
        (select coalesce(jsonb_agg(to_jsonb(k) order by k.agent, k.key, k.generation), '[]') from stepfast.keys k
         where k.tenant = r.tenant and k.pipeline = r.pipeline and (k.agent, k.key) in (
            select a.agent, a.key from stepfast.attempts a where a.run_id = r.id)) as keys
    from stepfast.runs r where r.id = any(:ids)
""")

OUTPUTS = text("""
    select t.agent, t.output, r.input from stepfast.runs r left join stepfast.attempts t
        on t.run_id = r.id and t.id = any(cast(:ids as uuid[])) where r.id = :run
""")

# Keys that no step of their run leads to: reserved without an attempt that executes, or of an attempt that is gone.
LOST_KEYS = text("""
    select k.run_id, k.agent, k.key, k.state from stepfast.keys k
        left join stepfast.attempts a on a.run_id = k.run_id and a.id = k.attempt_id
        left join stepfast.steps s on s.run_id = k.run_id and s.agent = k.agent and s.attempt_id = k.attempt_id
    where exists (select from stepfast.runs r where r.id = k.run_id)
      and case k.state when 'reserved' then a.state is distinct from 'executing'
                       when 'unknown' then s.state is distinct from 'discarded'
                       else a.state is distinct from 'completed' end
    limit :limit
""")


def read_facts(connection: "Connection", run_id: UUID | None) -> "Iterator[Facts]":
    after = UUID(int=0)
    while (
        ids := [run_id] if run_id else list(connection.execute(_IDS, {"after": after, "limit": RUNS_A_READ}).scalars())
    ):
        for row in connection.execute(_FACTS, {"ids": ids}):
            yield Facts(
                row.run,
                {agent["id"]: agent for agent in row.agents},
                {step["agent"]: step for step in row.steps},
                {attempt["id"]: attempt for attempt in row.attempts},
                *(row.events, row.letters, row.approvals, row.others, row.keys),
            )
        if run_id:
            return
        after = ids[-1]


# Reading the events.

_STATE_AFTER = {
    "step.claimed": "executing",
    "step.completed": "completed",
    "step.reused": "completed",
    "step.settled": "completed",
    "step.overridden": "completed",
    "step.discarded": "discarded",
    "step.rejected": "cancelled",
    "step.expired": "cancelled",
    "step.retry_scheduled": "waiting",
    "step.rerun": "waiting",
    "step.rescued": "waiting",
    "step.suspended": "waiting",
    "step.reopened": "waiting",
}
_RUN_STATE_AFTER = {
    "run.enqueued": "pending",
    "step.claimed": "running",
    "run.suspended": "suspended",
    "run.continued": "running",
    "run.resumed": "running",
    "run.completed": "completed",
    "run.failed": "failed",
    "run.cancelled": "cancelled",
}
STARTS = {"step.claimed", "step.overridden"}
COMMITS = {"step.completed", "step.reused", "step.settled", "step.overridden"}
ENDS = _STATE_AFTER.keys() - {"step.claimed", "step.rejected", "step.expired"} | {"step.cancelled"}


def replay(facts: Facts) -> "Iterator[tuple[Json, dict[str, Told], str]]":
    """Each event, with what those before it tell of every step and of the run; last, an empty one."""
    told = {agent: Told() for agent in facts.steps}
    run_state = "pending"
    for event in facts.events:
        yield event, told, run_state
        name, step = event["name"], told.get(event["agent"])
        run_state = _RUN_STATE_AFTER.get(name, run_state)
        if name == "run.resumed" and "waits_for" in event["data"]:
            run_state = "pending"
        if name == "run.cancelled":
            for each in told.values():
                each.state = "cancelled" if each.state in {"waiting", "executing"} else each.state
        elif name == "run.resumed":
            for agent in event["data"]["agents"]:
                told[agent].state = "waiting" if told[agent].state in {"discarded", "cancelled"} else told[agent].state
        elif step:
            step.tell(event)
    yield {"name": "", "agent": None}, told, run_state
