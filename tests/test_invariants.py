"""The checker names the rule that was broken, and histories that once broke one hold."""

from uuid import UUID, uuid4

import pytest
from benches import ERROR, FREE, Bench
from pipelines import ONE_TRY, agent, diamond, line, pipeline

from app.errors import NotPossible
from app.pipelines.model import Consistency, Dependency, OnRefused, OnStale
from app.runs.database import engine
from app.runs.invariants import check
from app.runs.orders import Orders
from app.runs.store import Ending, Store

UNKNOWN = {**ERROR, "code": "outcome_unknown"}
ORDER = ({"path": ["input", "order"]},)


@pytest.fixture
def bench(database_url):
    store = Store(engine(database_url, pool_max=4))
    made = Bench(store)
    made.orders = Orders(store.engine)
    yield made
    store.engine.dispose()


def violations(bench, run_id=None):
    with bench.store.engine.connect() as connection:
        return check(connection, run_id)


def test_whole_database_holds(bench):
    """Nothing is found where nothing is wrong, in one run and in all."""
    runs = [bench.start(diamond()) for _ in range(3)]
    bench.do(runs[0], "a", "b", "c", "d")
    bench.fail(bench.claim(runs[1], "a")[0])
    assert violations(bench) == violations(bench, runs[1]) == []


def another_attempt(changes: str) -> str:
    """An attempt like that of a, but for these changes."""
    return (
        f"insert into stepfast.attempts select (jsonb_populate_record(t, '{changes}')).*"
        " from stepfast.attempts t where agent = 'a'"
    )


@pytest.mark.parametrize(
    ("rule", "damage"),
    [
        (1, another_attempt(f'{{"id": "{uuid4()}", "number": 9}}')),
        (2, "update stepfast.events set seq = seq + 100 where agent = 'a'"),
        (3, "update stepfast.pipelines set definition = jsonb_set(definition, '{agents,1,gate}', '\"1 > 2\"')"),
        (4, "delete from stepfast.keys where agent = 'a'"),
        (5, "update stepfast.steps set state = 'pending' where state = 'available'"),
        (6, "update stepfast.steps set state = 'discarded', ended_at = now() where state = 'available'"),
        (
            7,
            another_attempt(
                f'{{"id": "{uuid4()}", "state": "lost", "repeatable": false, "output": null, "error": {{"code": "x"}}}}'
            ),
        ),
        (8, "delete from stepfast.events where seq = 3"),
    ],
)
def test_damage_breaks_its_rule(bench, rule, damage):
    """Whoever changes the tables past the functions is found."""
    run = bench.start(line("a", "b", "c"))
    bench.do(run, "a", "b")
    bench.sql(damage)
    assert rule in {found.rule for found in violations(bench, run)}


REOPENED = (
    "insert into stepfast.events (run_id, seq, name, at, agent, item, generation, data) select id, event_seq + 1,"
    " 'step.reopened', stepfast.now(), 'a', '', :generation, jsonb_build_object('reason', cast(:reason as text)) from stepfast.runs"
)


@pytest.mark.parametrize(
    ("unknown", "reason", "found"),
    [
        (True, "me resumed from b", {7}),
        (True, "b was overridden", {7}),
        (True, "the gate of b refused", {7}),
        (True, "me resumed from a", set()),
        (False, "the gate of b refused", {7}),
        (False, "me resumed from b", set()),
    ],
)
def test_only_who_may_have_an_effect_repeated(bench, unknown, reason, found):
    """An unknown outcome is settled by its own name; an effect that happened is repeated by a person."""
    run = bench.start(pipeline(agent("a", handler="h.py:f"), agent("b", "a")))
    bid, _ = bench.claim(run, "a", repeatable=False)
    bench.fail(bid, error=UNKNOWN) if unknown else bench.complete(bid)
    bench.sql(REOPENED, generation=2, reason=reason)
    assert {violation.rule for violation in violations(bench, run)} - {8} == found


def test_effect_counts_on_after_an_override(bench):
    """A person's output begins a generation, and is no leave for a gate to repeat the effect before it."""
    run = bench.start(pipeline(agent("a", handler="h.py:f"), agent("b", "a")))
    bid, _ = bench.claim(run, "a", repeatable=False)
    bench.complete(bid)
    bench.orders.override(run, "a", {}, "me", None)
    bench.sql(REOPENED, generation=3, reason="the gate of b refused")
    assert {violation.rule for violation in violations(bench, run)} - {8} == {7}


OVERRIDDEN = (
    another_attempt(f'{{"id": "{UUID(int=9)}", "number": 2, "decided_by": "me", "worker_id": null, "key": null}}'),
    f"update stepfast.steps set attempt_id = '{UUID(int=9)}', attempts = 2 where agent = 'a'",
)
WITHOUT_A_MARK = ("update stepfast.attempts set stale_reads = null where agent = 'b'",)
NOT_ACCEPTED = (
    "update stepfast.attempts set stale_reads = jsonb_set(stale_reads, '{a,on_stale}', '\"fail\"') where agent = 'b'",
)


@pytest.mark.parametrize(
    ("consistency", "damage"), [("strong", OVERRIDDEN), ("snapshot", WITHOUT_A_MARK), ("snapshot", NOT_ACCEPTED)]
)
def test_reads_that_are_not_as_declared_are_found(bench, consistency, damage):
    """A strong dependent that was not done again; a snapshot that is too old and says nothing, or is refused."""
    declared = () if consistency == "strong" else (Dependency("a", Consistency.SNAPSHOT, 1_000, OnStale.ACCEPT),)
    run = bench.start(pipeline(agent("a"), agent("b", "a", declared=declared)))
    bench.do(run, "a")
    bench.pass_time(60)
    bid, _ = bench.claim(run, "b")
    if consistency == "strong":
        bench.complete(bid)
    assert violations(bench) == []
    for statement in damage:
        bench.sql(statement)
    if consistency == "snapshot":
        bench.complete(bid)
    assert 9 in {violation.rule for violation in violations(bench, run)}


