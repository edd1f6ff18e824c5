"""The columns of the schema `stepfast`, for queries. What each is for, and its CHECKs, stand in migrations/sql."""

from sqlalchemy import (
    ARRAY,
    TIMESTAMP,
    BigInteger,
    Boolean,
    Column,
    Double,
    Integer,
    Interval,
    MetaData,
    Numeric,
    SmallInteger,
    Table,
    Text,
    Uuid,
)
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData(schema="stepfast")
_TIME = TIMESTAMP(timezone=True)


def _table(name: str, *columns: "Column[object]") -> Table:
    return Table(name, metadata, *columns)


def _text(name: str, *, key: bool = False, null: bool = False) -> "Column[object]":
    return Column(name, Text, primary_key=key, nullable=null)


def _time(name: str, *, null: bool = False) -> "Column[object]":
    return Column(name, _TIME, nullable=null)


def _uuid(name: str, *, key: bool = False, null: bool = False) -> "Column[object]":
    return Column(name, Uuid, primary_key=key, nullable=null)


def _json(name: str, *, null: bool = False) -> "Column[object]":
    return Column(name, JSONB, nullable=null)


def _int(name: str, *, key: bool = False) -> "Column[object]":
    return Column(name, Integer, primary_key=key, nullable=False)


def _bool(name: str, *, key: bool = False) -> "Column[object]":
    return Column(name, Boolean, primary_key=key, nullable=False)


