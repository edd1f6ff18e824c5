"""Who is taken for dead, by whom, and when: what the sweep makes of suspicions."""

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from benches import Bench
from conftest import eventually
from pipelines import line
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from working import emitting

from app.events import Event
from app.execution.rescue import sweep
from app.runs.presence import Presence

LEASE_S = 3.0


@pytest.fixture
def bench(here):
    """The test's Worker with a short lease, after the truce of Postgres's start, and a worker without a process."""
    here.settings = replace(here.settings, lease_s=LEASE_S, grace_s=0.05)
    made = Bench(here.store)
    made.worker = here
    made.start(line("a"))
    truce = f"select stepfast.is_truce({round(LEASE_S * 1000)})"
    eventually(lambda: not made.sql(truce), what="its end")
    return made


def _lost(bench) -> list[int]:
    with emitting() as found:
        sweep(bench.worker)
    return [fields["worker"] for event, fields in found if event == Event.WORKER_LOST]


def test_suspect_is_dead_after_the_grace(bench):
    """Its lock is free, and nobody else was cut off."""
    assert _lost(bench) == []
    bench.pass_time(0.5)
    assert _lost(bench) == [bench.worker_id]


def test_who_was_cut_off_too_is_patient(bench):
    """A proxy that drops everybody's sessions must not make the first one that is back take the others for dead."""
    assert _lost(bench) == []
    with pytest.raises(DBAPIError), bench.store.engine.connect() as connection:
        connection.execute(text("select pg_terminate_backend(pg_backend_pid())"))
    bench.pass_time(0.5)
    assert _lost(bench) == []
    bench.pass_time(LEASE_S / 3)
    assert _lost(bench) == [bench.worker_id]


def test_who_has_another_session_is_alive(bench):
    """A process lost the session with the lock, and is too busy to be back at once: its other sessions say that it lives."""
    bench.sql(
        "update stepfast.workers set host = :host, pid = :pid where id = :id",
        host=socket.gethostname(),
        pid=os.getpid(),
        id=bench.worker_id,
    )
    assert _lost(bench) == []
    bench.pass_time(0.5)
    assert _lost(bench) == []
    bench.pass_time(LEASE_S / 3)
    assert _lost(bench) == [bench.worker_id]


@pytest.fixture
def present(system, bench):
    """A process's presence whose next beat is minutes away."""
    made = Presence(system.database_url, lease_s=300.0)
    made.start()
    yield made
    made.stop()


def _holder(bench, presence) -> int | None:
    """The session that holds the lock of a presence."""
    return bench.sql(
        "select pid from pg_locks where locktype = 'advisory' and classid = 7083 and objid::bigint = :id and granted",
        id=presence.worker_id,
    )


def test_session_that_was_cut_is_back_at_once(bench, present):
    """Not at the next beat: until then the process would be taken for dead. Its beat clears what was suspected."""
    cut = _holder(bench, present)
    bench.sql("update stepfast.workers set suspect_since = stepfast.now() where id = :id", id=present.worker_id)
    bench.sql("select pg_terminate_backend(:pid)", pid=cut)
    eventually(lambda: _holder(bench, present) not in {None, cut}, what="another session with the lock")
    assert bench.sql("select suspect_since from stepfast.workers where id = :id", id=present.worker_id) is None


def test_lock_that_is_held_just_then_is_tried_again_soon(bench, present):
    """A sweeper that looks takes the lock for a moment: whoever comes back then must not wait for its next beat."""
    with ThreadPoolExecutor(1) as pool, bench.store.engine.connect() as looking:
        # In line for the lock before it is free, so that it is next.
        look = pool.submit(looking.execute, text("select pg_advisory_lock(7083, :id)"), {"id": present.worker_id})
        eventually(lambda: bench.sql("select true from pg_locks where classid = 7083 and not granted"), what="a queue")
        bench.sql("select pg_terminate_backend(:pid)", pid=_holder(bench, present))
        look.result()
        mine = looking.execute(text("select pg_backend_pid()")).scalar()
        beaten = "select lease_until > started_at + interval '300 s' from stepfast.workers where id = :id"
        eventually(lambda: bench.sql(beaten, id=present.worker_id), what="a beat without the lock")
        looking.execute(text("select pg_advisory_unlock_all()"))
    eventually(lambda: _holder(bench, present) not in {None, mine}, what="the lock")
