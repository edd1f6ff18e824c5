"""Who is taken for dead, by whom, and when: what the sweep makes of suspicions."""

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

LEASE_S = 3.0


@pytest.fixture
def bench(here):
    """The test's Worker with a short lease, after the truce of Postgres's start, and a worker without a process."""
    here.settings = replace(here.settings, lease_s=LEASE_S, grace_s=0.05)
    made = Bench(here.store)
    made.worker = here
    made.start(line("a"))
    age = "select extract(epoch from clock_timestamp() - pg_postmaster_start_time())"
    eventually(lambda: made.sql(age) > LEASE_S, what="the end of the truce")
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
