"""The states and their transitions, in Python and in the database."""

from uuid import UUID

import pytest
from pipelines import line
from sqlalchemy import bindparam, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError, IntegrityError

from app.runs import states
from app.runs.database import engine
from app.runs.store import Store

STEP_PAIRS = {(row.before, row.after) for row in states.STEP_TRANSITIONS}
RUN_PAIRS = {(row.before, row.after) for row in states.RUN_TRANSITIONS}


@pytest.fixture
def store(database_url):
    made = Store(engine(database_url, pool_max=4))
    yield made
    made.engine.dispose()


def _function_body(connection, name):
    return connection.execute(text("select prosrc from pg_proc where proname = :name"), {"name": name}).scalar_one()


@pytest.mark.parametrize(
    ("function", "states_of", "pairs"),
    [
        ("guard_step", states.StepState, STEP_PAIRS),
        ("guard_run", states.RunState, RUN_PAIRS),
    ],
)
def test_database_allows_exactly_the_declared_transitions(store, function, states_of, pairs):
    """The trigger's list and the transitions table name the same pairs."""
    with store.engine.connect() as connection:
        body = _function_body(connection, function)
    allowed = {(a.value, b.value) for a in states_of for b in states_of if f"'{a} {b}'" in body}
    assert allowed == pairs


def test_database_refuses_an_illegal_transition(store):
    """Whoever writes, a step does not go from available to completed."""
    store.publish(line("a"))
    run_id, _ = store.enqueue("tested", {})
    with (
        store.engine.connect() as connection,
        pytest.raises(DBAPIError, match="may not go from available to completed"),
    ):
        connection.execute(
            text(
                "update stepfast.steps set state = 'completed', ended_at = now(), attempt_id = run_id where run_id = :run"
            ),
            {"run": run_id},
        )


@pytest.mark.parametrize(
    "change",
    [
        "update stepfast.steps set scheduled_at = now()",
        "update stepfast.steps set ended_at = now()",
        "update stepfast.steps set state = 'executing'",
        "update stepfast.steps set generation = 0",
        "update stepfast.runs set ended_at = now()",
        "update stepfast.runs set partial = true",
        "update stepfast.runs set priority = 10",
        "update stepfast.runs set state = 'running'",
    ],
)
def test_database_refuses_states_and_times_that_disagree(store, change):
    """Every rule between a state and its timestamps is a CHECK."""
    store.publish(line("a"))
    store.enqueue("tested", {})
    with store.engine.connect() as connection, pytest.raises(IntegrityError, match="check"):
        connection.execute(text(change))


@pytest.mark.parametrize(
    ("state", "of_step"), [("completed", True), ("executing", True), ("skipped", True), ("completed", False), ("running", False)]
)  # fmt: skip
def test_database_refuses_a_row_that_begins_in_the_middle(store, state, of_step):
    """Whoever writes, a run begins pending, and a step pending or available."""
    store.publish(line("a"))
    run_id, _ = store.enqueue("tested", {})
    table, name = ("steps", "agent") if of_step else ("runs", "id")
    copied = f"insert into stepfast.{table} select (jsonb_populate_record(row, :changes)).* from stepfast.{table} row"
    changes = {
        name: "b" if of_step else str(UUID(int=1)),
        "state": state,
        "ended_at": "2026-01-01",
        "attempt_id": str(run_id),
    }
    with store.engine.connect() as connection, pytest.raises(DBAPIError, match=f"may not begin as {state}"):
        connection.execute(text(copied).bindparams(bindparam("changes", type_=JSONB)), {"changes": changes})
