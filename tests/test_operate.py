"""What a person does to a run: approve, reject, override, resume from an agent, cancel; and what a run waits for."""

import time
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import pytest
from benches import CALM_MS, ERROR, FREE, Bench
from pipelines import agent, diamond, line, pipeline
from sqlalchemy import text

from app.errors import NotPossible
from app.runs.database import engine
from app.runs.invariants import check
from app.runs.orders import Orders
from app.runs.store import Ending, Store

DAY_MS = 86_400_000


@pytest.fixture
def bench(database_url):
    store = Store(engine(database_url, pool_max=16))
    made = Bench(store)
    made.orders = Orders(store.engine)
    yield made
    store.engine.dispose()


def violations(bench):
    with bench.store.engine.connect() as connection:
        return check(connection)


def _suspend(bench, run, name, digest="d1", expires_ms=None):
    bid, claim = bench.claim(run, name)
    assert claim.outcome == "claimed"
    return bench.store.suspend(bid.step, bid.attempt_id, digest, {}, expires_ms), claim


def _decide(bench, run, name, *, approved, digest=None):
    return bench.orders.decide(run, name, approved=approved, digest=digest, by="ann", reason="because")


def test_approval_is_asked_given_and_used(bench):
    """The run waits for a person; the approved digest comes with the next claim; the attempt that asked is no failure."""
    run = bench.start(line("a", "b"))
    ended, _ = _suspend(bench, run, "a")
    assert (ended.outcome, ended.run_state) == ("suspended", "suspended")
    assert _decide(bench, run, "a", approved=True) == "approved"
    assert (bench.states(run)["a"], bench.run_state(run)) == ("available", "running")
    bid, claim = bench.claim(run, "a")
    assert (claim.approved, claim.failures, claim.number) == ("d1", 0, 2)
    # A retry keeps it: it was approved, not used up by the failure.
    bench.fail(bid, retry_ms=1)
    bench.pass_time(1)
    bench.sweep(lease_ms=CALM_MS)
    assert bench.claim(run, "a")[1].approved == "d1"


def test_change_after_the_approval_asks_again(bench):
    """What was approved is a digest: another one voids it, and a decision on the old one is refused."""
    run = bench.start(line("a"))
    _suspend(bench, run, "a", "d1")
    _decide(bench, run, "a", approved=True)
    _suspend(bench, run, "a", "d2")
    with pytest.raises(NotPossible):
        _decide(bench, run, "a", approved=True, digest="d1")
    assert _decide(bench, run, "a", approved=True, digest="d2") == "approved"
    # Who had approved, and why, stays on record beside why that holds no more.
    assert bench.sql(
        "select array[state, decided_by, reason, void_reason] from stepfast.approvals where digest = 'd1'"
    ) == ["void", "ann", "because", "what was approved changed"]


def test_first_decision_counts(bench):
    """Absurd emit_event_is_first_write_wins: of sixteen decisions at once one stands, the others are told which."""
    run = bench.start(line("a"))
    _suspend(bench, run, "a")

    def decide(number):
        try:
            return _decide(bench, run, "a", approved=number % 2 == 0)
        except NotPossible as error:
            return str(error)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(decide, range(16)))
    decided = [answer for answer in answers if answer in {"approved", "rejected"}]
    assert len(decided) == 1
    assert all(f"It was {decided[0]} by ann" in answer for answer in answers if answer not in decided)


def test_rejection_cancels_and_is_no_dead_letter(bench):
    """aws-durable-execution 4-8 callback against timeout: it follows the failure mode; here the run fails, and resume asks again."""
    run = bench.start(line("a", "b"))
    _suspend(bench, run, "a")
    assert _decide(bench, run, "a", approved=False) == "rejected"
    assert (bench.states(run), bench.run_state(run)) == ({"a": "cancelled", "b": "pending"}, "failed")
    assert bench.sql("select count(*) from stepfast.dead_letters") == 0
    assert bench.orders.resume(run, "me") == ("a",)
    assert bench.claim(run, "a")[1].approved is None


