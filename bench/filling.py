"""Finished runs by the hundred thousand: a few are done, and copied, as old as one likes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg

# A batch is a transaction of a few seconds.
BATCH_RUNS = 20_000
# How full pages are, in per cent, once their rows have had their last update, as measured. A copy has none.
FULL = {"runs": 75, "steps": 80, "attempts": 95, "keys": 75, "events": 100, "dead_letters": 100}


@dataclass(frozen=True, slots=True)
class Template:
    """A finished run, and how many of a hundred are to be like it."""

    run_id: UUID
    percent: int


def fill(
    connection: psycopg.Connection[Any],
    templates: Sequence[Template],
    runs: int,
    *,
    newest_h: float,
    oldest_h: float,
    say: Callable[[str], None],
) -> None:
    """Copies templates, the oldest first, which ended so many hours ago. `connection` is a superuser's, in autocommit.

    Ids are random, as `enqueue_v1` makes them, and no row refers to another run's. All indexes stay.
    """
    # No triggers: they hold foreign keys, which are right here, and that a run begins at its beginning.
    connection.execute("set session_replication_role = replica")
    connection.execute("set synchronous_commit = off")
    shares = [template.run_id for template in templates for _ in range(template.percent)]
    assert len(shares) == 100, "the templates' percentages make a hundred"
    for table in FULL:
        of = "id" if table == "runs" else "run_id"
        connection.execute(
            f"create temp table source_{table} as select * from stepfast.{table} where {of} = any(%s)", [shares]
        )
    copies = {table: _copy(connection, table) for table in FULL}
    declared = connection.execute(
        "select relname, coalesce((select option_value from pg_options_to_table(reloptions)"
        " where option_name = 'fillfactor'), '100') from pg_class"
        " where relnamespace = 'stepfast'::regnamespace and relname = any(%s)",
        [list(FULL)],
    ).fetchall()
    for table, percent in FULL.items():
        connection.execute(f"alter table stepfast.{table} set (fillfactor = {percent})")
    began_s = said_s = time.monotonic()
    for first in range(0, runs, BATCH_RUNS):
        last = min(first + BATCH_RUNS, runs)
        with connection.transaction():
            # 37 has no divisor in common with 100: kinds are mixed, not one after the other.
            connection.execute(
                "create temp table copies on commit drop as"
                " select n, gen_random_uuid() as id, (%s::uuid[])[1 + n * 37 %% 100] as template,"
                " interval '1 hour' * (%s::float8 + %s::float8 * (1 - n / %s::float8)) as age"
                " from generate_series(%s::int, %s::int) n",
                [shares, newest_h, oldest_h - newest_h, runs, first, last - 1],
            )
            connection.execute("analyze copies")
            for copy in copies.values():
                connection.execute(copy)
        connection.execute("vacuum stepfast.events")  # as autovacuum does after so many
        if time.monotonic() - said_s > 10:
            said_s = time.monotonic()
            say(f"  {last:,} of {runs:,} runs copied, {last / (said_s - began_s):,.0f} a second")
    for table, percent in declared:
        connection.execute(f"alter table stepfast.{table} set (fillfactor = {percent})")
    # What is older than its newest run is not to be counted once more.
    connection.execute("update stepfast.metric_position set counted_until = stepfast.now()")
    connection.execute("reset session_replication_role")
    connection.execute("vacuum (analyze)")
    say(f"  {runs:,} runs copied in {time.monotonic() - began_s:.0f} s")


def _copy(connection: psycopg.Connection[Any], table: str) -> str:
    """The statement that copies a batch's rows of one table."""
    columns = connection.execute(
        "select attname, format_type(atttypid, null) from pg_attribute where attrelid = %s::regclass"
        " and attnum > 0 and not attisdropped order by attnum",
        [f"stepfast.{table}"],
    ).fetchall()
    values = ", ".join(_value(table, name, kind) for name, kind in columns)
    names = ", ".join(name for name, _ in columns)
    of = "id" if table == "runs" else "run_id"
    # In the order of the ids: each page of an index is then visited once a batch.
    return (
        f"insert into stepfast.{table} ({names}) select {values}"
        f" from copies c join source_{table} t on t.{of} = c.template order by c.id"
    )


def _value(table: str, name: str, kind: str) -> str:
    match table, name:
        case ("runs", "id") | (_, "run_id"):
            return "c.id"
        case ("runs", "key"):
            return "t.key || '-' || c.n"
        case (("attempts" | "keys"), "key"):
            return "replace(t.key, t.run_id::text, c.id::text)"
        case ("dead_letters", "id"):
            return "gen_random_uuid()"
    return f"t.{name} - c.age" if kind == "timestamp with time zone" else f"t.{name}"