def test_two_runs_of_one_concurrency_key_are_found(bench):
    """Also where one of them has failed, and something of it still executes."""
    definition = pipeline(agent("a"), agent("b"), concurrency_parts=({"text": "one"},), concurrency_key="one")
    first, second = (bench.start(definition) for _ in range(2))
    bench.claim(first, "a")
    bench.fail(bench.claim(first, "b")[0])
    assert violations(bench) == []
    bench.sql("update stepfast.steps set state = 'available' where run_id = :r", r=second)
    assert {violation.rule for violation in violations(bench)} == {5}


def test_generations_of_a_key_at_one_time_are_found(bench):
    """The second was reserved before the first was completed."""
    run = bench.start(line("a", "b"))
    bench.do(run, "a")
    changes = '{"generation": 2, "state": "reserved", "ended_at": null, "reserved_at": "2000-01-01"}'
    bench.sql(f"insert into stepfast.keys select (jsonb_populate_record(k, '{changes}')).* from stepfast.keys k")
    assert 4 in {violation.rule for violation in violations(bench, run)}


def test_repeated_claim_repeats_a_refusal(bench):
    """A claim that was refused its key, or given an output, is answered the same when its reply was lost."""
    definition = pipeline(agent("a", key_parts=ORDER))
    bench.do(bench.start(definition, {"order": "7"}), "a")
    for run_input, outcome in (({"order": "7"}, "reuse"), ({"order": "7", "more": 1}, "bad_key")):
        bid, claim = bench.claim(bench.start(definition, run_input), "a")
        assert (claim.outcome, bench.store.claim(bid).outcome) == (outcome, outcome)


def test_nobody_is_asked_in_a_run_that_has_failed(bench):
    """An attempt that finds that a person must approve, after its run was halted, leaves no open question."""
    run = bench.start(pipeline(agent("a", retry_policy=ONE_TRY), agent("b", requires_human_approval=True)))
    asking, _ = bench.claim(run, "b")
    bench.fail(bench.claim(run, "a")[0])
    bench.store.suspend(asking.step, asking.attempt_id, "digest", {}, 1)
    assert bench.sql("select count(*) from stepfast.approvals") == 0
    assert violations(bench) == []


def test_gate_does_not_repeat_an_unknown_outcome(bench):
    """A review loop ends where what depends on the agent that would run again may have had its effect."""
    loop = agent("c", "a", gate="{{a.by}} == 'x'", on_refused=OnRefused("a"))
    run = bench.start(pipeline(agent("a"), agent("b", "a", handler="h.py:f", failure_mode="continue"), loop))
    bench.do(run, "a")
    bench.fail(bench.claim(run, "b", repeatable=False)[0], error=UNKNOWN)
    refused, _ = bench.claim(run, "c")
    ending = Ending("rerun", rerun="a", feedback={})
    bench.store.fail(refused.step, refused.attempt_id, ERROR, FREE, ending)
    assert bench.states(run) == {"a": "completed", "b": "discarded", "c": "discarded"}
    message = bench.sql("select payload->>'message' from stepfast.dead_letters where agent = 'c'")
    assert message.endswith("It was not sent back to a, because what b did may not be repeated.")
    assert violations(bench) == []


def test_dismissed_letter_does_not_settle_an_outcome(bench):
    """Whoever discards the dead letter of an unknown outcome has not said whether it happened: resume still asks."""
    run = bench.start(pipeline(agent("a", handler="h.py:f")))
    bench.fail(bench.claim(run, "a", repeatable=False)[0], error=UNKNOWN)
    bench.orders.discard_letter(bench.sql("select id from stepfast.dead_letters"), "me")
    with pytest.raises(NotPossible, match="Nobody knows"):
        bench.resume(run)
    bench.orders.resume_from(run, "a", "me")
    assert bench.claim(run, "a")[1].outcome == "claimed"
    assert violations(bench) == []


def test_override_waits_for_its_concurrency_key(bench):
    """A completed run that an override sets going again waits for another one of its key."""
    definition = pipeline(*line("a", "b").agents, concurrency_parts=({"path": ["input", "repo"]},))
    first, second = (bench.start(definition, {"repo": "r"}) for _ in range(2))
    bench.do(first, "a", "b")
    bench.do(second, "a")
    assert bench.orders.override(first, "a", {}, "me", None) == ("b",)
    assert (bench.run_state(first), bench.states(first)["b"]) == ("pending", "pending")
    bench.do(second, "b")
    assert bench.do(first, "b").run_state == "completed"
    assert violations(bench) == []


def test_resume_from_leaves_what_was_given_up_in_a_run_that_goes_on(bench):
    """What may already start without an agent that failed under `continue` does not have it come back underneath."""
    definition = pipeline(
        agent("a", failure_mode="continue", retry_policy=ONE_TRY), agent("b", "a"), agent("c"), agent("d")
    )
    run = bench.start(definition)
    bench.fail(bench.claim(run, "a")[0])
    bench.do(run, "c")
    assert bench.orders.resume_from(run, "c", "me") == ("c",)
    assert bench.states(run) == {"a": "discarded", "b": "available", "c": "available", "d": "available"}
    bench.do(run, "b")
    assert violations(bench) == []
