"""The paragraph of a run, state by state: what happened, why, and the command."""

import re

import pytest
from benches import CALM_MS, ERROR, Bench
from pipelines import agent, diamond, line, pipeline

from app.pipelines.model import FailureMode
from app.runs import explain as explaining
from app.runs.database import engine
from app.runs.orders import Orders
from app.runs.reads import Reads
from app.runs.store import Ending, Paid, Store


@pytest.fixture
def bench(database_url):
    store = Store(engine(database_url, pool_max=4))
    made = Bench(store)
    made.orders = Orders(store.engine)
    yield made
    store.engine.dispose()


def _explained(bench, run):
    """The text and the command, without what differs from run to run."""
    reads = Reads(bench.store.engine)
    found = explaining.explain(reads.run(run), reads.event_list(run))
    again = explaining.explain(reads.run(run), reads.event_list(run))
    assert found == again
    return _plain(found.text, run), _plain(found.command, run)


def _plain(text, run):
    text = re.sub(r"\d{4}-\d\d-\d\d [\d:]{8} UTC|[\d:]{8} UTC", "TIME", text.replace(str(run)[:8], "RUN"))
    return re.sub(r"\b[0-9a-f]{8}\b", "ID", text)


def _fail(bench, run, name, code="broken", **error):
    bid, claim = bench.claim(run, name)
    assert claim.outcome == "claimed"
    bench.fail(bid, error=ERROR | {"code": code} | error)


def _suspend(bench, run, name, expires_ms=None):
    bid, _ = bench.claim(run, name)
    bench.store.suspend(bid.step, bid.attempt_id, "d1", {}, expires_ms)


def test_completed(bench):
    """What it cost, and nothing to type."""
    run = bench.start(line("a", "b"))
    bid, _ = bench.claim(run, "a")
    bench.store.complete(bid.step, bid.attempt_id, {}, Paid("m", "r", {"input_tokens": 1}, 0.02))
    bench.do(run, "b")
    text, command = _explained(bench, run)
    assert text == ("Run RUN of tested 1 completed at TIME. Done: a, b, with 1 paid call, $0.0200.")
    assert command == ""


def test_what_happened_on_the_way_is_told(bench):
    """Retries, lost workers, overrides and resumes stand in the paragraph of a run that went well in the end."""
    run = bench.start(line("a", "b"))
    bid, _ = bench.claim(run, "a")
    bench.fail(bid, retry_ms=1)
    bench.pass_time(1)
    bench.sweep(lease_ms=CALM_MS)
    bench.do(run, "a")
    bench.orders.override(run, "a", {"by": "hand"}, "ann", "it was wrong")
    _fail(bench, run, "b")
    bench.resume(run, "bob")
    bench.do(run, "b")
    text, _ = _explained(bench, run)
    assert text.endswith(
        "On the way: a failed once (broken); b failed once (broken); the output of a was given by hand by ann "
        "(it was wrong); it was resumed once, last by bob."
    )


@pytest.mark.parametrize("code", sorted(explaining._MEANINGS))
def test_every_error_code_has_its_meaning_and_a_command(bench, code):
    """Each code says what it means, what is kept, and what to do."""
    run = bench.start(line("a", "b", "c"))
    bench.do(run, "a")
    _fail(bench, run, "b", code, message="It went wrong", next_step="Look at the moon.")
    text, command = _explained(bench, run)
    assert text.startswith(
        f"Run RUN of tested 1 failed at TIME. b was given up after 1 attempt ({code}): It went wrong. "
        f"{explaining._MEANINGS[code]} Look at the moon. Completed, kept and not paid for again: a. Not begun: c. "
    )
    expected = {
        "gate_refused": "stepfast resume RUN --from a",
        "snapshot_too_old": "stepfast resume RUN --from a",
        "author_mistake": "stepfast override RUN b --output FILE",
        "model_refused": "stepfast override RUN b --output FILE",
        "outcome_unknown": "stepfast dead show ID",
        "invalid_input": "stepfast run tested",
    }
    assert command == expected.get(code, "stepfast resume RUN")
    assert f"`{expected.get(code, 'stepfast resume RUN')}`" in text or code == "outcome_unknown"
    assert (code in explaining.NOT_BY_RESUME) == (code in expected)