def test_approval_that_nobody_gives_expires(bench):
    """aws-durable-execution 7-5 approval timeout, 4-11 callback after it: then it is as a rejection, also where somebody approves too late."""
    first, second = bench.start(line("a")), bench.start(line("a"))
    for run in (first, second):
        _suspend(bench, run, "a", expires_ms=60_000)
    bench.pass_time(61)
    assert _decide(bench, second, "a", approved=True) == "expired"
    assert bench.sweep(lease_ms=CALM_MS).expired == 1
    assert [bench.run_state(run) for run in (first, second)] == ["failed", "failed"]


def test_one_suspended_branch_lets_the_other_go_on(bench):
    """aws-durable-execution 8-14 one branch suspended: the run is suspended only when nothing else can be done."""
    run = bench.start(diamond())
    bench.do(run, "a")
    _suspend(bench, run, "b")
    assert bench.run_state(run) == "running"
    bench.do(run, "c")
    assert bench.run_state(run) == "suspended"
    _decide(bench, run, "b", approved=True)
    assert bench.do(run, "b", "d").run_state == "completed"


def test_resume_from_an_agent_does_it_and_what_depends_on_it_again(bench):
    """A new generation: what does not depend on it stays, and old attempts stay."""
    run = bench.start(diamond())
    bench.do(run, "a", "b", "c", "d")
    assert sorted(bench.orders.resume_from(run, "b", "me")) == ["b", "d"]
    assert bench.states(run) == {"a": "completed", "b": "available", "c": "completed", "d": "pending"}
    _, claim = bench.claim(run, "b")
    assert (claim.generation, claim.number) == (2, 2)
    assert bench.sql("select count(*) from stepfast.attempts where run_id = :r", r=run) == 5


def test_resume_from_fences_what_executes(bench):
    """A descendant that executes on the old output cannot commit any more."""
    run = bench.start(line("a", "b"))
    bench.do(run, "a")
    old, _ = bench.claim(run, "b")
    bench.orders.resume_from(run, "a", "me")
    assert bench.complete(old).outcome == "stale"
    assert bench.do(run, "a", "b").run_state == "completed"


def test_resume_from_settles_an_unknown_outcome(bench):
    """A person looked: it did not happen. A new generation has a key of its own."""
    run = bench.start(pipeline(agent("a", handler="handlers:a")))
    _die(bench, run, "a")
    bench.orders.resume_from(run, "a", "me")
    _, claim = bench.claim(run, "a", repeatable=False)
    assert (claim.outcome, claim.generation) == ("claimed", 2)
    assert bench.sql("select count(*) from stepfast.dead_letters where resolved_at is null") == 0


def _die(bench, run, name):
    """The worker dies under an unrepeatable handler."""
    bid, _ = bench.claim(run, name, repeatable=False)
    bench.sql("update stepfast.workers set ended_at = stepfast.now() where ended_at is null")
    assert [entry["code"] for entry in bench.sweep().rescued] == ["outcome_unknown"]
    bench.worker_id = bench.sql(
        "insert into stepfast.workers (host, pid, code_version, started_at, lease_until)"
        " values ('h', 2, 1, stepfast.now(), stepfast.now() + interval '9 hours') returning id"
    )
    return bid


def test_override_settles_an_unknown_outcome(bench):
    """A person looked: it happened, and this is what it gave. The key is completed, also for other runs."""
    key = ({"path": ["input", "order"]},)
    definition = pipeline(agent("a", handler="handlers:a", key_parts=key), agent("b", "a"))
    run = bench.start(definition, {"order": "7"})
    _die(bench, run, "a")
    bench.orders.override(run, "a", {"charged": True}, "ann", "saw it")
    assert (bench.run_state(run), bench.states(run)["a"]) == ("failed", "completed")
    bench.orders.resume(run, "ann")
    _, claim = bench.claim(run, "b")
    assert claim.outputs == {"a": {"charged": True}}
    other = bench.start(definition, {"order": "7"})
    assert bench.claim(other, "a", repeatable=False)[1].output == {"charged": True}


