"""What a dependency's consistency means for claims, overrides and resumes: strong is done again, a snapshot is kept."""

from dataclasses import replace

import pytest
from benches import ERROR, FREE, Bench
from pipelines import agent, line, pipeline

from app.cli.show import steps_table
from app.errors import NotPossible
from app.pipelines.model import Checkpointing, Consistency, Dependency, FailureMode, OnStale
from app.runs.database import engine
from app.runs.explain import explain, stale_reads
from app.runs.invariants import check
from app.runs.orders import Orders
from app.runs.reads import Reads
from app.runs.resume_plan import resume_plan, sentences
from app.runs.store import Ending, Store

MINUTE_MS = 60_000
RERUNS_MAX = 3


@pytest.fixture
def bench(database_url):
    store = Store(engine(database_url, pool_max=4))
    made = Bench(store)
    made.orders = Orders(store.engine)
    yield made
    with store.engine.connect() as connection:
        found = check(connection)
    store.engine.dispose()
    assert found == []


def snapshot(name, on_stale=OnStale.ACCEPT, max_ms=MINUTE_MS):
    return Dependency(name, Consistency.SNAPSHOT, max_ms, on_stale)


def reading(on_stale=OnStale.ACCEPT, **fields):
    """B reads a strongly, and c reads a snapshot of it."""
    return pipeline(agent("a", **fields), agent("b", "a"), agent("c", "a", declared=(snapshot("a", on_stale),)))


def told(bench, run, name):
    return [event for event in Reads(bench.store.engine).event_list(run) if event["name"] == name]


def output(bench, run, name):
    return bench.sql(
        "select a.output from stepfast.steps s join stepfast.attempts a on a.id = s.attempt_id"
        " where s.run_id = :r and s.agent = :a",
        r=run,
        a=name,
    )


def test_override_does_strong_dependents_again_and_leaves_snapshots(bench):
    """The new output reaches b; c keeps what it made, and the events say that it was made of the old one."""
    run = bench.start(reading())
    bench.do(run, "a", "b", "c")
    assert bench.orders.override(run, "a", {"better": 1}, "ann", None) == ("b",)
    assert bench.states(run) == {"a": "completed", "b": "available", "c": "completed"}
    (event,) = told(bench, run, "step.stale_read")
    assert (event["agent"], event["data"]["reason"]) == ("c", "a was overridden")
    assert list(event["data"]["reads"]) == ["a"]
    assert bench.claim(run, "b")[1].outputs == {"a": {"better": 1}}


def test_executing_strong_dependent_is_fenced_and_runs_again(bench):
    """Its commit is refused, and its next attempt is given the new output; a snapshot's commit counts."""
    run = bench.start(reading())
    bench.do(run, "a")
    strong, _ = bench.claim(run, "b")
    kept, _ = bench.claim(run, "c")
    bench.orders.override(run, "a", {"better": 1}, "ann", None)
    assert bench.complete(strong).outcome == "stale"
    assert bench.complete(kept).outcome == "completed"
    bid, claim = bench.claim(run, "b")
    assert (claim.outputs, claim.generation) == ({"a": {"better": 1}}, 2)
    assert bench.complete(bid).run_state == "completed"


@pytest.mark.parametrize("order", ["override", "resume_from"])
def test_executing_effect_on_an_old_input_is_an_unknown_outcome(bench, order):
    """It may have had its effect: a dead letter for a person, and no late confirmation on an input that is gone."""
    run = bench.start(pipeline(agent("a"), agent("b", "a", handler="handlers:b")))
    bench.do(run, "a")
    bid, _ = bench.claim(run, "b", repeatable=False)
    if order == "override":
        assert bench.orders.override(run, "a", {"better": 1}, "ann", None) == ()
    else:
        assert bench.orders.resume_from(run, "a", "me") == ("a",)
    assert (bench.states(run)["b"], bench.run_state(run)) == ("discarded", "failed")
    assert bench.sql("select code from stepfast.dead_letters where resolved_at is null") == "outcome_unknown"
    assert bench.sql("select payload->>'message' from stepfast.dead_letters").startswith(
        "b was executing on an old input when "
    )
    assert bench.complete(bid).outcome == "stale"
    with pytest.raises(NotPossible, match="Nobody knows"):
        bench.orders.resume(run, "me")
    bench.orders.resume_from(run, "b", "me")
    if order == "resume_from":
        bench.do(run, "a")
    assert bench.claim(run, "b", repeatable=False)[1].outputs["a"] == output(bench, run, "a")


