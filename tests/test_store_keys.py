"""Keys, effects, and what is to be sent: what attempts share across runs and processes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from benches import CALM_MS, FREE, Bench
from pipelines import agent, line, pipeline
from sqlalchemy import text

from app.errors import Misuse
from app.runs.database import engine
from app.runs.store import StepKey, Store


@pytest.fixture
def bench(database_url):
    store = Store(engine(database_url, pool_max=16))
    yield Bench(store)
    store.engine.dispose()


def test_keys_have_a_length(bench):
    """A key that fits into no index is refused by name, not by an error that looks like an outage."""
    long = "\N{HIRAGANA LETTER A}" * 334
    part = ({"path": ["input", "order"]},)
    run = bench.start(pipeline(agent("a", key_parts=part)), {"order": long})
    _, claim = bench.claim(run, "a")
    assert (claim.outcome, claim.problem) == ("bad_key", "the idempotency key is longer than 1,000 bytes")
    with pytest.raises(Misuse, match=r"The key is empty\."):
        bench.store.enqueue("tested", {}, key="")
    with pytest.raises(Misuse, match=r"The key is longer than 1,000 bytes\."):
        bench.start(bench.definition, {"order": "x"}, key=long)
    one_at_a_time = pipeline(agent("a"), version="2", concurrency_key="{{input.order}}", concurrency_parts=part)
    with pytest.raises(Misuse, match=r"The concurrency key is longer than 1,000 bytes\."):
        bench.start(one_at_a_time, {"order": long})


def test_completed_key_gives_its_output_to_another_run(bench):
    """A second run that meets a completed key takes its output and does not call."""
    key = ({"path": ["input", "order"]},)
    definition = pipeline(agent("a", key_parts=key))
    first = bench.start(definition, {"order": "7"})
    bid, _ = bench.claim(first, "a")
    bench.complete(bid, {"charged": True})
    second = bench.start(definition, {"order": "7"})
    again, claim = bench.claim(second, "a")
    assert (claim.outcome, claim.output, claim.reused_from) == ("reuse", {"charged": True}, str(bid.attempt_id))
    ended = bench.store.complete(again.step, again.attempt_id, claim.output, FREE, bid.attempt_id)
    assert ended.run_state == "completed"


def test_reserved_key_makes_another_run_wait(bench):
    """A run that meets a reserved key waits, and burns no attempt; a failure frees the key."""
    key = ({"path": ["input", "order"]},)
    definition = pipeline(agent("a", key_parts=key))
    first, second = (bench.start(definition, {"order": "7"}) for _ in range(2))
    bid, _ = bench.claim(first, "a")
    assert bench.claim(second, "a")[1].outcome == "deferred"
    assert bench.sql("select (attempts, waits) = (0, 1) from stepfast.steps where run_id = :r", r=second)
    bench.fail(bid)
    bench.pass_time(2)
    bench.sweep(lease_ms=CALM_MS)
    assert bench.claim(second, "a")[1].outcome == "claimed"


@pytest.mark.parametrize("run_input", [{"order": "7", "more": 1}, {}])
def test_bad_keys_are_named(bench, run_input):
    """The same key with other inputs, or a key that cannot be rendered, is refused by name."""
    key = ({"path": ["input", "order"]},)
    definition = pipeline(agent("a", key_parts=key))
    bench.do(bench.start(definition, {"order": "7"}), "a")
    _, claim = bench.claim(bench.start(definition, run_input), "a")
    assert claim.outcome == "bad_key"
    assert ("belongs to run" if run_input else "input.order") in claim.problem


def test_missing_handler_defers_and_never_fails(bench):
    """Absurd unknown_task_is_deferred_not_failed: the step waits for a worker that has the handler."""
    run = bench.start(line("a"))
    assert bench.store.defer(StepKey(run, "a"), 5_000, "no handler") is True
    assert bench.store.defer(StepKey(run, "a"), 5_000, "no handler") is False
    assert bench.states(run) == {"a": "retryable"}
    assert bench.sql("select (attempts, failures, waits) = (0, 0, 1) from stepfast.steps")


def test_effects_are_recorded_once(bench):
    """New, then unknown until it is ended, then happened with its output; forgotten, it is new again."""
    run = bench.start(line("a"))
    bid, _ = bench.claim(run, "a")
    begin = lambda: bench.store.begin_effect(bid.step, bid.attempt_id, "pay")  # noqa: E731
    assert [begin()["state"], begin()["state"]] == ["new", "unknown"]
    bench.store.end_effect(bid.step, bid.attempt_id, "pay", None)
    assert begin()["state"] == "new"
    bench.store.end_effect(bid.step, bid.attempt_id, "pay", {"receipt": 5})
    assert begin() == {"state": "happened", "output": {"receipt": 5}}


def test_what_was_committed_and_not_sent_is_found(bench):
    """Plain SQL's runs and lost messages: unsent steps at once, sent ones after a while, each to one sender."""
    bench.start(line("a"))
    assert bench.sweep().unsent is True
    with ThreadPoolExecutor(8) as pool:
        taken = [entry for found in pool.map(lambda _: bench.store.take_unsent(None, 10), range(8)) for entry in found]
    assert len(taken) == 1
    assert (bench.sweep().unsent, bench.sweep().overdue) == (False, ())
    bench.pass_time(3)
    assert bench.sweep(lease_ms=CALM_MS).overdue == ("agents",)
    assert len(bench.store.take_overdue(["agents"], 2_000, 10)) == 1
    # The wait doubles with each send.
    bench.pass_time(3)
    assert bench.sweep(lease_ms=CALM_MS).overdue == ()
    bench.pass_time(2)
    assert bench.sweep(lease_ms=CALM_MS).overdue == ("agents",)


