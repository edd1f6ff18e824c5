"""Scenarios from the suites of peers, in our words, on real workers."""

import pytest
from conftest import eventually, valkey
from test_running import GATED, _began

from app import operations

PAYLOAD_BYTES = 3_000_000
MESSAGE_MAX_BYTES = 4_000


def test_large_output_travels_through_postgres_alone(system, here, write_skill):
    """aws-durable-execution 3-11 large payload: the next agent is given it whole, and no message carries it."""
    folder = write_skill(
        "- {id: writes}\n- {id: reads, depends_on: [writes], queue: nobody_yet}",
        f"""
        def writes(ctx): return {{"text": "x" * {PAYLOAD_BYTES}}}
        def reads(ctx): return {{"length": len(ctx.inputs["writes"]["text"])}}
        """,
    )
    name = system.publish(here, folder)
    system.start_worker()
    run_id = operations.start(here, name, {}).run_id
    with valkey(system.broker_url) as client:
        eventually(lambda: client.llen("nobody_yet"), what="the message for the second agent")
        assert len(client.lindex("nobody_yet", 0)) < MESSAGE_MAX_BYTES
    system.start_worker(queues="nobody_yet")
    run = system.ended(run_id)
    assert run["steps"][1]["tries"][0]["output"] == {"length": PAYLOAD_BYTES}


def test_beats_keep_a_step_that_outlasts_its_lease(system, here, write_skill, tmp_path):
    """aws-durable-execution 4-5 heartbeat keeps alive, Absurd set_checkpoint_extends_claim_lease: it is not taken away."""
    name = system.publish(
        here, write_skill("- {id: only, idempotent: true}", GATED + "\n    def only(ctx): return _pass(ctx, 'only')\n")
    )
    for _ in range(2):
        system.start_worker(concurrency=1, STEPFAST_LEASE_S="4")
    run_id = operations.start(here, name, {"folder": str(tmp_path)}).run_id
    eventually(lambda: _began(tmp_path, "only"), what="the step")
    outlasted = """
        select true from stepfast.attempts a join stepfast.workers w on w.id = a.worker_id
        where w.lease_until > a.started_at + interval '9 s'"""
    with here.store.engine.connect() as connection:
        eventually(lambda: connection.exec_driver_sql(outlasted).scalar(), what="two leases after its beginning")
    (tmp_path / "only-go").touch()
    run = system.ended(run_id)
    assert [entry["state"] for entry in run["steps"][0]["tries"]] == ["completed"]


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_commit_goes_through_a_hiccup(system, here, write_skill, tmp_path, pool):
    """dbos-transact-py commit_hiccup: every session with Postgres is cut before the commit, which comes once after all."""
    name = system.publish(here, write_skill("- {id: only}", GATED + "\n    def only(ctx): return _pass(ctx, 'only')\n"))
    system.start_worker(pool=pool, concurrency=1)
    run_id = operations.start(here, name, {"folder": str(tmp_path)}).run_id
    eventually(lambda: _began(tmp_path, "only"), what="the step")
    with here.store.engine.connect() as connection:
        connection.exec_driver_sql(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
    (tmp_path / "only-go").touch()
    run = system.ended(run_id)
    assert (run["state"], len(run["steps"][0]["tries"]), len(_began(tmp_path, "only"))) == ("completed", 1, 1)