def test_named_agent_that_executes_and_may_not_be_interrupted_is_left_alone(bench):
    """Nothing asks for its outcome to be unknown: whoever wants that cancels the run."""
    run = bench.start(pipeline(agent("a", handler="handlers:a"), agent("b", "a")))
    bid, _ = bench.claim(run, "a", repeatable=False)
    with pytest.raises(NotPossible, match="may not be interrupted"):
        bench.orders.resume_from(run, "a", "me")
    assert bench.complete(bid).outcome == "completed"


def test_effect_that_executes_in_a_failed_run_is_unknown_after_a_resume_from(bench):
    """The resume gives back what was discarded before it, and not what it discards itself."""
    definition = pipeline(agent("a"), agent("b", "a", handler="handlers:b"), agent("x"))
    run = bench.start(definition)
    bench.do(run, "a")
    bench.claim(run, "b", repeatable=False)
    bench.fail(bench.claim(run, "x")[0])
    assert bench.orders.resume_from(run, "a", "me") == ("a", "x")
    assert bench.states(run)["b"] == "discarded"
    assert bench.sql("select count(*) from stepfast.dead_letters where resolved_at is null") == 1


def test_snapshot_does_not_wait_for_the_new_output(bench):
    """While a is done again c reads its last output, marked as a stale read; b waits for the new one."""
    run = bench.start(reading())
    bench.do(run, "a")
    bench.orders.resume_from(run, "a", "me")
    assert bench.states(run) == {"a": "available", "b": "pending", "c": "available"}
    bench.claim(run, "a")
    bench.pass_time(2)
    bid, claim = bench.claim(run, "c")
    assert claim.outputs == {"a": {"by": "a"}}
    stale = claim.stale["a"]
    assert (stale["superseded"], stale["too_old"]) == (True, False)
    assert 2_000 <= stale["age_ms"] < 60_000
    bench.complete(bid)
    assert bench.sql("select stale_reads from stepfast.attempts where agent = 'c'") == claim.stale
    (event,) = told(bench, run, "step.stale_read")
    assert (event["agent"], event["data"]["reads"]) == ("c", claim.stale)


def test_repeated_claim_gets_what_it_pinned(bench):
    """A lost reply: the same attempt is given the same output, also where that was superseded in between."""
    run = bench.start(reading())
    bench.do(run, "a")
    bid, first = bench.claim(run, "c")
    bench.orders.override(run, "a", {"better": 1}, "ann", None)
    assert bench.store.claim(bid).outputs == first.outputs == {"a": {"by": "a"}}


def test_snapshot_within_its_age_is_no_stale_read(bench):
    """What stands there and is young enough is read as it is, without a mark."""
    run = bench.start(reading(OnStale.FAIL))
    bench.do(run, "a")
    bench.pass_time(50)
    bid, claim = bench.claim(run, "c")
    assert (claim.outcome, claim.stale) == ("claimed", None)
    bench.complete(bid)
    assert told(bench, run, "step.stale_read") == []


def test_old_snapshot_is_accepted_with_a_mark(bench):
    """`on_stale: accept`: however old, and whoever looks later sees how old."""
    run = bench.start(reading(OnStale.ACCEPT))
    bench.do(run, "a")
    bench.pass_time(90)
    _, claim = bench.claim(run, "c")
    assert (claim.outcome, claim.stale["a"]["too_old"]) == ("claimed", True)
    assert 90_000 <= claim.stale["a"]["age_ms"] < 150_000