def test_late_confirmation_settles_an_unknown_outcome(bench):
    """The one write without a claim: the fenced attempt reports after all. The run waits for resume."""
    run = bench.start(pipeline(agent("a", handler="handlers:a"), agent("b", "a")))
    bid = _die(bench, run, "a")
    assert bench.complete(bid, {"late": True}).outcome == "completed"
    assert (bench.states(run), bench.run_state(run)) == ({"a": "completed", "b": "pending"}, "failed")
    assert bench.sql("select resolution from stepfast.dead_letters") == "settled"
    assert bench.sql("select state from stepfast.keys") == "completed"
    assert bench.orders.resume(run, "me") == ()
    assert bench.claim(run, "b")[1].outputs == {"a": {"late": True}}


def test_late_confirmation_after_a_decision_is_refused(bench):
    """Once a person said that it did not happen, the old attempt is stale."""
    run = bench.start(pipeline(agent("a", handler="handlers:a")))
    bid = _die(bench, run, "a")
    bench.orders.resume_from(run, "a", "me")
    assert bench.complete(bid, {"late": True}).outcome == "stale"


def test_override_does_again_what_was_done_on_the_old_output(bench):
    """Of a completed run too: it goes on, and the person's output is an attempt of its own."""
    run = bench.start(line("a", "b", "c"))
    bench.do(run, "a", "b", "c")
    assert bench.orders.override(run, "a", {"better": 1}, "ann", None) == ("b", "c")
    assert bench.run_state(run) == "running"
    _, claim = bench.claim(run, "b")
    assert (claim.outputs, claim.generation) == ({"a": {"better": 1}}, 2)
    assert bench.sql("select decided_by from stepfast.attempts where output = '{\"better\": 1}'") == "ann"


def test_effect_that_was_begun_is_looked_for_in_the_next_generation(bench):
    """An override of its input fences an attempt in the midst of ctx.once: the next one asks the check.

    What nobody can tell is settled by `resume --from`. What is recorded as happened is done again, as ordered.
    """
    run = bench.start(line("a", "b"))
    bench.do(run, "a")
    late, _ = bench.claim(run, "b")
    begin = lambda bid, key: bench.store.begin_effect(bid.step, bid.attempt_id, key)["state"]  # noqa: E731
    assert [begin(late, key) for key in ("told", "paid")] == ["new", "new"]
    bench.store.end_effect(late.step, late.attempt_id, "told", {})
    bench.orders.override(run, "a", {"better": 1}, "ann", None)
    assert begin(late, "other") == "stale"
    bid, claim = bench.claim(run, "b")
    assert (claim.generation, begin(bid, "told"), begin(bid, "paid")) == (2, "new", "unknown")
    bench.fail(bid, error={**ERROR, "code": "outcome_unknown"})
    assert bench.orders.resume_from(run, "b", "ann") == ("b",)
    bid, claim = bench.claim(run, "b")
    assert (claim.generation, begin(bid, "paid")) == (3, "new")
    bench.store.end_effect(bid.step, bid.attempt_id, "paid", {})
    bench.complete(bid)
    assert violations(bench) == []


def test_override_is_refused_while_it_executes(bench):
    """First cancel it, or let it end."""
    run = bench.start(line("a"))
    bench.claim(run, "a")
    with pytest.raises(NotPossible, match="executing"):
        bench.orders.override(run, "a", {}, "ann", None)


def test_cancel_ends_a_run_and_fences_what_executes(bench):
    """Absurd cancel_and_complete_run: nothing of a cancelled run is committed afterwards; resume goes on from there."""
    run = bench.start(line("a", "b", "c"))
    bench.do(run, "a")
    bid, _ = bench.claim(run, "b")
    bench.orders.cancel(run, "me", "enough")
    assert (bench.states(run), bench.run_state(run)) == (
        {"a": "completed", "b": "cancelled", "c": "cancelled"},
        "cancelled",
    )
    assert bench.complete(bid).outcome == "stale"
    with pytest.raises(NotPossible, match="cancelled"):
        bench.orders.cancel(run, "me", None)
    bench.orders.resume(run, "me")
    assert bench.do(run, "b", "c").run_state == "completed"


def test_cancel_leaves_an_interrupted_effect_unknown(bench):
    """Rule 7, under an operator's hand: resume does not repeat it by itself."""
    run = bench.start(pipeline(agent("a", handler="handlers:a")))
    bench.claim(run, "a", repeatable=False)
    bench.orders.cancel(run, "me", None)
    assert bench.states(run) == {"a": "discarded"}
    with pytest.raises(NotPossible, match="override"):
        bench.orders.resume(run, "me")


