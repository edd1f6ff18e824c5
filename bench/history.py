"""`make history`: whether finished runs in the tables slow what runs now.

Two databases on one server: one empty, one with so many finished runs. The same work goes to each in turns, so that
whatever else the machine does hits both: runs of four agents that do nothing, by two real workers; then single calls.
A third side has the finished runs, too, and ids of new runs in the order of time instead of random ones.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psycopg
import system as systems  # first: it makes our own packages importable
from calls import Caller, Costs, ran_ns
from filling import Template, fill
from report import machine
from soak import say
from sqlalchemy import text

from app import embedded
from app.pipelines import loader
from app.pipelines.model import Pipeline
from app.runs.database import engine, migrate
from app.runs.store import Store

# Of steps a second, with the history to without.
RATIO_MIN = 0.9
ROUND_TIMEOUT_S = 300.0
# While the history is made, nothing of it needs to survive a crash.
FILLING = {"full_page_writes": "off", "max_wal_size": "'16GB'", "checkpoint_timeout": "'1h'"}


@dataclass(slots=True)
class Side:
    """A database, with workers of its own, and what was measured on it."""

    name: str
    url: str
    make_id: Callable[[], UUID]
    running: systems.System
    rounds: list[dict[str, float]] = field(default_factory=list)
    costs: Costs = field(default_factory=Costs)

    @property
    def database(self) -> str:
        return self.url.partition("?")[0].rpartition("/")[2]

    def connect(self) -> "psycopg.Connection[Any]":
        return psycopg.connect(self.url.replace("+psycopg", ""), autocommit=True)


def ordered_id() -> UUID:
    """A UUID of version 7: the time first, in milliseconds, then chance."""
    chance = uuid4().int
    at_ms = time.time_ns() // 1_000_000
    return UUID(int=at_ms << 80 | 0x7 << 76 | (chance >> 64 & 0xFFF) << 64 | chance & (1 << 64) - 1)


@contextmanager
def server(home: Path, shared_buffers: str) -> Iterator[embedded.Servers]:
    """The embedded servers, Postgres with so much of a cache."""
    postgres = embedded._Postgres  # noqa: SLF001  # nobody else needs this setting to be another
    original = postgres.arguments
    # The last one counts.
    postgres.arguments = lambda self: [*original(self), f"--shared_buffers={shared_buffers}"]  # type: ignore[method-assign]
    try:
        with embedded.servers(home, on_progress=say) as running:
            yield running
    finally:
        postgres.arguments = original  # type: ignore[method-assign]


def url_of(running: embedded.Servers, database: str) -> str:
    return running.database_url.replace(f"/{embedded.DATABASE}?", f"/{database}?")


def prepare(running: embedded.Servers, pipeline: Pipeline, runs: int) -> None:
    """Makes both databases, where they are not there from before, and fills one."""
    with psycopg.connect(running.database_url.replace("+psycopg", ""), autocommit=True) as connection:
        there = {name for (name,) in connection.execute("select datname from pg_database")}
        for name in sorted({"empty", "full"} - there):
            connection.execute(f'create database "{name}"')
            migrate(url_of(running, name))
            store = Store(engine(url_of(running, name), pool_max=1))
            store.publish(pipeline)
            store.engine.dispose()
        if "full" in there:
            return
        for name, value in FILLING.items():
            connection.execute(f"alter system set {name} = {value}")
        connection.execute("select pg_reload_conf()")
        url = url_of(running, "full")
        caller = Caller(url, pipeline)
        templates = [
            Template(caller.template(), 68),
            Template(caller.template(key="order", labels={"team": "a", "source": "shop"}), 24),
            Template(caller.template(fails=1), 5),
            Template(caller.template(fails=3), 2),
            Template(settled(caller), 1),
        ]
        caller.close()
        with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as filler:
            fill(filler, templates, runs, newest_h=2, oldest_h=24 * 40, say=say)
        connection.execute("alter system reset all")
        connection.execute("select pg_reload_conf()")
        connection.execute("checkpoint")


def finished(running: embedded.Servers, database: str) -> int:
    with psycopg.connect(url_of(running, database).replace("+psycopg", "")) as connection:
        return int(connection.execute("select count(*) from stepfast.runs where ended_at is not null").fetchall()[0][0])


def settled(caller: Caller) -> UUID:
    """A run that failed, whose dead letter was closed."""
    run_id = caller.template(fails=3)
    with caller.store.engine.connect() as connection:
        connection.execute(
            text(
                "update stepfast.dead_letters set resolved_at = stepfast.now(), resolution = 'discarded',"
                " resolved_by = 'bench' where run_id = :run"
            ),
            {"run": run_id},
        )
        # All that there are, or the workers would be busy with sending their copies.
        connection.execute(text("update stepfast.dead_letters set published_at = stepfast.now()"))
    return run_id


def sides(running: embedded.Servers, home: Path, stack: ExitStack) -> list[Side]:
    """Empty, full, and full with ordered ids; each database has two workers, which wait."""
    made: dict[str, systems.System] = {}
    environ = {n: v for n, v in os.environ.items() if not n.startswith(("STEPFAST_", "ANTHROPIC_"))}
    for number, name in enumerate(("empty", "full"), 1):
        folder = home / name
        folder.mkdir(exist_ok=True)
        given = {
            "STEPFAST_DATABASE_URL": url_of(running, name),
            "STEPFAST_BROKER_URL": running.broker_url.replace("virtual_host=0", f"virtual_host={number}"),
            "STEPFAST_HOME": str(folder),
            "STEPFAST_SKILLS": str(systems.SKILLS),
        }
        made[name] = systems.System(folder, "valkey", say, environ | given, "", stack)
        stack.callback(lambda system: system.end(tuple(system.workers)), made[name])
        for _ in range(2):
            made[name].start_worker("threads", 4, ready=False)
        made[name].await_ready(made[name].workers)
    url = {name: url_of(running, name) for name in made}
    return [
        Side("empty", url["empty"], uuid4, made["empty"]),
        Side("full", url["full"], uuid4, made["full"]),
        Side("full, ordered ids", url["full"], ordered_id, made["full"]),
    ]


def work(side: Side, runs: int, *, measured: bool) -> None:
    """Runs of four steps, started at once, until the last has ended."""
    ids = [side.make_id() for _ in range(runs)]
    with side.connect() as connection:
        before = spent(connection, side.database)
        connection.execute(
            "select count(*) from unnest(%s::uuid[]) id, stepfast.enqueue_v1('steady', '{}', p_run => id)", [ids]
        )
        deadline = time.monotonic() + ROUND_TIMEOUT_S
        unfinished = "select exists (select from stepfast.runs where state in ('pending', 'running'))"
        while connection.execute(unfinished).fetchone() == (True,):
            if time.monotonic() > deadline:
                raise systems.TookTooLong(f"{runs} runs on {side.name}")
            time.sleep(0.05)
        time.sleep(1.1)  # sessions report what they read after a second
        after = spent(connection, side.database)
        row = connection.execute(
            "select count(*), extract(epoch from max(ended_at) - min(started_at)) from stepfast.runs"
            " where id = any(%s) and state = 'completed'",
            [ids],
        ).fetchone()
    assert row is not None
    assert row[0] == runs, f"{row[0]} of {runs} runs completed"
    if measured:
        steps = 4 * runs
        side.rounds.append(
            {"steps/s": steps / float(row[1])}
            | {f"a step: {name}": (value - before[name]) / steps for name, value in after.items()}
        )


def spent(connection: "psycopg.Connection[Any]", database: str) -> dict[str, float]:
    """Until now: what this database's sessions used of the processor, and read; what was written to WAL."""
    pids = connection.execute("select pid from pg_stat_activity where datname = %s", [database]).fetchall()
    row = connection.execute(
        "select wal_bytes, wal_fpi, (select blks_read from pg_stat_database where datname = %s) from pg_stat_wal",
        [database],
    ).fetchone()
    assert row is not None
    return {
        "Postgres's processor, ms": sum(ran_ns(pid) for (pid,) in pids) / 1e6,
        "WAL, bytes": float(row[0]),
        "full pages in WAL": float(row[1]),
        "blocks not in its cache": float(row[2]),
    }


