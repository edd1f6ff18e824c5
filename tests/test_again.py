"""What is done again: by whom it may be ordered, what it may repeat, and which key it has."""

import pytest
from benches import CALM_MS, ERROR, FREE, Bench
from pipelines import agent, line, pipeline

from app.errors import NotPossible
from app.pipelines.model import FailureMode, OnRefused
from app.runs.database import engine
from app.runs.invariants import check
from app.runs.orders import Orders
from app.runs.store import Ending, Store

ORDER = ({"path": ["input", "order"]},)
EFFECT = {"handler": "handlers:effect"}
UNKNOWN = {**ERROR, "code": "outcome_unknown"}
REFUSED = {**ERROR, "code": "gate_refused", "message": "It does not hold.", "details": {"values": {"coder.n": 1}}}


@pytest.fixture
def bench(database_url):
    store = Store(engine(database_url, pool_max=8))
    made = Bench(store)
    made.orders = Orders(store.engine)
    yield made
    with store.engine.connect() as connection:
        assert check(connection) == []
    store.engine.dispose()


def _refuse(bench, run, name, rerun):
    """The gate of an agent refuses. `rerun` is the agent that it sends back to work; None where its rounds are used up."""
    bid, claim = bench.claim(run, name)
    assert claim.outcome == "claimed"
    ending = Ending("rerun", rerun=rerun, feedback={}) if rerun else Ending("discard")
    return bench.store.fail(bid.step, bid.attempt_id, REFUSED, FREE, ending), claim


def _loop():
    """The gate of the deployer sends the coder back; what follows the deployer runs without it, and has an effect."""
    return pipeline(
        agent("coder"),
        agent("reviewer", "coder"),
        agent("deployer", "reviewer", on_refused=OnRefused("coder", 2), failure_mode=FailureMode.CONTINUE),
        agent("notify", "deployer", **EFFECT),
    )


def _used_up(bench):
    """A run of `_loop` whose rounds are used up, and which has notified."""
    run = bench.start(_loop())
    for rerun in ("coder", "coder", None):
        bench.do(run, "coder", "reviewer")
        _refuse(bench, run, "deployer", rerun)
    bid, _ = bench.claim(run, "notify", repeatable=False)
    bench.complete(bid)
    assert bench.run_state(run) == "completed"
    return run


def test_resume_keeps_the_rounds_of_a_review_loop(bench):
    """A plain resume does the gated agent again and nothing else: no round of its loop is left."""
    run = _used_up(bench)
    assert bench.orders.resume(run, "me") == ("deployer",)
    _, claim = _refuse(bench, run, "deployer", None)
    assert claim.rounds == 2
    assert bench.states(run) == {
        "coder": "completed",
        "reviewer": "completed",
        "deployer": "discarded",
        "notify": "completed",
    }
    assert bench.sql("select max(generation) from stepfast.steps where agent in ('coder', 'notify')") == 3


def test_resume_from_opens_new_rounds(bench):
    """Whoever has the coder run again, and knows what that repeats, gives the loop its rounds again."""
    run = _used_up(bench)
    assert bench.orders.resume_from(run, "coder", "me") == ("coder", "deployer", "notify", "reviewer")
    bench.do(run, "coder", "reviewer")
    _, claim = _refuse(bench, run, "deployer", "coder")
    assert claim.rounds == 0
    assert bench.states(run)["coder"] == "available"


def test_gate_repeats_no_effect(bench):
    """Rounds are left, but what depends on the coder has had its effect: the loop ends, and says why."""
    run = bench.start(_loop())
    bench.do(run, "coder", "reviewer")
    bench.fail(bench.claim(run, "deployer")[0])
    bench.complete(bench.claim(run, "notify", repeatable=False)[0])
    bench.orders.resume(run, "me")
    ended, _ = _refuse(bench, run, "deployer", "coder")
    assert (ended.outcome, ended.run_state) == ("discarded", "completed")
    assert bench.sql("select payload->>'message' from stepfast.dead_letters where resolved_at is null") == (
        "It does not hold. It was not sent back to coder, because what notify did may not be repeated."
    )


@pytest.mark.parametrize("lost", [False, True])
def test_gate_repeats_no_effect_whose_output_a_person_gave(bench, lost):
    """Who overrides what had its effect, or says by it that it happened, has nothing done again: nor has a gate then."""
    run = bench.start(_loop())
    bench.do(run, "coder", "reviewer")
    bench.fail(bench.claim(run, "deployer")[0])
    notify, _ = bench.claim(run, "notify", repeatable=False)
    bench.fail(notify, error=UNKNOWN) if lost else bench.complete(notify)
    for _ in range(2):
        bench.orders.override(run, "notify", {"sent": True}, "me", None)
    bench.orders.resume(run, "me")
    ended, _ = _refuse(bench, run, "deployer", "coder")
    assert ended.outcome == "discarded"
    assert bench.states(run)["notify"] == "completed"