def test_old_snapshot_fails_with_its_ages(bench):
    """`on_stale: fail`: the attempt is there to be ended, reserves no key, and says how old is too old."""
    run = bench.start(reading(OnStale.FAIL))
    bench.do(run, "a")
    bench.pass_time(90)
    bid, claim = bench.claim(run, "c")
    assert claim.outcome == "too_old"
    assert claim.problem.startswith("the output of a is 90")
    assert claim.problem.endswith(" ms old, and c may not use it after 60000 ms")
    assert bench.store.claim(bid).outcome == "too_old"
    assert bench.sql("select count(*) from stepfast.keys where agent = 'c'") == 0
    assert bench.fail(bid).outcome == "discarded"


def test_old_snapshot_is_done_again(bench):
    """`on_stale: rerun`: a new generation of a, with all that reads it strongly; c waits for it, and counts no failure."""
    run = bench.start(reading(OnStale.RERUN))
    bench.do(run, "a", "b")
    bench.pass_time(90)
    _, claim = bench.claim(run, "c")
    assert (claim.outcome, claim.reason) == ("deferred", "stale_input")
    assert [entry.step.agent for entry in claim.next] == ["a"]
    assert bench.states(run) == {"a": "available", "b": "pending", "c": "pending"}
    (event,) = told(bench, run, "step.stale_input")
    assert (event["agent"], event["data"]["rerun"]) == ("c", ["a"])
    bench.do(run, "a")
    _, claim = bench.claim(run, "c")
    assert (claim.outcome, claim.stale, claim.failures, claim.number) == ("claimed", None, 0, 1)
    assert bench.claim(run, "b")[1].generation == 2


def test_old_snapshot_waits_for_what_is_being_made(bench):
    """Where the next output is under way already nothing is done again once more."""
    run = bench.start(reading(OnStale.RERUN))
    bench.do(run, "a")
    assert bench.states(run)["c"] == "available"
    bench.orders.resume_from(run, "a", "me")
    bench.pass_time(90)
    assert bench.claim(run, "c")[1].outcome == "deferred"
    assert bench.states(run)["c"] == "pending"
    bench.do(run, "a")
    assert bench.sql("select max(generation) from stepfast.attempts where agent = 'a'") == 2
    assert bench.claim(run, "c")[1].outcome == "claimed"


def test_snapshot_without_any_output_waits_for_the_one_that_is_made_after_all(bench):
    """Under `continue` c may begin without a's; then a person has a done again before c is claimed."""
    a = agent("a", failure_mode=FailureMode.CONTINUE)
    run = bench.start(pipeline(a, agent("c", "a", declared=(snapshot("a"),)), agent("other")))
    bench.fail(bench.claim(run, "a")[0])
    assert bench.states(run)["c"] == "available"
    bench.orders.resume_from(run, "a", "me")
    claim = bench.claim(run, "c")[1]
    assert (claim.outcome, claim.reason, bench.states(run)["c"]) == ("deferred", "stale_input", "pending")
    (event,) = told(bench, run, "step.stale_input")
    assert event["data"]["absent"] == ["a"]
    bench.do(run, "a")
    assert bench.claim(run, "c")[1].outcome == "claimed"


def test_old_snapshot_is_done_again_a_bounded_number_of_times(bench):
    """Whoever never gets to it in time ends as a dead letter; a resume allows it as often again."""
    run = bench.start(reading(OnStale.RERUN))
    for _ in range(RERUNS_MAX):
        bench.do(run, "a")
        bench.pass_time(90)
        assert bench.claim(run, "c")[1].outcome == "deferred"
    bench.do(run, "a", "b")
    bench.pass_time(90)
    bid, claim = bench.claim(run, "c")
    assert claim.problem.endswith("ms; it was done again 3 times")
    bench.fail(bid)
    bench.orders.resume(run, "me")
    assert bench.claim(run, "c")[1].outcome == "deferred"


