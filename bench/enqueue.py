"""What `stepfast.enqueue` costs a host, on an embedded Postgres of its own: `python bench/enqueue.py`.

First how many transactions a second 8 and 16 writers commit, each with a run, against as many that insert the same rows
plainly, an INSERT a table. Then the time of one host's transaction, with and without a run in it. Both sides alternate,
so that whatever else the machine does hits both.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import psycopg
import stepfast

from app.embedded import servers
from app.pipelines.model import Agent, Pipeline
from app.runs.database import engine, migrate
from app.runs.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable

WRITERS = (8, 16)
# A writer that does not come, or does not end, ends the bench.
PATIENCE_S = 60
# The imports are not to be paid for by each writer.
_MAKE = multiprocessing.get_context("fork")
AGENTS = ("research", "write", "review")
SCHEMA = {"type": "object", "properties": {"order": {"type": "integer"}}, "required": ["order"]}
HOSTS_ROW = "insert into host_order (item) values ('tea')"
# Copies of the tables, with their rules, indexes, keys and fillfactor.
TABLES = """
    create table host_order (id bigint generated always as identity primary key, item text not null);
    create table plain_runs (like stepfast.runs including all) with (fillfactor = 70);
    create table plain_steps (like stepfast.steps including all) with (fillfactor = 70);
    create table plain_events (like stepfast.events including all);
    alter table plain_runs add foreign key (pipeline_hash) references stepfast.pipelines (hash);
    alter table plain_steps add foreign key (run_id) references plain_runs (id) on delete cascade;
    alter table plain_events add foreign key (run_id) references plain_runs (id) on delete cascade;
    create trigger guard before insert or update on plain_runs for each row execute function stepfast.guard_run();
    create trigger guard before insert or update on plain_steps for each row execute function stepfast.guard_step()
"""
# What a host that knew these tables would do: an INSERT a table.
PLAIN = (
    """
    insert into plain_runs (id, tenant, pipeline, pipeline_hash, state, input, input_hash, labels, priority, created_at,
                            event_seq)
    values (%(id)s, 'default', 'bench', %(hash)s, 'pending', '{"order": 1}', %(hash)s, '{}', 0, now(), 1)
    """,
    """
    insert into plain_steps (run_id, agent, state, depends_on, failure_mode, queue, max_worker_losses, priority,
                             created_at)
    select %(id)s, agent, 'available', '{}', 'halt_pipeline', 'agents', 5, 0, now()
    from unnest(%(agents)s::text[]) agent
    """,
    """
    insert into plain_events (run_id, seq, name, at, data)
    values (%(id)s, 1, 'run.enqueued', now(),
            jsonb_build_object('pipeline_hash', %(hash)s::text, 'input_hash', %(hash)s::text))
    """,
)


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--seconds", type=float, default=4.0, help="of each round of the writers (4)")
    given.add_argument("--rounds", type=int, default=5, help="of each side (5)")
    given.add_argument("--transactions", type=int, default=1_000, help="of one host, on each side (1,000)")
    chosen = given.parse_args()
    with tempfile.TemporaryDirectory() as home, servers(Path(home) / "servers") as running:
        migrate(running.database_url)
        url = running.database_url.replace("+psycopg", "")
        pipeline = Pipeline("bench", "1", tuple(Agent(name, model="none") for name in AGENTS), input_schema=SCHEMA)
        store = Store(engine(running.database_url, pool_max=1))
        store.publish(pipeline)
        store.engine.dispose()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(TABLES)
        for writers in WRITERS:
            together(url, pipeline.hash, writers, chosen.rounds, chosen.seconds)
        # Last: it leaves a thread, which a fork would not survive.
        alone(url, running.broker_url, chosen.transactions)


def alone(url: str, broker_url: str, transactions: int) -> None:
    """One host: its own row, then its own row and a run."""
    client = stepfast.Client(broker=broker_url)
    spent: dict[bool, list[float]] = {False: [], True: []}
    with psycopg.connect(url) as connection:
        for number in range(2 * transactions + 20):
            began = time.perf_counter()
            connection.execute(HOSTS_ROW)
            if number % 2:
                client.enqueue("bench", {"order": number}, connection=connection)
            connection.commit()
            spent[bool(number % 2)].append((time.perf_counter() - began) * 1000)
    without, with_run = (statistics.median(spent[side][10:]) for side in (False, True))
    print(f"one host: p50 {without:.2f} ms without a run, {with_run:.2f} ms with: {with_run - without:+.2f} ms")


def together(url: str, pipeline_hash: str, writers: int, rounds: int, seconds: float) -> None:
    """Commits a second, by side."""
    rates: dict[str, list[float]] = {"plain": [], "enqueue": []}
    for _ in range(rounds):
        for side, found in rates.items():
            counts = _MAKE.Queue()
            starting = _MAKE.Barrier(writers)
            processes = [
                _MAKE.Process(target=write, args=(url, pipeline_hash, side, seconds, starting, counts), daemon=True)
                for _ in range(writers)
            ]
            for process in processes:
                process.start()
            found.append(sum(counts.get(timeout=seconds + PATIENCE_S) for _ in processes) / seconds)
            for process in processes:
                process.join()
    plain, enqueued = (statistics.median(rates[side]) for side in ("plain", "enqueue"))
    print(f"{writers} writers: {plain:,.0f} commits/s by plain INSERTs, {enqueued:,.0f} by enqueue ", end="")
    print(f"({enqueued / plain:.2f})", flush=True)


def write(url: str, pipeline_hash: str, side: str, seconds: float, starting, counts) -> None:  # noqa: ANN001  # untyped
    """One writer: how many transactions it commits in the time."""
    with psycopg.connect(url) as connection:
        act: Callable[[], object]
        if side == "plain":
            values = {"hash": pipeline_hash, "agents": list(AGENTS)}
            act = lambda: insert(connection, {**values, "id": uuid4()})  # noqa: E731
        else:
            client = stepfast.Client()
            act = lambda: client.enqueue("bench", {"order": 1}, connection=connection)  # noqa: E731
        done = 0
        act()  # what is imported and prepared on first use
        connection.rollback()
        starting.wait(PATIENCE_S)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            connection.execute(HOSTS_ROW)
            act()
            connection.commit()
            done += 1
    counts.put(done)


def insert(connection: "psycopg.Connection", values: dict[str, object]) -> None:
    for statement in PLAIN:
        connection.execute(statement, values)


if __name__ == "__main__":
    main()
