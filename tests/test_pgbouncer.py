"""Behind PgBouncer in transaction mode: everything works, nobody is falsely dead, and doctor says what is lost."""

import os
import signal

import pgbouncer
import pytest
from conftest import eventually
from test_running import DIAMOND, DIAMOND_HANDLERS, GATED, _began

from app import operations
from app.cli import doctor
from app.runs.database import engine, migrate

pytestmark = pytest.mark.skipif(pgbouncer.SERVER is None, reason=pgbouncer.MISSING)
LEASE_S = 2


@pytest.fixture
def pooled_url(database_url, tmp_path):
    with pgbouncer.running(tmp_path / "pgbouncer", database_url) as url:
        yield url


@pytest.fixture
def pooled(system, pooled_url, monkeypatch):
    """The test process's Worker; it and the workers reach Postgres through PgBouncer alone."""
    system.environ |= {
        "STEPFAST_DATABASE_URL": pooled_url,
        "STEPFAST_LEASE_S": str(LEASE_S),
        "STEPFAST_SWEEP_S": "0.5",
        # Less than it takes until the next beat: whoever believed in a lock would be dead before it.
        "STEPFAST_GRACE_S": "0.1",
    }
    with system.here(monkeypatch) as current:
        yield current


def test_migrations_and_settings_need_nothing_of_the_user(empty_database_url, tmp_path):
    """It refuses startup options; nothing that we set stays on a connection that others are given next."""
    with pgbouncer.running(tmp_path / "pgbouncer", empty_database_url) as url:
        migrate(url)
        opened = engine(url, pool_max=1)
        with opened.connect() as connection:
            shown = {
                name: connection.exec_driver_sql(f"show {name}").scalar()
                for name in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
            }
        opened.dispose()
    assert set(shown.values()) == {"0"}


@pytest.mark.slow
def test_live_workers_are_left_alone_and_dead_ones_are_found_by_their_lease(system, pooled, write_skill, tmp_path):
    """PgBouncer drops the connections to the server all the while: no lock is held, so none is believed in."""
    diamond = system.publish(pooled, write_skill(DIAMOND, DIAMOND_HANDLERS))
    gated = write_skill(
        "- {id: only, idempotent: true}", GATED + "\n    def only(ctx): return _pass(ctx, 'only')\n", name="gated"
    )
    victim = system.start_worker()
    run = system.ended(operations.start(pooled, diamond, {"n": 1}).run_id)
    assert (run["state"], [len(step["tries"]) for step in run["steps"]]) == ("completed", [1] * 5)

    run_id = operations.start(pooled, system.publish(pooled, gated), {"folder": str(tmp_path)}).run_id
    eventually(lambda: _began(tmp_path, "only"), what="the step")
    system.start_worker()
    before = _leases(pooled)
    # Three leases of life: each was renewed, and no worker was taken for dead.
    eventually(
        lambda: all(after - before[key] > 3 * LEASE_S for key, after in _leases(pooled).items() if key in before)
    )
    assert len(_began(tmp_path, "only")) == 1
    assert system.logged("worker.lost") == []

    told = [check for check in doctor._checks(embedded=False) if check.name in {"pooler", "workers"}]
    assert [check.status for check in told] == ["warn", "warn", "ok", "warn"]
    assert "noticed by its lease alone" in told[-1].text

    os.killpg(victim.pid, signal.SIGKILL)
    eventually(lambda: len(_began(tmp_path, "only")) == 2, within_s=30, what="the step elsewhere")
    (tmp_path / "only-go").touch()
    assert system.ended(run_id)["state"] == "completed"


def test_session_past_the_pooler_shows_deaths_at_once(system, pooled, database_url, write_skill):
    """STEPFAST_SESSION_DATABASE_URL is for the one session that must be a process's own."""
    system.environ["STEPFAST_SESSION_DATABASE_URL"] = database_url
    name = system.publish(pooled, write_skill("- {id: a}", "def a(ctx): return {}"))
    system.start_worker()
    assert system.ended(operations.start(pooled, name, {}).run_id)["state"] == "completed"
    with pooled.store.engine.connect() as connection:
        assert connection.exec_driver_sql("select has_session from stepfast.workers").scalars().all() == [True]


def _leases(worker) -> dict[int, float]:
    with worker.store.engine.connect() as connection:
        rows = connection.exec_driver_sql(
            "select id, extract(epoch from lease_until) from stepfast.workers where ended_at is null"
        )
        return {row[0]: float(row[1]) for row in rows}