def test_stale_snapshot_repeats_no_effect(bench):
    """What cannot be seen in the file: a handler that may not be repeated has run on the old output meanwhile."""
    definition = reading(OnStale.RERUN)
    b = replace(definition.by_id["b"], model=None, handler="handlers:b")
    run = bench.start(replace(definition, agents=(definition.agents[0], b, definition.agents[2])))
    bench.do(run, "a")
    bid, _ = bench.claim(run, "b", repeatable=False)
    bench.complete(bid)
    bench.pass_time(90)
    bid, claim = bench.claim(run, "c")
    assert claim.problem.endswith("it is not done again, because what b did may not be repeated")
    bench.fail(bid)


@pytest.mark.parametrize("idempotent", [False, True])
def test_stale_snapshot_repeats_no_effect_in_ctx_once(bench, idempotent):
    """It may be attempted again, and its record is of one generation: only `idempotent: true` has it done once more."""
    definition = reading(OnStale.RERUN)
    b = replace(definition.by_id["b"], model=None, handler="handlers:b", idempotent=idempotent)
    run = bench.start(replace(definition, agents=(definition.agents[0], b, definition.agents[2])))
    bench.do(run, "a")
    bid, _ = bench.claim(run, "b")
    bench.store.begin_effect(bid.step, bid.attempt_id, "pay")
    bench.store.end_effect(bid.step, bid.attempt_id, "pay", {"receipt": 1})
    bench.complete(bid)
    bench.pass_time(90)
    bid, claim = bench.claim(run, "c")
    assert claim.outcome == ("deferred" if idempotent else "too_old")
    if not idempotent:
        bench.fail(bid)


def test_stale_snapshot_replaces_no_output_of_a_person(bench):
    """Whoever overrode it decided it: that is not undone because time passed."""
    run = bench.start(reading(OnStale.RERUN))
    bench.do(run, "a")
    bench.orders.override(run, "a", {"better": 1}, "ann", None)
    bench.pass_time(90)
    bid, claim = bench.claim(run, "c")
    assert claim.problem.endswith("it is not done again, because ann gave it by hand")
    bench.fail(bid)


def test_age_of_a_taken_output_is_counted_where_it_was_made(bench):
    """A key that another run completed an hour ago gives an hour-old output; done again, it is made anew."""
    key = ({"path": ["input", "order"]},)
    definition = reading(OnStale.RERUN, key_parts=key)
    bench.do(bench.start(definition, {"order": "7"}), "a", "b", "c")
    bench.pass_time(3_600)
    run = bench.start(definition, {"order": "7"})
    bid, claim = bench.claim(run, "a")
    assert claim.outcome == "reuse"
    bench.store.complete(bid.step, bid.attempt_id, claim.output, FREE, claim.reused_from)
    assert bench.claim(run, "c")[1].outcome == "deferred"
    assert bench.claim(run, "a")[1].outcome == "claimed"


def test_what_comes_after_a_snapshot_is_not_done_again(bench):
    """D reads c strongly and c a snapshot of a: nothing of them follows a. A handler is still given a's last output."""
    definition = pipeline(
        agent("a"), agent("c", "a", declared=(snapshot("a"),)), agent("d", "c", reads=("a", "c"), handler="handlers:d")
    )
    run = bench.start(definition)
    bench.do(run, "a", "c")
    assert bench.orders.resume_from(run, "a", "me") == ("a",)
    bid, claim = bench.claim(run, "d")
    assert (set(claim.outputs), claim.stale["a"]["superseded"]) == ({"a", "c"}, True)
    bench.complete(bid)


