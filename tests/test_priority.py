"""The order in which steps start: the highest priority first, then the oldest run, but for what is sent already."""

import pytest
from benches import Bench
from pipelines import agent, line, pipeline
from sqlalchemy import text

from app import operations
from app.execution import canvas
from app.runs.database import engine
from app.runs.store import StepKey, Store

SENT_MAX = 8  # dispatched_max of sweep.sql
NEVER = {"STEPFAST_SWEEP_S": "600", "STEPFAST_LEASE_S": "1800"}


@pytest.fixture
def bench(database_url):
    store = Store(engine(database_url, pool_max=4))
    yield Bench(store)
    store.engine.dispose()


@pytest.fixture
def one_at_a_time(system, here, write_skill):
    """Publishes a pipeline of a handler; the worker that is started executes one step at a time, and never sweeps."""
    name = system.publish(here, write_skill("- {id: only}", "def only(ctx): return {}\n"))
    return name, lambda: system.start_worker(pool="solo", **NEVER)


def _started(system, here, runs) -> list[int]:
    """The numbers of the runs in the order in which their steps started."""
    for run_id in runs:
        assert system.ended(run_id)["state"] == "completed"
    with here.store.engine.connect() as connection:
        rows = connection.execute(text("select run_id from stepfast.attempts order by started_at")).all()
    return [runs.index(row.run_id) for row in rows]


def test_what_plain_sql_enqueued_starts_by_priority_and_age(system, here, one_at_a_time):
    """Twelve runs of one transaction, the later ones urgent: those start first, and each kind in its own order."""
    name, start_worker = one_at_a_time
    enqueue = text("select run_id from stepfast.enqueue_v1(:name, '{}', p_priority => :priority)")
    with here.store.engine.connect().execution_options(isolation_level="READ COMMITTED") as connection:
        given = [{"name": name, "priority": 9 if number >= 6 else 0} for number in range(12)]
        runs = [connection.execute(enqueue, values).scalar_one() for values in given]
        connection.commit()
    canvas.send_unsent(here.store.take_unsent(None, 500), here.definition)  # as a sweep does
    start_worker()
    assert _started(system, here, runs) == [6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5]


def test_urgent_run_starts_before_a_backlog(system, here, one_at_a_time):
    """Before all that was waiting in Postgres, and after what was at the broker: no more than dispatched_max steps."""
    name, start_worker = one_at_a_time
    runs = [operations.start(here, name, {}).run_id for _ in range(20)]
    runs += [operations.start(here, name, {}, priority=9).run_id for _ in range(5)]
    start_worker()
    assert _started(system, here, runs) == [*range(SENT_MAX), *range(20, 25), *range(SENT_MAX, 20)]


def test_few_steps_wait_at_the_broker(bench):
    """However many may start, at most dispatched_max of a queue are sent; a claim sends what takes its place."""
    runs = [bench.start(line("a")) for _ in range(20)]
    order = [StepKey(run, "a") for run in runs]
    assert [entry.step for entry in bench.store.take_unsent(runs[-1], 500)] == order[:SENT_MAX]
    assert bench.store.take_unsent(None, 500) == ()
    claims = [bench.claim(run, "a")[1] for run in runs[: SENT_MAX // 2]]
    assert [entry.step for claim in claims for entry in claim.next] == order[SENT_MAX : SENT_MAX + SENT_MAX // 2]
    assert [len(claim.next) for claim in claims] == [1] * (SENT_MAX // 2)


def test_other_queues_are_not_held_up(bench):
    """A queue that nobody serves keeps its steps, and holds up no other."""
    asks, acts = agent("asks", queue="agents"), agent("acts", queue="elsewhere")
    for _ in range(SENT_MAX):
        bench.start(pipeline(asks, acts))
    bench.store.take_unsent(None, 500)
    run = bench.start(pipeline(asks, agent("acts", queue="handlers"), version="2"))
    sent = [(entry.step.run_id, entry.step.agent) for entry in bench.store.take_unsent(None, 500)]
    assert sent == [(run, "acts")]


def test_next_step_of_a_run_waits_behind_what_is_more_urgent(bench):
    """Whoever completes a step sends what follows, unless something waits that comes before it."""
    runs = [bench.start(line("a", "b")) for _ in range(SENT_MAX + 1)]
    bench.store.take_unsent(None, 500)
    assert bench.do(runs[0], "a").ready == (StepKey(runs[0], "b"),)  # the one that waits is younger
    bench.store.enqueue("tested", {}, priority=1)
    assert bench.do(runs[1], "a").ready == ()
    assert bench.states(runs[1])["b"] == "available"
