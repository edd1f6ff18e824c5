"""Who lives and who is dead: what a lock, a lease and a parent say of a process, when they do not agree."""

import os
import signal
import subprocess
import sys

import psycopg
import pytest
from benches import Bench
from conftest import ROOT, eventually
from pipelines import line
from test_running import GATED, _began

from app import operations
from app.runs.database import engine
from app.runs.store import Family, Store

# Short, so that three of them pass within a test. The truce after Postgres's start is over with it, too.
SHORT = {"STEPFAST_LEASE_S": "2", "STEPFAST_SWEEP_S": "0.5", "STEPFAST_GRACE_S": "0.5"}
# `PyDLL` keeps the interpreter's lock, as some computations in C do: no other thread of the process runs meanwhile.
DEAF = (
    GATED
    + """
    import ctypes

    def deaf(ctx):
        (pathlib.Path(ctx.run.input["folder"]) / f"deaf-began").write_text(f"{os.getpid()}\\n")
        ctypes.PyDLL(None).sleep(8)
        return {}
"""
)


@pytest.fixture
def bench(database_url):
    store = Store(engine(database_url, pool_max=4))
    yield Bench(store)
    store.engine.dispose()


def _backend_of(connection, pid: int) -> int:
    """The backend that holds the lock of a process."""
    return connection.execute(
        "select l.pid from pg_locks l join stepfast.workers w on l.objid = w.id"
        " where l.locktype = 'advisory' and l.classid = 7083 and l.granted and w.pid = %s and w.ended_at is null",
        (pid,),
    ).fetchone()[0]


@pytest.mark.slow
def test_process_that_keeps_the_interpreter_for_leases_is_alive(system, here, write_skill, tmp_path):
    """A call into C that lasts four leases: the parent vouches for its child, even where the child's session is cut."""
    name = system.publish(here, write_skill("- {id: deaf, idempotent: true}", DEAF))
    # One that only looks who is dead.
    system.start_worker(queues="agents", **SHORT)
    system.start_worker(pool="prefork", concurrency=1, **SHORT)
    run_id = operations.start(here, name, {"folder": str(tmp_path)}).run_id
    (pid,) = eventually(lambda: _began(tmp_path, "deaf"), what="the step")
    with psycopg.connect(system.database_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("select pg_terminate_backend(%s)", (_backend_of(connection, int(pid)),))
    run = system.ended(run_id)
    assert (run["state"], run["steps"][0]["worker_losses"], len(run["steps"][0]["tries"])) == ("completed", 0, 1)
    assert system.logged("worker.lost") == []


@pytest.mark.slow
def test_child_that_is_stopped_is_left_to_its_lease(system, here, write_skill, tmp_path):
    """It has not ended, and whether it goes on nobody knows: its parent does not vouch for it. Thawed, it is fenced."""
    name = system.publish(
        here, write_skill("- {id: only, idempotent: true}", GATED + "\n    def only(ctx): return _pass(ctx, 'only')\n")
    )
    system.start_worker(pool="prefork", concurrency=1, **SHORT)
    run_id = operations.start(here, name, {"folder": str(tmp_path)}).run_id
    (pid,) = eventually(lambda: _began(tmp_path, "only"), what="the step")
    system.start_worker(**SHORT)
    os.kill(int(pid), signal.SIGSTOP)
    try:
        eventually(lambda: len(_began(tmp_path, "only")) == 2, within_s=20, what="the step elsewhere")
    finally:
        os.kill(int(pid), signal.SIGCONT)
    (tmp_path / "only-go").touch()
    run = system.ended(run_id)
    assert (run["state"], [entry["state"] for entry in run["steps"][0]["tries"]]) == (
        "completed",
        ["lost", "completed"],
    )
    eventually(lambda: system.logged("step.stale_claim"), what="the fenced commit")


FORKING = """
import os, signal, sys
from app.runs.presence import Presence

presence = Presence(sys.argv[1], 600, None)
presence.start()
if os.fork() == 0:
    signal.pause()
print(presence.worker_id, flush=True)
signal.pause()
"""


def test_forked_child_does_not_keep_its_dead_parent_alive(database_url, tmp_path):
    """A handler's bare fork inherits the socket of the session; the lock is free although the child lives on."""
    process = subprocess.Popen(
        [sys.executable, "-c", FORKING, database_url],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        worker_id = int(process.stdout.readline())
        process.kill()
        process.wait()
        with psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True) as connection:
            taken = "select pg_try_advisory_lock(7083, %s)"
            eventually(lambda: connection.execute(taken, (worker_id,)).fetchone()[0], within_s=5, what="the free lock")
        os.killpg(process.pid, 0)  # raises where the child is gone: then this test would prove nothing
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


def test_what_a_parent_says_counts(bench):
    """Of its own children only: the dead are dead at once, and the living keep a lease that ran out."""
    run = bench.start(line("a"))
    child, other = (
        bench.sql(
            "insert into stepfast.workers (host, pid, code_version, started_at, lease_until, parent_id)"
            " values ('h', :pid, 1, stepfast.now(), stepfast.now() + interval '1 s', :parent) returning id",
            pid=pid,
            parent=parent,
        )
        for pid, parent in ((11, bench.worker_id), (11, None))
    )
    bench.worker_id, parent = child, bench.worker_id
    bench.claim(run, "a")
    bench.pass_time(60)
    family = Family(parent, living=[11], dead=[])
    sweep = {"lease_ms": 1_000, "grace_ms": 0, "resend_ms": 2_000, "limit": 20}
    bench.store.sweep(**sweep, family=family)
    leased = "select lease_until > stepfast.now() from stepfast.workers where id = :id"
    assert (bench.sql(leased, id=child), bench.sql(leased, id=other)) == (True, False)
    # A lease of 1 ms: nobody is dead for one lease after Postgres started, which may have been just now.
    swept = bench.store.sweep(**sweep | {"lease_ms": 1}, family=Family(parent, living=[], dead=[11]))
    assert child in swept.lost
    assert [entry["reason"] for entry in swept.rescued] == ["died"]
    assert bench.states(run) == {"a": "available"}


def test_handing_over_is_no_loss(bench):
    """What may be repeated is available at once, and its old attempt is fenced; what may not goes on."""
    run = bench.start(line("a"))
    bid, _ = bench.claim(run, "a")
    careful = bench.start(line("a"))
    kept, _ = bench.claim(careful, "a", repeatable=False)
    assert bench.store.hand_over(bench.worker_id, 20) == 1
    assert (bench.states(run), bench.states(careful)) == ({"a": "available"}, {"a": "executing"})
    assert bench.sql("select sum(worker_losses) from stepfast.steps") == 0
    assert bench.complete(bid).outcome == "stale"
    assert bench.complete(kept).outcome == "completed"
    assert bench.store.hand_over(bench.worker_id, 20) == 0
    assert bench.sql("select ended_at is not null from stepfast.workers where id = :id", id=bench.worker_id)