meta = _table(
    "meta", _bool("only_row", key=True), _int("min_code_version"), Column("clock_offset", Interval, nullable=False)
)
pipelines = _table(
    "pipelines",
    _text("hash", key=True),
    _text("name"),
    _text("version"),
    _json("definition"),
    _json("concurrency_parts", null=True),
    Column("deadline_ms", BigInteger, nullable=True),
    _text("traced_by", null=True),
    _time("published_at"),
)
pipeline_agents = _table(
    "pipeline_agents",
    _text("pipeline_hash", key=True),
    _text("agent", key=True),
    Column("depends_on", ARRAY(Text), nullable=False),
    _json("snapshots"),
    _text("failure_mode"),
    _text("queue"),
    _int("max_worker_losses"),
    _bool("idempotent"),
)
pipeline_names = _table("pipeline_names", _text("name", key=True), _text("hash"), _time("moved_at"))
runs = _table(
    "runs",
    _uuid("id", key=True),
    _text("tenant"),
    _text("pipeline"),
    _text("pipeline_hash"),
    _text("state"),
    _bool("partial"),
    _json("input"),
    _text("input_hash"),
    _text("key", null=True),
    _json("labels"),
    Column("priority", SmallInteger, nullable=False),
    _text("concurrency_key", null=True),
    _time("deadline_at", null=True),
    _uuid("parent_run_id", null=True),
    _uuid("forked_from_run_id", null=True),
    _bool("observes"),
    Column("event_seq", BigInteger, nullable=False),
    _time("created_at"),
    _time("started_at", null=True),
    _time("ended_at", null=True),
)
steps = _table(
    "steps",
    _uuid("run_id", key=True),
    _text("agent", key=True),
    _text("item", key=True),
    _text("state"),
    _int("generation"),
    Column("depends_on", ARRAY(Text), nullable=False),
    _json("snapshots"),
    _text("failure_mode"),
    _text("queue"),
    _int("max_worker_losses"),
    Column("priority", SmallInteger, nullable=False),
    _time("created_at"),
    _uuid("attempt_id", null=True),
    _int("attempts"),
    _int("failures"),
    _int("worker_losses"),
    _int("waits"),
    _int("rounds"),
    _int("stale_reruns"),
    _json("feedback", null=True),
    _bool("repeats"),
    _time("scheduled_at", null=True),
    _time("sent_at", null=True),
    _int("sends"),
    _time("ended_at", null=True),
)
attempts = _table(
    "attempts",
    _uuid("run_id", key=True),
    _uuid("id", key=True),
    _text("agent"),
    _text("item"),
    _int("generation"),
    _int("number"),
    _text("state"),
    Column("worker_id", BigInteger),
    _text("decided_by", null=True),
    _bool("repeatable"),
    _text("code_hash", null=True),
    _text("key", null=True),
    _text("inputs_hash"),
    _json("reads"),
    _json("stale_reads", null=True),
    _time("started_at"),
    _time("deadline_at"),
    _time("overstayed_at", null=True),
    _time("ended_at", null=True),
    _json("output", null=True),
    _text("output_hash", null=True),
    _json("observed", null=True),
    _uuid("reused_from", null=True),
    _text("model", null=True),
    _text("request_id", null=True),
    _json("usage", null=True),
    Column("cost_usd", Numeric),
    _json("error", null=True),
    _text("error_fingerprint", null=True),
)
keys = _table(
    "keys",
    _text("tenant", key=True),
    _text("pipeline", key=True),
    _text("agent", key=True),
    _text("key", key=True),
    _int("generation", key=True),
    _text("state"),
    _text("inputs_hash"),
    _uuid("run_id"),
    _uuid("attempt_id"),
    _time("reserved_at"),
    _time("ended_at", null=True),
    _json("output", null=True),
    _text("output_hash", null=True),
    _json("observed", null=True),
)
spent_keys = _table(
    "spent_keys",
    _text("tenant", key=True),
    _text("pipeline", key=True),
    _text("key", key=True),
    _uuid("run_id"),
    _text("input_hash"),
    _time("pruned_at"),
)
effects = _table(
    "effects",
    _uuid("run_id", key=True),
    _text("agent", key=True),
    _text("item", key=True),
    _int("generation", key=True),
    _text("key", key=True),
    _text("state"),
    _uuid("attempt_id"),
    _json("output", null=True),
    _time("begun_at"),
    _time("ended_at", null=True),
)
approvals = _table(
    "approvals",
    _uuid("id", key=True),
    _uuid("run_id"),
    _text("agent"),
    _text("item"),
    _int("generation"),
    _text("subject"),
    _text("digest"),
    _uuid("attempt_id"),
    _json("shown"),
    _text("state"),
    _time("requested_at"),
    _time("expires_at", null=True),
    _time("decided_at", null=True),
    _text("decided_by", null=True),
    _text("reason", null=True),
    _text("void_reason", null=True),
)
requests = _table(
    "requests",
    _uuid("id", key=True),
    _uuid("run_id"),
    _text("action"),
    _text("agent", null=True),
    _text("digest", null=True),
    _text("requested_by"),
    _text("login"),
    _text("reason", null=True),
    _text("state"),
    _time("requested_at"),
    _time("ended_at", null=True),
    _json("answer", null=True),
)
dead_letters = _table(
    "dead_letters",
    _uuid("id", key=True),
    _uuid("run_id"),
    _text("agent"),
    _text("item"),
    _int("generation"),
    _uuid("attempt_id", null=True),
    _text("code"),
    _text("error_fingerprint"),
    _json("payload"),
    _time("created_at"),
    _time("published_at", null=True),
    _time("resolved_at", null=True),
    _text("resolution", null=True),
    _text("resolved_by", null=True),
)
events = _table(
    "events",
    _uuid("run_id", key=True),
    Column("seq", BigInteger, primary_key=True),
    _text("name"),
    _time("at"),
    _text("agent", null=True),
    _text("item", null=True),
    Column("generation", Integer),
    _uuid("attempt_id", null=True),
    _json("data"),
)
traces = _table(
    "traces",
    _uuid("run_id", key=True),
    _text("provider"),
    _text("traceparent", null=True),
    _time("due_at", null=True),
    Column("sent", ARRAY(Text), nullable=False),
)
metric_position = _table("metric_position", _bool("only_row", key=True), _time("counted_until"))
metric_totals = _table(
    "metric_totals",
    _text("metric", key=True),
    _text("pipeline", key=True),
    _text("agent", key=True),
    _text("label", key=True),
    Column("total", Double, nullable=False),
)
workers = _table(
    "workers",
    Column("id", BigInteger, primary_key=True),
    _text("host"),
    _int("pid"),
    _int("code_version"),
    _time("started_at"),
    _time("lease_until"),
    Column("parent_id", BigInteger),
    _bool("has_session"),
    _time("suspect_since", null=True),
    _time("ended_at", null=True),
)
awake = _table("awake", _bool("only_row", key=True), _time("since"))