def test_refused_gate_opens_a_new_round(bench):
    """The agent that is named, and what depends on it, are done again; the claim brings what the gate read."""
    run = bench.start(line("a", "b", "c"))
    bench.do(run, "a", "b")
    bid, _ = bench.claim(run, "c")
    ending = Ending("rerun", rerun="a", feedback={"read": {"b": 1}})
    ended = bench.store.fail(bid.step, bid.attempt_id, ERROR | {"code": "gate_refused"}, FREE, ending)
    assert [step.agent for step in ended.ready] == ["a"]
    assert bench.states(run) == {"a": "available", "b": "pending", "c": "pending"}
    _, claim = bench.claim(run, "a")
    assert (claim.feedback, claim.generation) == ({"read": {"b": 1}}, 2)
    assert bench.sql("select rounds from stepfast.steps where agent = 'c'") == 1
    bench.orders.resume_from(run, "a", "me")
    assert bench.sql("select bool_and(rounds = 0 and feedback is null) from stepfast.steps")


def test_one_run_at_a_time_for_a_concurrency_key(bench):
    """In order, without holding a worker; another key is not in the way; a failed run frees it."""
    definition = pipeline(
        agent("a"), concurrency_parts=({"path": ["input", "repo"]},), concurrency_key="{{input.repo}}"
    )
    first, second, third = (bench.start(definition, {"repo": "x"}) for _ in range(3))
    other = bench.start(definition, {"repo": "y"})
    assert [bench.states(run)["a"] for run in (first, second, third, other)] == [
        "available",
        "pending",
        "pending",
        "available",
    ]
    bid, _ = bench.claim(first, "a")
    bench.fail(bid)
    assert [bench.states(run)["a"] for run in (second, third)] == ["available", "pending"]
    # Resumed, it waits for its turn, which comes before that of what was created after it.
    assert bench.orders.resume(first, "me") == ("a",)
    assert (bench.run_state(first), bench.states(first)["a"]) == ("pending", "pending")
    bench.do(second, "a")
    assert [bench.states(run)["a"] for run in (first, third)] == ["available", "pending"]
    assert bench.do(first, "a").run_state == "completed"
    assert bench.do(third, "a").run_state == "completed"


def test_many_starts_with_one_concurrency_key_run_in_order(bench):
    """Sixteen at once: never two under way, and every one has its turn."""
    definition = pipeline(agent("a"), concurrency_parts=({"text": "one"},), concurrency_key="one")
    bench.start(definition)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: bench.store.enqueue("tested", {}), range(16)))
    for _ in range(17):
        (unsent,) = bench.store.take_unsent(None, 100)
        bench.do(unsent.step.run_id, "a")
    assert bench.sql("select count(*) from stepfast.runs where state = 'completed'") == 17


@pytest.mark.parametrize("end", ["deadline", "halt_pipeline"])
def test_next_run_of_a_concurrency_key_waits_for_what_executes(bench, end):
    """A run that has failed holds its key until the last step of it that still executed has ended."""
    definition = pipeline(
        agent("a"), agent("b"), concurrency_parts=({"text": "one"},), concurrency_key="one", deadline_ms=DAY_MS
    )
    first, second = bench.start(definition), bench.start(definition)
    executing, _ = bench.claim(first, "a")
    if end == "deadline":
        bench.pass_time(DAY_MS / 1000 + 1)
        bench.sql("update stepfast.runs set deadline_at = null where id = :r", r=second)
        bench.sweep(lease_ms=CALM_MS)
    else:
        bench.fail(bench.claim(first, "b")[0])
    third = bench.start(definition)
    assert bench.run_state(first) == "failed"
    assert [set(bench.states(run).values()) for run in (second, third)] == [{"pending"}, {"pending"}]
    bench.complete(executing)
    assert [set(bench.states(run).values()) for run in (second, third)] == [{"available"}, {"pending"}]
    assert violations(bench) == []