def test_unknown_outcome_names_both_ways(bench):
    """It happened, or it did not: a person looks, and each has its command."""
    run = bench.start(line("a"))
    _fail(bench, run, "a", "outcome_unknown")
    text, _ = _explained(bench, run)
    assert "If it did, say what it gave: `stepfast override RUN a --output FILE`, then `stepfast resume RUN`." in text
    assert "If it did not: `stepfast resume RUN --from a`." in text


def test_refused_gate_names_what_it_read(bench):
    """Of several agents the last that the gate read may try again, or is overridden."""
    run = bench.start(diamond())
    bench.do(run, "a", "b", "c")
    details = {"values": {"a.n": 1, "c.confidence": 0.5}}
    _fail(bench, run, "d", "gate_refused", message="The gate does not hold: c.confidence = 0.5.", details=details)
    text, command = _explained(bench, run)
    assert command == "stepfast resume RUN --from c"
    assert "`stepfast override RUN c --output FILE`, then `stepfast resume RUN`." in text
    # A gate that read the input alone: nobody can try again.
    run = bench.start(pipeline(agent("a"), version="2"))
    _fail(bench, run, "a", "gate_refused", details={"values": {"input.n": 1}})
    assert _explained(bench, run)[1] == "stepfast override RUN a --output FILE"


def test_in_part(bench):
    """What was given up, what was skipped, and that a resume goes on."""
    run = bench.start(pipeline(agent("a", failure_mode=FailureMode.SKIP_DEPENDENTS), agent("b", "a"), agent("c")))
    bench.do(run, "c")
    _fail(bench, run, "a", "timed_out", message="Too slow.")
    text, command = _explained(bench, run)
    assert text == (
        "Run RUN of tested 1 completed in part at TIME. a was given up after 1 attempt (timed_out): Too slow. "
        "It did not end within its timeout_ms. Completed, kept and not paid for again: c. Skipped: b. "
        "When the cause is gone, `stepfast resume RUN` gives it a new budget of attempts."
    )
    assert command == "stepfast resume RUN"


def test_rejected_expired_and_cancelled(bench):
    """Who decided, why, and that a resume asks again."""
    run = bench.start(line("a", "b"))
    _suspend(bench, run, "a")
    bench.orders.decide(run, "a", approved=False, digest=None, by="ann", reason="too dear")
    text, command = _explained(bench, run)
    assert text == (
        "Run RUN of tested 1 failed at TIME. a was rejected by ann (too dear) at TIME. Not begun: b. "
        "`stepfast resume RUN` asks again."
    )
    assert command == "stepfast resume RUN"
    run = bench.start(line("a", "b"))
    _suspend(bench, run, "a", expires_ms=1)
    bench.pass_time(1)
    bench.sweep(lease_ms=CALM_MS)
    assert "Nobody approved a before its request expired at TIME." in _explained(bench, run)[0]
    run = bench.start(line("a", "b"))
    bench.do(run, "a")
    bench.orders.cancel(run, "bob", "wrong customer")
    text, command = _explained(bench, run)
    assert text == (
        "Run RUN of tested 1 was cancelled by bob (wrong customer) at TIME. Completed, kept and not paid for again: a. "
        "To go on from there: `stepfast resume RUN`."
    )
    assert command == "stepfast resume RUN"