def test_refused_gate_leaves_its_values_in_the_events(bench):
    """Structured, of a gate that sends back and of one that ends in a dead letter."""
    run = bench.start(_loop())
    for rerun in ("coder", None):
        bench.do(run, "coder", "reviewer")
        _refuse(bench, run, "deployer", rerun)
    for name in ("step.rerun", "step.discarded"):
        assert bench.sql("select data->'values' from stepfast.events where name = :n", n=name) == {"coder.n": 1}


def test_unknown_outcome_is_settled_by_its_own_name_alone(bench):
    """To resume from an agent before it says nothing of whether it happened: that is refused, and names it."""
    run = bench.start(pipeline(agent("a"), agent("b", "a"), agent("slow", "b", **EFFECT), agent("last", "slow")))
    bench.do(run, "a", "b")
    bench.fail(bench.claim(run, "slow", repeatable=False)[0], error=UNKNOWN)
    for name in ("a", "b", "last"):
        with pytest.raises(NotPossible, match="whether the effect of slow happened"):
            bench.orders.resume_from(run, name, "me")
        with pytest.raises(NotPossible, match="whether the effect of slow happened"):
            bench.orders.rehearse(run, "me", name)
    assert bench.sql("select count(*) from stepfast.dead_letters where resolved_at is null") == 1
    assert bench.orders.resume_from(run, "slow", "me") == ("last", "slow")


def test_what_may_not_be_interrupted_is_waited_for(bench):
    """No resume of an effect under way begins it a second time; a model's call loses its claim."""
    run = bench.start(pipeline(agent("a"), agent("slow", "a", **EFFECT), agent("ask", "a")))
    bench.do(run, "a")
    slow, _ = bench.claim(run, "slow", repeatable=False)
    bench.claim(run, "ask")
    before = bench.states(run)
    with pytest.raises(NotPossible, match="slow is executing and may not be interrupted"):
        bench.orders.resume_from(run, "slow", "me")
    assert bench.states(run) == before
    assert bench.orders.resume_from(run, "ask", "me") == ("ask",)
    bench.complete(slow)
    assert bench.orders.resume_from(run, "a", "me") == ("a", "ask", "slow")


def _keyed():
    return pipeline(agent("a", handler="handlers:a", key_parts=ORDER))


def test_key_of_what_did_not_happen_is_taken_once(bench):
    """Settled by a resume: whoever comes first has the effect, and the other one waits and takes what that gave."""
    first, second = (bench.start(_keyed(), {"order": "7"}) for _ in range(2))
    bench.fail(bench.claim(first, "a", repeatable=False)[0], error=UNKNOWN)
    assert bench.claim(second, "a", repeatable=False)[1].reason == "key_unknown"
    bench.orders.resume_from(first, "a", "me")
    again, claim = bench.claim(first, "a", repeatable=False)
    assert (claim.outcome, claim.generation) == ("claimed", 2)
    bench.pass_time(60)
    bench.sweep(lease_ms=CALM_MS)
    assert bench.claim(second, "a", repeatable=False)[1].reason == "key_reserved"
    bench.complete(again, {"charged": 1})
    bench.pass_time(60)
    bench.sweep(lease_ms=CALM_MS)
    assert bench.claim(second, "a", repeatable=False)[1].output == {"charged": 1}


def test_key_of_what_happened_gives_its_output_to_whoever_waits(bench):
    """Settled by an override: the run that waited for the key takes what the person said."""
    first, second = (bench.start(_keyed(), {"order": "7"}) for _ in range(2))
    bench.fail(bench.claim(first, "a", repeatable=False)[0], error=UNKNOWN)
    assert bench.claim(second, "a", repeatable=False)[1].reason == "key_unknown"
    bench.orders.override(first, "a", {"charged": 7}, "ann", "saw it")
    bench.pass_time(60)
    bench.sweep(lease_ms=CALM_MS)
    taken, claim = bench.claim(second, "a", repeatable=False)
    assert claim.output == {"charged": 7}
    bench.store.complete(taken.step, taken.attempt_id, claim.output, FREE, claim.reused_from)
    # Whoever has it done again makes another outcome, after this one.
    bench.orders.resume_from(first, "a", "me")
    assert bench.claim(first, "a", repeatable=False)[1].outcome == "claimed"
    assert bench.sql("select array_agg(generation order by generation) from stepfast.keys") == [1, 2]


def test_same_key_with_other_inputs_is_refused_until_it_is_meant(bench):
    """By name, where the paths of `key_inputs` differ; `resume --from` the agent does it all the same."""
    definition = pipeline(agent("a"), agent("b", "a", key_parts=ORDER, key_inputs=(("a", "diff"),), **EFFECT))
    first, second = (bench.start(definition, {"order": "7"}) for _ in range(2))
    for run, diff in ((first, "x"), (second, "y")):
        bench.complete(bench.claim(run, "a")[0], {"diff": diff})
    bench.complete(bench.claim(first, "b", repeatable=False)[0])
    bid, claim = bench.claim(second, "b", repeatable=False)
    assert (claim.outcome, f"belongs to run {first}" in claim.problem) == ("bad_key", True)
    bench.fail(bid, error={**ERROR, "code": "author_mistake"})
    bench.orders.resume_from(second, "b", "me")
    assert bench.claim(second, "b", repeatable=False)[1].outcome == "claimed"