def test_cancelled_run_frees_its_concurrency_key_at_once(bench):
    """Whoever cancels ends what executes by force, and does not wait for a process that may be stuck."""
    definition = pipeline(agent("a"), concurrency_parts=({"text": "one"},), concurrency_key="one")
    first, second = bench.start(definition), bench.start(definition)
    bench.claim(first, "a")
    bench.orders.cancel(first, "me", None)
    assert bench.states(second) == {"a": "available"}


def test_resumed_run_that_has_nothing_to_do_does_not_wait_for_its_key(bench):
    """A late confirmation left nothing open: the run completes, whoever else of its key is under way."""
    definition = pipeline(agent("a", handler="handlers:a"), concurrency_parts=({"text": "one"},), concurrency_key="one")
    first, second = bench.start(definition), bench.start(definition)
    late = _die(bench, first, "a")
    assert bench.states(second) == {"a": "available"}
    bench.complete(late)
    bench.orders.resume(first, "me")
    assert bench.run_state(first) == "completed"
    assert violations(bench) == []


def test_deadline_of_a_run_fails_it(bench):
    """What waits is given up with a dead letter; what executes may finish; resume goes on without the deadline."""
    definition = pipeline(agent("a"), agent("b", "a"), deadline_ms=DAY_MS)
    run = bench.start(definition)
    bench.do(run, "a")
    bench.pass_time(DAY_MS / 1000 + 1)
    bench.sweep(lease_ms=CALM_MS)
    assert (bench.run_state(run), bench.states(run)["b"]) == ("failed", "discarded")
    assert bench.sql("select code from stepfast.dead_letters") == "run_deadline"
    bench.orders.resume(run, "me")
    assert bench.do(run, "b").run_state == "completed"


def test_discarded_letter_is_resolved_and_its_step_stays(bench):
    """`dead discard`: nobody needs to look at it again."""
    run = bench.start(line("a"))
    bid, _ = bench.claim(run, "a")
    bench.fail(bid)
    letter = bench.sql("select id from stepfast.dead_letters")
    assert bench.orders.discard_letter(letter, "me") is True
    assert bench.orders.discard_letter(letter, "me") is False
    assert bench.orders.discard_letter(uuid4(), "me") is False
    assert bench.states(run) == {"a": "discarded"}
    told = bench.sql("select data from stepfast.events where name = 'step.dismissed'")
    assert told == {"dead_letter": str(letter), "by": "me"}
    assert violations(bench) == []


def test_transaction_that_holds_a_concurrency_key_is_in_nobodys_way(bench):
    """An application enqueues and does not commit: what is due, dead or ordered elsewhere goes on, without waiting for it."""
    keyed = pipeline(
        agent("a"), concurrency_parts=({"path": ["input", "r"]},), concurrency_key="{{input.r}}", deadline_ms=DAY_MS
    )
    late, late_too, lost, ordered, ordered_too = (bench.start(keyed, {"r": name}) for name in "abcde")
    bench.claim(lost, "a")
    for run in (ordered, ordered_too):
        bench.sql("select stepfast.request_v1('cancel', :r, 'ann')", r=run)
    for run in (lost, ordered, ordered_too):
        bench.sql("update stepfast.runs set deadline_at = null where id = :r", r=run)
    bench.pass_time(DAY_MS / 1000 + 1)
    bench.sql("update stepfast.workers set ended_at = stepfast.now()")
    with bench.store.engine.connect().execution_options(isolation_level="READ COMMITTED") as host, host.begin():
        for name in "acd":
            start = text("select stepfast.enqueue_v1('tested', jsonb_build_object('r', cast(:n as text)))")
            host.execute(start, {"n": name})
        began, passed = time.monotonic(), []
        bench.sweep()
        assert bench.orders.carry_out(None, passed).run_id == ordered_too
        assert bench.orders.carry_out(None, passed) is None
        assert time.monotonic() - began < 2
        assert [bench.run_state(run) for run in (late, late_too)] == ["pending", "failed"]
        assert [bench.run_state(run) for run in (ordered, ordered_too)] == ["pending", "cancelled"]
        assert bench.states(lost) == {"a": "executing"}
    bench.sweep()
    assert bench.orders.carry_out(None, []).run_id == ordered
    assert bench.run_state(late) == "failed"
    assert bench.states(lost) == {"a": "available"}
    assert violations(bench) == []