def test_running_says_what_is_waited_for(bench):
    """A worker, an attempt, a retry, a handler, another run's key: each by name."""
    follow = "stepfast show RUN --follow"
    run = bench.start(line("a"))
    text, command = _explained(bench, run)
    assert text == (
        "Run RUN of tested 1 has not begun. No worker has taken a yet, from the queue agents: is one running that serves "
        "it, on the same database and broker?"
    )
    assert command == "stepfast doctor"
    bench.store.defer(bench.bid(run, "a").step, 5_000, "this worker has no handler handlers:a")
    text, command = _explained(bench, run)
    assert "a waits until TIME: this worker has no handler handlers:a. A worker is needed whose STEPFAST_SKILLS" in text
    assert command == "stepfast doctor"
    bench.pass_time(6)
    bench.sweep(lease_ms=CALM_MS)
    bid, _ = bench.claim(run, "a")
    worker = bench.worker_id
    text, command = _explained(bench, run)
    assert text == (f"Run RUN of tested 1 is running. a is executing since TIME (attempt 1, on worker {worker}).")
    assert command == follow
    bench.fail(bid, retry_ms=60_000, error=ERROR | {"code": "unavailable", "message": "Overloaded."})
    text, command = _explained(bench, run)
    assert text == ("Run RUN of tested 1 is running. a failed (unavailable) and waits until TIME: Overloaded.")
    assert command == follow


def test_key_that_another_run_holds(bench):
    """The run that holds it is named; where its outcome is unknown, that is what must be settled."""
    definition = pipeline(agent("a", key_parts=({"text": "one"},)))
    first, second = bench.start(definition), bench.start(definition)
    bid, _ = bench.claim(first, "a")
    assert bench.claim(second, "a")[1].outcome == "deferred"
    text, _ = _explained(bench, second)
    assert f"a waits for run {str(first)[:8]}, which holds its key; it looks at TIME." in text.replace(
        "ID", str(first)[:8]
    )
    bench.fail(bid, error=ERROR | {"code": "outcome_unknown"})
    bench.pass_time(6)
    bench.sweep(lease_ms=CALM_MS)
    bench.claim(second, "a")
    text, command = _explained(bench, second)
    assert "whose outcome is unknown." in text
    assert command == "stepfast explain ID"


def test_suspended_and_blocked(bench):
    """For whom a run waits: a person, or the run before it of its concurrency key."""
    run = bench.start(line("a"))
    _suspend(bench, run, "a", expires_ms=60_000)
    text, command = _explained(bench, run)
    assert text == (
        "Run RUN of tested 1 is suspended: nothing of it can go on before a person decides. a waits for a person since "
        "TIME: it begins once it is approved. The request expires at TIME."
    )
    assert command == "stepfast approve RUN a"
    keyed = pipeline(
        agent("a"), version="2", concurrency_key="{{input.repo}}", concurrency_parts=({"path": ["input", "repo"]},)
    )
    bench.start(keyed, {"repo": "r"})
    waiting = bench.start(keyed, {"repo": "r"})
    text, command = _explained(bench, waiting)
    assert text == ("Run RUN of tested 2 has not begun. It waits for run ID, which has the same concurrency key.")
    assert command == "stepfast show ID --follow"


def _confirm_late(bench, mode):
    """A run of `slow` and `after`: slow's worker is taken for dead, and reports after all."""
    run = bench.start(pipeline(agent("slow", handler="h.py:f", failure_mode=mode), agent("after", "slow")))
    late, _ = bench.claim(run, "slow", repeatable=False)
    bench.sql("update stepfast.workers set ended_at = stepfast.now()")
    bench.sweep()
    bench.worker_id = bench.sql(
        "insert into stepfast.workers (host, pid, code_version, started_at, lease_until)"
        " values ('h', 2, 1, stepfast.now(), stepfast.now() + interval '9 hours') returning id"
    )
    after = bench.claim(run, "after")[0]
    bench.pass_time(1)
    bench.complete(late)
    bench.complete(after)
    return run


