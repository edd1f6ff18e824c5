"""Scenarios from the suites of peers, in our words: what is recorded, and who may still change it."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from benches import CALM_MS, ERROR, Bench
from pipelines import agent, diamond, line, pipeline
from working import emitting

from app import events
from app.errors import NotPossible
from app.events import Event
from app.pipelines.model import FailureMode
from app.runs.database import engine
from app.runs.invariants import check
from app.runs.orders import Orders
from app.runs.store import Store


@pytest.fixture
def bench(database_url):
    store = Store(engine(database_url, pool_max=8))
    made = Bench(store)
    made.orders = Orders(store.engine)
    yield made
    with store.engine.connect() as connection:
        assert check(connection) == []
    store.engine.dispose()


def _worker_dies(bench):
    """What it executes is taken from it; another worker is there."""
    bench.sql("update stepfast.workers set ended_at = stepfast.now() where ended_at is null")
    swept = bench.sweep()
    bench.worker_id = Bench(bench.store).worker_id
    return swept


def test_recorded_failure_stands_against_a_late_message(bench):
    """aws-durable-execution 1-10 replay re-throws failure: whoever comes again is told, and nothing is tried again."""
    run = bench.start(line("a", "b"))
    bench.fail(bench.claim(run, "a")[0])
    _, late = bench.claim(run, "a")
    assert (late.outcome, late.state) == ("stale", "discarded")
    assert bench.sql("select error->>'message' from stepfast.attempts") == "It broke 3 times."
    assert bench.sql("select count(*) from stepfast.attempts") == 1


def test_approvals_may_come_in_any_order(bench):
    """aws-durable-execution 4-19 out-of-order callbacks: each decision finds its own step."""
    run = bench.start(diamond())
    bench.do(run, "a")
    for name in ("b", "c"):
        bid, _ = bench.claim(run, name)
        bench.store.suspend(bid.step, bid.attempt_id, f"digest of {name}", {}, None)
    for name in ("c", "b"):
        bench.orders.decide(run, name, approved=True, digest=f"digest of {name}", by="ann", reason=None)
        assert bench.claim(run, name)[1].approved == f"digest of {name}"


def test_inputs_are_in_no_order_of_completion(bench):
    """aws-durable-execution 9-11 result order: a join is given each output by its agent's name, whoever was first."""
    given = []
    for order in (("b", "c"), ("c", "b")):
        run = bench.start(diamond())
        bench.do(run, "a", *order)
        given.append(bench.claim(run, "d")[1].outputs)
    assert given[0] == given[1] == {name: {"by": name} for name in ("a", "b", "c")}


def test_failure_of_a_branch_is_kept_when_its_reader_is_interrupted(bench):
    """aws-durable-execution 9-18 failure kept across replay: the join is given the same, without it, a second time."""
    run = bench.start(
        pipeline(
            agent("a"),
            agent("b", "a", failure_mode=FailureMode.CONTINUE),
            agent("c", "a"),
            agent("d", "b", "c", reads=("b", "c")),
        )
    )
    bench.do(run, "a", "c")
    bench.fail(bench.claim(run, "b")[0])
    first = bench.claim(run, "d")[1].outputs
    assert [entry["agent"] for entry in _worker_dies(bench).rescued] == ["d"]
    assert bench.claim(run, "d")[1].outputs == first == {"c": {"by": "c"}}
    assert bench.sql("select attempts from stepfast.steps where agent = 'b'") == 1


def test_watcher_that_raises_disturbs_no_step(bench):
    """aws-durable-execution 10-4 exceptions in plug-ins swallowed: the others are told all the same."""

    def broken(_event, _fields):
        raise RuntimeError("a tracing backend is away")

    events.subscribe(broken)
    try:
        with emitting() as told:
            events.emit(Event.STEP_COMPLETED)
    finally:
        events._subscribers.remove(broken)
    assert [event for event, _ in told] == [Event.STEP_COMPLETED]