def test_message_that_was_overtaken_is_sent_again(bench):
    """A backlog is no loss, however old: only what was sent well before a step that executes now was lost on the way."""
    lost = bench.start(line("a"))
    bench.store.take_unsent(None, 10)
    bench.pass_time(5)
    behind = [bench.start(line("a")) for _ in range(3)]
    bench.store.take_unsent(None, 10)
    bench.pass_time(7_200)
    # Its queue is full and nobody works on it: two hours are no reason.
    assert bench.sweep(lease_ms=CALM_MS).overdue == ("agents",)
    assert bench.store.take_overdue([], 2_000, 10) == ()
    # Sent 5 s after the first one: that may be the clocks.
    bench.claim(behind[0], "a")
    assert bench.store.take_overdue([], 2_000, 10) == ()
    overtaking = bench.start(line("a"))
    bench.store.take_unsent(None, 10)
    bench.claim(overtaking, "a")
    taken = {entry.step.run_id for entry in bench.store.take_overdue([], 2_000, 10)}
    assert taken == {lost, *behind[1:]}


def test_backlog_of_one_queue_does_not_hide_the_loss_of_another(bench):
    """Each queue is looked at by itself, also those that no agent of ours is named after."""
    for name, queue in (("one", "agents"), ("two", "handlers"), ("three", "night")):
        bench.start(pipeline(agent("a", queue=queue), name=name))
    bench.store.take_unsent(None, 10)
    bench.pass_time(3)
    assert bench.sweep(lease_ms=CALM_MS).overdue == ("agents", "handlers", "night")
    assert [entry.step.agent for entry in bench.store.take_overdue(["night"], 2_000, 10)] == ["a"]
    assert bench.sweep(lease_ms=CALM_MS).overdue == ("agents", "handlers")


def test_suspect_is_judged_at_the_end_of_its_grace(bench):
    """The sweep that finds a lock free says when to look again, so that a death costs no turn on top of the grace."""
    swept = bench.sweep(grace_ms=700)
    assert 600 < swept.judge_ms <= 700
    with bench.store.engine.connect() as holder:
        holder.execute(text("select pg_advisory_lock(7083, :id)"), {"id": bench.worker_id})
        assert bench.sweep(grace_ms=700).judge_ms is None
        holder.execute(text("select pg_advisory_unlock_all()"))
    bench.pass_time(1)
    swept = bench.sweep(grace_ms=700)
    assert (swept.lost, swept.judge_ms) == ((bench.worker_id,), None)