def single_calls(measured: list[Side], pipeline: Pipeline, rounds: int) -> None:
    """By one session a side, in turns, with no worker beside it."""
    for side in measured:
        with side.connect() as connection:  # of the workers that were killed: the sweeps have nothing to find
            connection.execute("update stepfast.workers set ended_at = stepfast.now() where ended_at is null")
    callers = [Caller(side.url, pipeline, side.make_id) for side in measured]
    for number in range(rounds + 5):
        if number == 5:  # plans are made, and cached, by then
            for caller in callers:
                caller.costs = Costs()
        for caller in callers:
            caller.steps()
            if number % 5 == 4:
                caller.reads()
    for side, caller in zip(measured, callers, strict=True):
        side.costs = caller.costs
        caller.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="history", description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000_000, help="finished runs (1,000,000: 10 GB, minutes)")
    parser.add_argument("--rounds", type=int, default=7, help="of each side (7)")
    parser.add_argument("--round-runs", type=int, default=600, help="of a round (600)")
    parser.add_argument("--shared-buffers", default="1GB", help="Postgres's cache (1GB)")
    parser.add_argument("--home", type=Path, help="a folder that stays, and is filled once (default: a temporary one)")
    parser.add_argument("--json", action="store_true", help="print {ok, machine, figures}")
    given = parser.parse_args(argv)
    where = machine() | {"shared_buffers": given.shared_buffers}
    pipeline = loader.load(systems.SKILLS / "steady", aliases={}, handler_modules=())
    with ExitStack() as stack:
        home = given.home or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stepfast-history-")))
        home.mkdir(parents=True, exist_ok=True)
        with server(home, "4GB" if given.runs > 100_000 else given.shared_buffers) as running:
            prepare(running, pipeline, given.runs)
        with server(home, given.shared_buffers) as running:
            there = {name: finished(running, name) for name in ("empty", "full")}
            with ExitStack() as workers:
                measured = sides(running, home, workers)
                for number in range(given.rounds + 1):
                    say(f"  round {number} of {given.rounds}, load {os.getloadavg()[0]:.1f}")
                    for side in measured if number % 2 else measured[::-1]:
                        work(side, given.round_runs, measured=number > 0)
            single_calls(measured, pipeline, given.rounds * 10)
    where["finished runs before"] = " and ".join(f"{count:,} ({name})" for name, count in there.items())
    where["load after"] = round(os.getloadavg()[0], 1)
    found = figures(measured)
    ratio = found["steps/s"]["full"] / found["steps/s"]["empty"]
    held = ratio >= RATIO_MIN
    if given.json:
        print(json.dumps({"ok": held, "ratio": ratio, "machine": where, "figures": found}, indent=2))
    else:
        show(found, where)
        print(f"\n{'' if held else 'NOT HELD: '}steps/s, full to empty: {ratio:.2f} >= {RATIO_MIN}")
    return 0 if held else 1


def figures(measured: list[Side]) -> dict[str, dict[str, float]]:
    """Medians, by what is measured and by side."""
    found: dict[str, dict[str, float]] = {}
    for side in measured:
        medians = {name: statistics.median(found[name] for found in side.rounds) for name in side.rounds[0]}
        medians |= {f"{name}: ms": side.costs.cpu_ms(name) for name in side.costs.cpu}
        medians |= {f"{name}: ms on the wall": side.costs.wall_ms(name) for name in side.costs.wall}
        for name, value in medians.items():
            found.setdefault(name, {})[side.name] = value
    return found


def show(found: dict[str, dict[str, float]], where: dict[str, object]) -> None:
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    names = list(next(iter(found.values())))
    width = max(map(len, found))
    print(f"\n{'':<{width}}  " + "  ".join(f"{name:>17}" for name in names) + "   full/empty")
    for what, values in found.items():
        shown = "  ".join(f"{values[name]:>17,.3f}" for name in names)
        ratio = f"{values['full'] / values['empty']:.2f}" if values["empty"] else "-"
        print(f"{what:<{width}}  {shown}   {ratio:>10}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