def test_late_confirmation_is_told(bench):
    """Why the run failed, and that it was settled since."""
    text, command = _explained(bench, _confirm_late(bench, FailureMode.HALT_PIPELINE))
    assert text == (
        "Run RUN of tested 1 failed at TIME. The outcome of slow was unknown, until its worker reported after all at TIME. "
        "Nothing stands against going on. Completed, kept and not paid for again: slow. Not begun: after. To go on from "
        "there: `stepfast resume RUN`."
    )
    assert command == "stepfast resume RUN"


def test_gap_that_a_late_confirmation_left_is_told(bench):
    """Under `continue`: what ran without the output, and how to do that again."""
    text, command = _explained(bench, _confirm_late(bench, FailureMode.CONTINUE))
    assert text == (
        "Run RUN of tested 1 completed in part at TIME. The outcome of slow was unknown, until its worker reported after "
        "all at TIME. after ran without what slow put out later. Completed, kept and not paid for again: slow, after. To do "
        "that again, on the output: `stepfast resume RUN --from after`."
    )
    assert command == "stepfast resume RUN --from after"


def test_review_rounds_are_told(bench):
    """How often the gate sent the coder back, and the command that has the loop begin anew."""
    run = bench.start(pipeline(agent("coder"), agent("reviewer", "coder"), agent("deployer", "reviewer")))
    values = {
        "code": "gate_refused",
        "message": "The gate does not hold.",
        "details": {"values": {"reviewer.ok": False}},
    }
    for rerun in ("coder", "coder", None):
        bench.do(run, "coder", "reviewer")
        bid, _ = bench.claim(run, "deployer")
        ending = Ending("rerun", rerun=rerun, feedback={}) if rerun else Ending("discard")
        bench.store.fail(bid.step, bid.attempt_id, ERROR | values, Paid(), ending)
    text, command = _explained(bench, run)
    assert "deployer was given up after 2 rounds of its review loop (gate_refused): The gate does not hold." in text
    assert text.endswith("On the way: the gate of deployer sent coder back 2 times.")
    # Not the loop's first agent, on which reviewer would only say the same again.
    assert "To decide what the gate reads: `stepfast override RUN reviewer --output FILE`" in text
    assert command == "stepfast resume RUN --from coder"


def test_approval_that_was_voided_is_told(bench):
    """That somebody had approved, who and why, and what has changed since."""
    run = bench.start(line("a"))
    _suspend(bench, run, "a")
    bench.orders.decide(run, "a", approved=True, digest=None, by="ann", reason="why not")
    bid, _ = bench.claim(run, "a")
    bench.store.suspend(bid.step, bid.attempt_id, "d2", {}, None)
    assert _explained(bench, run)[0].endswith(
        "it begins once it is approved. An approval by ann (why not) at TIME holds no more: what was approved changed."
    )


def test_discarded_letter_and_override_are_told(bench):
    """Who discarded the dead letter; and an override that sets a completed run going is no resume."""
    run = bench.start(line("a", "b"))
    bench.do(run, "a", "b")
    bench.orders.override(run, "a", {}, "ann", None)
    bench.fail(bench.claim(run, "b")[0])
    bench.orders.discard_letter(bench.sql("select id from stepfast.dead_letters"), "bob")
    text, _ = _explained(bench, run)
    assert text.endswith(
        "On the way: the dead letter of b was discarded by bob; the output of a was given by hand by ann."
    )


def test_long_histories_stay_a_paragraph(bench):
    """Many agents and long messages are cut, and counted."""
    names = [f"a{number}" for number in range(20)]
    run = bench.start(pipeline(*(agent(name, failure_mode=FailureMode.SKIP_DEPENDENTS) for name in names)))
    for name in names:
        bid, _ = bench.claim(run, name)
        bench.store.fail(bid.step, bid.attempt_id, ERROR | {"message": "x " * 5_000}, Paid(), Ending("discard"))
    text, _ = _explained(bench, run)
    assert "15 more were given up." in text
    assert len(text) < 8_000