def test_snapshot_that_is_also_read_strongly_is_done_again(bench):
    """D depends on b, and b strongly on a: there is no way to keep d while b is made anew."""
    definition = pipeline(agent("a"), agent("b", "a"), agent("d", "a", "b", declared=(snapshot("a"),)))
    run = bench.start(definition)
    bench.do(run, "a", "b", "d")
    assert bench.orders.resume_from(run, "a", "me") == ("a", "b", "d")
    assert bench.states(run) == {"a": "available", "b": "pending", "d": "pending"}


def test_review_round_leaves_snapshots(bench):
    """A gate sends work back: what reads a snapshot of it goes on with what there is."""
    definition = pipeline(agent("a"), agent("b", "a"), agent("c", "a", declared=(snapshot("a"),)))
    run = bench.start(definition)
    bench.do(run, "a", "c")
    bid, _ = bench.claim(run, "b")
    bench.store.fail(bid.step, bid.attempt_id, ERROR | {"code": "gate_refused"}, FREE, Ending("rerun", rerun="a"))
    assert bench.states(run) == {"a": "available", "b": "pending", "c": "completed"}


def test_show_marks_stale_reads(bench):
    """Those that were stale at the claim, and those that an override made so afterwards; explain tells of both."""
    definition = pipeline(
        agent("a"), agent("x"), agent("c", "a", declared=(snapshot("a"),)), agent("d", "x", declared=(snapshot("x"),))
    )
    run = bench.start(definition)
    bench.do(run, "a", "x")
    bench.pass_time(90)
    bench.do(run, "c")
    bench.do(run, "d")
    bench.orders.override(run, "x", {"better": 1}, "ann", None)
    reads = Reads(bench.store.engine)
    found = reads.run(run)
    assert {name: stale for name, stale in stale_reads(found).items() if stale} == {"c": ["a"], "d": ["x"]}
    assert [str(cell) for cell in steps_table(found).columns[1]._cells] == [
        *("completed", "completed", "completed (stale read of a)", "completed (stale read of x)")
    ]
    assert "stale reads were accepted: c, d" in explain(found, reads.event_list(run)).text


def plan(bench, run, from_agent=None):
    reads = Reads(bench.store.engine)
    after = bench.orders.rehearse(run, "me", from_agent)
    return resume_plan(
        reads.run(run), after, bench.definition, None, now=reads.now(), code_here={}, effects=reads.effect_list(run)
    )


def test_plan_tells_what_will_be_unknown(bench):
    """Before a person types the command that interrupts an effect."""
    run = bench.start(pipeline(agent("a"), agent("b", "a", handler="handlers:b")))
    bench.do(run, "a")
    bench.claim(run, "b", repeatable=False)
    assert [entry["verdict"] for entry in plan(bench, run, "a")["agents"]] == ["re-run", "outcome unknown"]
    assert bench.states(run)["b"] == "executing"


def test_plan_marks_checkpoints_past_their_ttl(bench):
    """They are kept: a ttl that did work again by itself would cost money when nobody looks."""
    run = bench.start(pipeline(agent("a"), agent("b", "a"), checkpointing=Checkpointing(ttl_minutes=60)))
    bench.do(run, "a")
    bench.fail(bench.claim(run, "b")[0])
    assert [entry["past_ttl"] for entry in plan(bench, run)["agents"]] == [False, False]
    bench.pass_time(3_700)
    found = plan(bench, run)
    assert [(entry["verdict"], entry["past_ttl"]) for entry in found["agents"]] == [("reuse", True), ("re-run", False)]
    assert found["agents"][0]["reason"] == "completed; older than its ttl of 60 minutes"
    assert any("older than the checkpoints' ttl: a." in sentence for sentence in sentences(found))


def test_plain_line_reads_no_snapshot(bench):
    """Without a declaration nothing of this is to be seen."""
    run = bench.start(line("a", "b"))
    bench.do(run, "a", "b")
    assert bench.sql("select bool_and(stale_reads is null) from stepfast.attempts")
    assert bench.sql("select bool_and(snapshots = '{}' and stale_reruns = 0) from stepfast.steps")