def test_resume_from_repeats_whatever_other_runs_did(bench):
    """Each run that is told to do it again does it again, one after the other; a new run takes the newest output."""
    runs = [bench.start(_keyed(), {"order": "7"}) for _ in range(2)]
    bench.do(runs[0], "a")
    reused, claim = bench.claim(runs[1], "a", repeatable=False)
    assert claim.outcome == "reuse"
    bench.store.complete(reused.step, reused.attempt_id, claim.output, FREE, claim.reused_from)
    for run in runs:
        bench.orders.resume_from(run, "a", "me")
    repeated, claim = bench.claim(runs[0], "a", repeatable=False)
    assert claim.outcome == "claimed"
    assert bench.claim(runs[1], "a", repeatable=False)[1].reason == "key_reserved"
    bench.complete(repeated, {"n": 2})
    bench.pass_time(60)
    bench.sweep(lease_ms=CALM_MS)
    repeated, claim = bench.claim(runs[1], "a", repeatable=False)
    assert (claim.outcome, bench.store.claim(repeated).outcome) == ("claimed", "claimed")
    bench.complete(repeated, {"n": 3})
    assert bench.sql("select array_agg(generation order by generation) from stepfast.keys") == [1, 2, 3]
    newest, claim = bench.claim(bench.start(_keyed(), {"order": "7"}), "a", repeatable=False)
    assert (claim.outcome, claim.output, bench.store.claim(newest).output) == ("reuse", {"n": 3}, {"n": 3})


def test_review_rounds_share_their_key_with_other_runs(bench):
    """A generation in which nothing was recorded leaves nothing to repeat: what another run recorded is taken."""
    definition = pipeline(
        agent("coder"), agent("deployer", "coder", key_parts=ORDER, on_refused=OnRefused("coder", 1), **EFFECT)
    )
    first, second = (bench.start(definition, {"order": "7"}) for _ in range(2))
    for run in (first, second):
        bench.do(run, "coder")
        _refuse(bench, run, "deployer", "coder")
        bench.do(run, "coder")
    bid, claim = bench.claim(first, "deployer", repeatable=False)
    assert (claim.outcome, claim.generation) == ("claimed", 2)
    bench.complete(bid, {"deployed": 1})
    assert bench.claim(second, "deployer", repeatable=False)[1].output == {"deployed": 1}


def test_output_that_came_late_leaves_its_run_partial(bench):
    """Under `continue` the dependents ran without it: that it is there in the end does not make the run whole."""
    run = bench.start(pipeline(agent("slow", failure_mode=FailureMode.CONTINUE, **EFFECT), agent("after", "slow")))
    late, _ = bench.claim(run, "slow", repeatable=False)
    bench.sql("update stepfast.workers set ended_at = stepfast.now()")
    bench.sweep()
    bench.worker_id += 1
    bench.sql(
        "insert into stepfast.workers (host, pid, code_version, started_at, lease_until)"
        " values ('h', 2, 1, stepfast.now(), stepfast.now() + interval '9 hours')"
    )
    after, _ = bench.claim(run, "after")
    assert bench.complete(late).outcome == "completed"
    assert bench.complete(after).run_state == "completed"
    assert bench.sql("select partial from stepfast.runs where id = :r", r=run)
    bench.orders.resume_from(run, "after", "me")
    bench.do(run, "after")
    assert not bench.sql("select partial from stepfast.runs where id = :r", r=run)


@pytest.mark.parametrize("others", [(), ("after",)])
def test_output_that_came_late_and_was_all_that_lacked_makes_its_run_whole(bench, others):
    """Where something was skipped for want of it, the run stays partial, and a resume goes on."""
    slow = agent("slow", failure_mode=FailureMode.SKIP_DEPENDENTS, **EFFECT)
    run = bench.start(pipeline(slow, *(agent(name, "slow") for name in others)))
    late, _ = bench.claim(run, "slow", repeatable=False)
    bench.sql("update stepfast.workers set ended_at = stepfast.now()")
    bench.sweep()
    partial = "select partial from stepfast.runs where id = :r"
    assert bench.sql(partial, r=run)
    assert bench.complete(late).outcome == "completed"
    assert bench.sql(partial, r=run) == bool(others)


def test_resume_from_a_completed_run_goes_on_to_its_end(bench):
    """With the default key, which no other run shares."""
    run = bench.start(line("a", "b"))
    bench.do(run, "a", "b")
    bench.orders.resume_from(run, "a", "me")
    assert bench.do(run, "a", "b").run_state == "completed"
