"""What a step costs, counted: statements, round trips and messages on the happy path. Counts, not times."""

from conftest import valkey
from sqlalchemy import event

from app import operations
from app.execution.executor import execute
from app.runs.store import StepKey

LINE = """
    - {id: a}
    - {id: b, depends_on: [a]}
    - {id: c, depends_on: [b]}
    - {id: d, depends_on: [c]}
"""
HANDLERS = """
    def a(ctx): return {}
    def b(ctx): return {}
    def c(ctx): return {}
    def d(ctx): return {}
"""


def test_step_costs_two_statements_of_one_round_trip_each(system, here, write_skill, statements):
    """Claim and complete are one statement each, in autocommit: two round trips, two commits, and none in between."""
    name = system.publish(here, write_skill(LINE, HANDLERS))
    run_id, _ = here.store.enqueue(name, {})
    transactions = []
    event.listen(here.store.engine, "commit", transactions.append)
    pipeline_hash = here.store.take_unsent(run_id, 1)[0].pipeline_hash
    execute(here, StepKey(run_id, "a"), pipeline_hash)  # reads the definition, and registers this process
    for agent in ("b", "c", "d"):
        statements.clear()
        assert execute(here, StepKey(run_id, agent), pipeline_hash).state == "completed"
        assert [statement.split("(")[0] for statement in statements] == [
            "select stepfast.claim_v1",
            "select stepfast.complete_v1",
        ]
    assert transactions == []


def test_start_costs_few_statements(system, here, write_skill, statements):
    """Starting a run: its current definition, and the insertion, which also gives what to send."""
    name = system.publish(here, write_skill(LINE, HANDLERS))
    operations.start(here, name, {})
    statements.clear()
    operations.start(here, name, {})
    assert len(statements) == 2


def test_run_costs_one_message_a_step(system, here, write_skill):
    """A linear run of four agents puts four messages on the broker: each attempt is its own, and none is sent twice.

    Nothing else is written there: what a worker has taken is known to Postgres. Sixteen task events go in few messages.
    """
    name = system.publish(here, write_skill(LINE, HANDLERS))
    system.start_worker()
    with valkey(system.broker_url) as client:

        def calls() -> dict[str, int]:
            return {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in client.info("commandstats").items()}

        before = calls()
        assert system.ended(operations.start(here, name, {}).run_id)["state"] == "completed"
        after = calls()
    made = {name: count - before.get(name, 0) for name, count in after.items() if count > before.get(name, 0)}
    assert made.pop("lpush") == 4
    assert made.pop("publish", 0) <= 8
    assert not made.keys() & {"zadd", "hset", "zrem", "hdel"}