def test_retry_survives_the_death_of_who_failed(bench):
    """dbos-transact-py recovery_during_retries: the failures stay counted, and another worker makes the next try."""
    run = bench.start(line("a"))
    bench.fail(bench.claim(run, "a")[0], retry_ms=5_000)
    assert _worker_dies(bench).rescued == ()
    bench.pass_time(6)
    assert bench.sweep(lease_ms=CALM_MS).due == 1
    _, claim = bench.claim(run, "a")
    assert (claim.outcome, claim.failures, claim.number) == ("claimed", 1, 2)


def test_concurrency_key_is_held_through_a_rescue(bench):
    """dbos-transact-py queue_concurrency_under_recovery: a death gives the key to nobody else."""
    definition = pipeline(agent("a"), agent("b", "a"), concurrency_parts=({"text": "one"},), concurrency_key="one")
    first, second = bench.start(definition), bench.start(definition)
    bench.claim(first, "a")
    _worker_dies(bench)
    assert (bench.states(first)["a"], bench.states(second)["a"]) == ("available", "pending")
    bench.do(first, "a", "b")
    assert bench.do(second, "a", "b").run_state == "completed"


def test_cancel_after_the_final_step_changes_nothing(bench):
    """dbos-transact-py cancel_after_final_step: what is completed stays so, and whoever cancels is told."""
    run = bench.start(line("a"))
    bench.do(run, "a")
    with pytest.raises(NotPossible, match="completed"):
        bench.orders.cancel(run, "me", None)
    assert (bench.run_state(run), bench.states(run)) == ("completed", {"a": "completed"})


def test_timed_out_try_is_recorded_and_counted(bench):
    """dbos-transact-py step_timeout_is_checkpointed_and_replayed: a later try begins with it, and it cannot come back."""
    run = bench.start(line("a"))
    late, _ = bench.claim(run, "a")
    bench.fail(late, retry_ms=1, error=ERROR | {"code": "timed_out"})
    assert bench.complete(late).outcome == "stale"
    bench.pass_time(1)
    bench.sweep(lease_ms=CALM_MS)
    assert bench.claim(run, "a")[1].failures == 1
    assert bench.sql("select error->>'code' from stepfast.attempts where number = 1") == "timed_out"


def test_cancel_and_complete_do_not_wait_for_each_other(bench):
    """Absurd cancel_and_complete_run_do_not_deadlock: at a barrier, 50 times; one is first, and the other is told."""
    both = Barrier(2)

    def complete(bid):
        both.wait()
        return bench.complete(bid).outcome

    def cancel(run):
        both.wait()
        try:
            bench.orders.cancel(run, "me", None)
        except NotPossible:
            return "refused"
        return "cancelled"

    seen = set()
    with ThreadPoolExecutor(2) as pool:
        for _ in range(50):
            run = bench.start(line("a"))
            bid, _ = bench.claim(run, "a")
            ends = pool.submit(complete, bid), pool.submit(cancel, run)
            seen.add((ends[0].result(), ends[1].result(), bench.run_state(run)))
    assert seen <= {("completed", "refused", "completed"), ("stale", "cancelled", "cancelled")}


def test_expired_question_is_not_asked_again_by_itself(bench):
    """Absurd await_event_timeout_does_not_recreate_wait: sweeps and late messages leave it expired."""
    run = bench.start(line("a"))
    bid, _ = bench.claim(run, "a")
    bench.store.suspend(bid.step, bid.attempt_id, "d", {}, 1_000)
    bench.pass_time(2)
    assert [bench.sweep(lease_ms=CALM_MS).expired for _ in range(3)] == [1, 0, 0]
    assert bench.claim(run, "a")[1].outcome == "stale"
    assert bench.sql("select array_agg(state) from stepfast.approvals") == ["expired"]


def test_key_of_a_run_outlives_it(bench):
    """Absurd idempotency_key_persists_after_task_completes: the same key gives the same run, a day later too."""
    definition = line("a")
    run = bench.start(definition, {"n": 1}, key="order 7")
    bench.do(run, "a")
    bench.pass_time(86_400)
    assert bench.store.enqueue(definition.name, {"n": 1}, key="order 7") == (run, False)
