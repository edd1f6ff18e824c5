"""The statements of the store: a call for each of the database's functions, and the few that need none."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from psycopg.types.json import Jsonb
from sqlalchemy import bindparam, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.types import BigInteger, Boolean, Double, Integer, Text

if TYPE_CHECKING:
    from sqlalchemy import TextClause
    from sqlalchemy.types import TypeEngine


def call(function: str, *parameters: tuple[str, "TypeEngine[Any]"], rows: bool = False) -> "TextClause":
    names = ", ".join(f":{name}" for name, _ in parameters)
    statement = f"select {'* from ' if rows else ''}stepfast.{function}({names})"  # noqa: S608  # names are ours
    return text(statement).bindparams(*(bindparam(name, type_=kind) for name, kind in parameters))


@dataclass(frozen=True, slots=True)
class DriverCall:
    """A call in the driver's own words, for what each step does: see Store._step."""

    sql: str
    names: tuple[str, ...]
    json: frozenset[str]

    def values(self, given: "dict[str, Any]") -> tuple[Any, ...]:
        return tuple(
            Jsonb(given[name]) if name in self.json and given[name] is not None else given[name] for name in self.names
        )


def driver_call(function: str, *parameters: tuple[str, "TypeEngine[Any]"]) -> DriverCall:
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    casts = ", ".join(f"%s::{kind.compile(dialect=dialect)}" for _, kind in parameters)
    return DriverCall(
        f"select stepfast.{function}({casts})",
        tuple(name for name, _ in parameters),
        frozenset(name for name, kind in parameters if isinstance(kind, JSONB)),
    )


_JSON = JSONB(none_as_null=True)
_STEP: tuple[tuple[str, "TypeEngine[Any]"], ...] = (("run", PG_UUID()), ("agent", Text()), ("item", Text()))
_ATTEMPT = (*_STEP, ("attempt", PG_UUID()))
_PAID: tuple[tuple[str, "TypeEngine[Any]"], ...] = (
    ("model", Text()),
    ("request_id", Text()),
    ("usage", _JSON),
    ("cost_usd", Double()),
)

# The run; in the same transaction it marks up to `limit` steps as sent. A row for each, or one without.
START = text("""
    select e.run_id, e.created, u.run_id as sent_run_id, u.pipeline_hash, u.agent, u.item
    from stepfast.enqueue_v1(:pipeline, :input, :key, :tenant, :labels, :priority, :run) e
    left join lateral stepfast.take_unsent_v1(e.run_id, :limit) u on true
""").bindparams(
    bindparam("pipeline", type_=Text()),
    bindparam("input", type_=_JSON),
    bindparam("key", type_=Text()),
    bindparam("tenant", type_=Text()),
    bindparam("labels", type_=_JSON),
    bindparam("priority", type_=Integer()),
    bindparam("run", type_=PG_UUID()),
    bindparam("limit", type_=Integer()),
)
CLAIM = driver_call(
    "claim_v1",
    *_STEP,
    ("pipeline_hash", Text()),
    ("attempt", PG_UUID()),
    ("worker", BigInteger()),
    ("timeout_ms", Integer()),
    ("repeatable", Boolean()),
    ("code_hash", Text()),
    ("reads", ARRAY(Text())),
    ("key_parts", _JSON),
    ("key_inputs", _JSON),
    ("wait_ms", Integer()),
    ("alone", Boolean()),
    ("lean", Boolean()),
)
DEFER = call("defer_v1", *_STEP, ("delay_ms", Integer()), ("reason", Text()))
COMPLETE = driver_call(
    "complete_v1", *_ATTEMPT, ("output", _JSON), *_PAID, ("reused_from", PG_UUID()), ("observed", _JSON)
)
FAIL = call(
    "fail_v1",
    *_ATTEMPT,
    ("action", Text()),
    ("error", _JSON),
    ("retry_ms", Integer()),
    ("counts", Boolean()),
    ("rerun", Text()),
    ("feedback", _JSON),
    *_PAID,
)
SUSPEND = call("suspend_v1", *_ATTEMPT, ("digest", Text()), ("shown", _JSON), ("expires_ms", BigInteger()))
BEGIN_EFFECT = call("begin_effect_v1", *_ATTEMPT, ("key", Text()))
END_EFFECT = call("end_effect_v1", *_ATTEMPT, ("key", Text()), ("output", _JSON))
# It waits for no disk: a step of which a crash forgets that it was sent is sent again; a claim refuses the second.
TAKE_UNSENT = text(
    "select taken.* from set_config('synchronous_commit', 'off', true), stepfast.take_unsent_v1(:run, :limit) taken"
).bindparams(bindparam("run", type_=PG_UUID()), bindparam("limit", type_=Integer()))
TAKE_OVERDUE = call(
    "take_overdue_v1", ("queues", ARRAY(Text())), ("resend_ms", Integer()), ("limit", Integer()), rows=True
)
SWEEP = call(
    "sweep_v1",
    ("lease_ms", Integer()),
    ("grace_ms", Integer()),
    ("resend_ms", Integer()),
    ("limit", Integer()),
    ("worker", BigInteger()),
    ("living", ARRAY(Integer())),
    ("dead", ARRAY(Integer())),
)
HAND_OVER = call("hand_over_v1", ("worker", BigInteger()), ("limit", Integer()))

# As many rows as it has agents where it was new, else none.
PUBLISH = text("""
    with new as (
        insert into stepfast.pipelines (hash, name, version, definition, published_at)
        values (:hash, :name, :version, :definition, stepfast.now()) on conflict (hash) do nothing
        returning hash, definition)
    insert into stepfast.pipeline_agents
        (pipeline_hash, agent, depends_on, snapshots, failure_mode, queue, max_worker_losses, idempotent)
    select new.hash, a->>'id', array(select jsonb_array_elements_text(a->'depends_on')),
           coalesce((select jsonb_object_agg(d->>'agent', d - cast('{agent,consistency}' as text[]))
                     from jsonb_array_elements(a->'declared') d where d->>'consistency' = 'snapshot'), '{}'),
           a->>'failure_mode', a->>'queue', cast(a->'retry_policy'->>'max_worker_losses' as integer),
           a->'idempotent' = 'true'
    from new, jsonb_array_elements(new.definition->'agents') a
""").bindparams(bindparam("definition", type_=_JSON))
MOVE_NAME = text("""
    insert into stepfast.pipeline_names (name, hash, moved_at) values (:name, :hash, stepfast.now())
    on conflict (name) do update set hash = excluded.hash, moved_at = excluded.moved_at
    where pipeline_names.hash <> excluded.hash
""")
OUTPUTS = text(
    "select id, cast(output as text) as output from stepfast.attempts where run_id = :run and id = any(:ids)"
).bindparams(bindparam("ids", type_=ARRAY(PG_UUID())))
DEFINITION = text("select definition from stepfast.pipelines where hash = :hash")
UNPUBLISHED = text("""
    select payload from stepfast.dead_letters where published_at is null order by created_at limit :limit
""")
# Told once, by whoever comes first.
TELL = text("""
    update stepfast.dead_letters
    set payload = case when payload ? 'explanation' then payload else payload || :told end
    where id = :id returning payload
""").bindparams(bindparam("id", type_=PG_UUID()), bindparam("told", type_=_JSON))
MARK_PUBLISHED = text("update stepfast.dead_letters set published_at = stepfast.now() where id = any(:ids)").bindparams(
    bindparam("ids", type_=ARRAY(PG_UUID()))
)
