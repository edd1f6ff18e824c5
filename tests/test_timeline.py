"""A run as stretches of time: the pure module over what real histories recorded, and how it is drawn."""

import json
import os
from datetime import datetime, timedelta
from itertools import pairwise

import pytest
from benches import CALM_MS, ERROR, Bench
from histories import play
from hypothesis.stateful import invariant
from pipelines import agent, line, pipeline
from test_histories import History

from app.cli import timeline as drawing
from app.cli.timeline import ASCII, UNICODE, Scale, Waterfall
from app.pipelines.model import FailureMode, OnRefused, RetryPolicy
from app.runs.database import engine
from app.runs.orders import Orders
from app.runs.reads import Reads
from app.runs.store import Ending, Paid, Store
from app.runs.timeline import WAITS, timeline

PAID = Paid("claude-sonnet-5-5", "req", {"input_tokens": 1_200, "output_tokens": 340}, 0.01)
HISTORIES_SHORT = 12


@pytest.fixture
def bench(database_url):
    store = Store(engine(database_url, pool_max=4))
    made = Bench(store)
    made.orders = Orders(store.engine)
    yield made
    store.engine.dispose()


def drawn(bench, run, definition=None):
    """The timeline as the database's clock has it."""
    reads = Reads(bench.store.engine)
    found = reads.run(run)
    made = timeline(
        found,
        reads.event_list(run),
        definition or bench.definition,
        workers=reads.worker_places(found),
        now=bench.sql("select stepfast.now()"),
    )
    json.dumps(made)  # plain JSON
    return made


def segments(made, name, kind=None):
    (found,) = [step["segments"] for step in made["steps"] if step["agent"] == name]
    return [entry for entry in found if kind in {None, entry["kind"]}]


def story(made, name):
    """What an agent did, in words: waits with their whole seconds, attempts by state, marks by name."""
    words = {
        "wait": lambda entry: f"{entry['for']} {entry['seconds']:.0f}{'' if entry['ended_at'] else '...'}",
        "attempt": lambda entry: f"{entry['number']} {entry['state']} {entry['seconds']:.0f}",
        "mark": lambda entry: entry["name"],
    }
    return [
        words[entry["kind"]](entry)
        for entry in segments(made, name)
        if entry["seconds"] >= 0.5 or entry["kind"] != "wait"
    ]


def lose_worker(bench):
    """The bench's worker dies, its steps are rescued, and another takes its place."""
    bench.sql("update stepfast.workers set ended_at = stepfast.now()")
    bench.sweep()
    bench.worker_id = bench.sql(
        "insert into stepfast.workers (host, pid, code_version, started_at, lease_until)"
        " values ('other', 2, 1, stepfast.now(), stepfast.now() + interval '900 hours') returning id"
    )


def test_dependencies_a_retry_and_a_worker_are_waited_for(bench):
    """A failed attempt is followed by the wait for its time, and that by one for a worker, however late it comes."""
    run = bench.start(line("a", "b"))
    bench.pass_time(2)
    bid, _ = bench.claim(run, "a")
    bench.pass_time(3)
    bench.fail(bid, retry_ms=4_000)
    assert story(drawn(bench, run), "a") == ["queue 2", "1 failed 3"]
    bench.pass_time(6)
    assert story(drawn(bench, run), "a") == ["queue 2", "1 failed 3", "retry 4", "queue 2..."]
    bench.sweep(lease_ms=CALM_MS)
    bench.do(run, "a")
    bench.pass_time(1)
    made = drawn(bench, run)
    assert story(made, "a") == ["queue 2", "1 failed 3", "retry 4", "queue 2", "2 completed 0"]
    assert story(made, "b") == ["dependencies 11", "queue 1..."]
    (retry,) = [entry for entry in segments(made, "a", "wait") if entry["for"] == "retry"]
    assert retry["detail"] == {"code": "broken"}
    assert made["repeated"] == [{"agent": "a", "generation": 1, "executions": 2, "commits": 1, "because": ["broken"]}]


def test_a_lost_worker_is_named_with_who_rescued_its_step(bench):
    """Which worker died, which one went on, how long that took, and that nobody knows whether the call was paid for."""
    run = bench.start(line("a"))
    dead = bench.worker_id
    bench.claim(run, "a")
    bench.pass_time(5)
    lose_worker(bench)
    bench.pass_time(2)
    bid, _ = bench.claim(run, "a")
    bench.store.complete(bid.step, bid.attempt_id, {}, PAID)
    made = drawn(bench, run)
    assert story(made, "a") == ["1 lost 5", "rescue 2", "2 completed 0"]
    lost, second = segments(made, "a", "attempt")
    assert (lost["where"], lost["code"], lost["maybe_paid"]) == ("h:1", "worker_lost", True)
    assert (second["after"], second["where"], second["maybe_paid"]) == (dead, "other:2", False)
    assert made["totals"] == {
        "calls": 1,
        "cost_usd": 0.01,
        "input_tokens": 1_200,
        "output_tokens": 340,
        "wasted": {"calls": 0, "cost_usd": 0.0, "unknown_calls": 1},
    }


@pytest.mark.parametrize("ending", ["complete", "fail"])
def test_a_commit_that_the_fence_refused_is_recorded_once_with_its_cost(bench, ending):
    """The late answer of a worker that was taken for dead was paid for: the run says so, and the sums have it."""
    run = bench.start(line("a"))
    late, _ = bench.claim(run, "a")
    lose_worker(bench)
    bid, _ = bench.claim(run, "a")
    for _ in range(2):  # its reply may be lost
        if ending == "complete":
            said = bench.store.complete(late.step, late.attempt_id, {}, PAID)
        else:
            said = bench.store.fail(late.step, late.attempt_id, ERROR, PAID, Ending("discard"))
        assert said.outcome == "stale"
    bench.store.complete(bid.step, bid.attempt_id, {}, PAID)
    made = drawn(bench, run)
    assert [entry["name"] for entry in segments(made, "a", "mark")] == ["fenced"]
    lost, _ = segments(made, "a", "attempt")
    assert (lost["cost_usd"], lost["input_tokens"], lost["maybe_paid"]) == (0.01, 1_200, False)
    assert (made["totals"]["calls"], made["totals"]["cost_usd"]) == (2, 0.02)
    assert made["totals"]["wasted"] == {"calls": 1, "cost_usd": 0.01, "unknown_calls": 0}


def test_a_fenced_commit_of_a_step_that_was_given_up_is_recorded_too(bench):
    """Also where the step ended as a dead letter under that very attempt."""
    run = bench.start(pipeline(agent("a", retry_policy=RetryPolicy(max_worker_losses=0))))
    late, _ = bench.claim(run, "a")
    lose_worker(bench)
    assert bench.states(run) == {"a": "discarded"}
    assert bench.store.complete(late.step, late.attempt_id, {}, PAID).outcome == "stale"
    assert [entry["name"] for entry in segments(drawn(bench, run), "a", "mark")] == ["discarded", "fenced"]


def test_a_person_is_waited_for(bench):
    """Until the approval, which has a name and a reason; what was asked is an attempt that executed nothing."""
    run = bench.start(line("a"))
    bid, _ = bench.claim(run, "a")
    bench.store.suspend(bid.step, bid.attempt_id, "d1", {}, None)
    bench.pass_time(60)
    assert story(drawn(bench, run), "a") == ["1 suspended 0", "person 60..."]
    bench.orders.decide(run, "a", approved=True, digest=None, by="ann", reason="fine")
    bench.pass_time(1)
    bench.do(run, "a")
    made = drawn(bench, run)
    assert story(made, "a") == ["1 suspended 0", "person 60", "approved", "queue 1", "2 completed 0"]
    (mark,) = segments(made, "a", "mark")
    assert (mark["by"], mark["text"], mark["detail"]) == ("ann", "fine", {"digest": "d1"})
    assert made["repeated"] == []


def test_in_a_failed_run_nothing_waits_until_it_is_resumed(bench):
    """The night between the failure and the resume is the run's, and no agent's."""
    run = bench.start(line("a", "b"))
    bid, _ = bench.claim(run, "a")
    bench.fail(bid)
    bench.pass_time(8 * 3600)
    assert story(drawn(bench, run), "b") == []
    bench.resume(run, "ann")
    bench.pass_time(3)
    made = drawn(bench, run)
    assert story(made, "a") == ["1 failed 0", "discarded", "queue 3..."]
    assert story(made, "b") == ["dependencies 3..."]
    assert [(mark["name"], mark["by"]) for mark in made["marks"]] == [
        ("enqueued", None),
        ("failed", None),
        ("resumed", "ann"),
    ]


def test_a_review_loop_waits_for_what_runs_again(bench):
    """What is reopened waits for its dependencies, in whatever order their events stand; the gate's values are there."""
    run = bench.start(
        pipeline(agent("z"), agent("y", "z"), agent("x", "y", gate="{{y.ok}} == true", on_refused=OnRefused("z")))
    )
    bench.do(run, "z", "y")
    bid, _ = bench.claim(run, "x")
    refusal = ERROR | {"code": "gate_refused", "message": "No.", "details": {"values": {"y.ok": None}, "gate": ""}}
    bench.store.fail(bid.step, bid.attempt_id, refusal, Paid(), Ending("rerun", rerun="z", feedback={}))
    bench.pass_time(2)
    made = drawn(bench, run)
    assert story(made, "z")[-2:] == ["reopened", "queue 2..."]
    assert story(made, "y")[-2:] == ["reopened", "dependencies 2..."]
    assert story(made, "x") == ["1 failed 0", "rerun", "reopened", "dependencies 2..."]
    (refused,) = segments(made, "x", "attempt")
    assert refused["gate"] == {"expression": "{{y.ok}} == true", "values": {"y.ok": None}, "verdict": "refused"}
    assert made["repeated"] == []  # a refused gate executes nothing, and the other generation is one on purpose


def test_skipped_and_continued_agents(bench):
    """Under skip_dependents what follows is skipped, as far as it reaches; under `continue` it waits for a worker."""
    modes = (FailureMode.SKIP_DEPENDENTS, FailureMode.CONTINUE)
    run = bench.start(
        pipeline(
            *(agent(f"a{mode}", failure_mode=mode) for mode in modes),
            *(agent(f"b{mode}", f"a{mode}") for mode in modes),
            *(agent(f"c{mode}", f"b{mode}") for mode in modes),
        )
    )
    for mode in modes:
        bid, _ = bench.claim(run, f"a{mode}")
        bench.fail(bid)
    bench.pass_time(1)
    made = drawn(bench, run)
    assert story(made, "bskip_dependents") == story(made, "cskip_dependents") == ["skipped"]
    assert story(made, "bcontinue") == ["queue 1..."]
    assert story(made, "ccontinue") == ["dependencies 1..."]


def test_a_key_a_handler_and_a_turn_are_waited_for(bench):
    """Whose key it is, which handler lacks; a step that is put off again for one reason has waited all the time."""
    definition = pipeline(agent("a", key_parts=({"text": "one"},)))
    first, second = bench.start(definition), bench.start(definition)
    bench.claim(first, "a")
    for _ in range(2):
        assert bench.claim(second, "a")[1].outcome == "deferred"
        bench.pass_time(10)
        bench.sweep(lease_ms=CALM_MS)
    made = drawn(bench, second)
    assert story(made, "a") == ["key 20..."]
    assert segments(made, "a", "wait")[-1]["detail"] == {"reason": "key_reserved", "held_by": str(first)}
    third = bench.start(pipeline(agent("a"), version="3"))
    bench.store.defer(bench.bid(third, "a").step, 5_000, "this worker has no handler handlers:a")
    assert segments(drawn(bench, third), "a", "wait")[-1]["for"] == "handler"
    keyed = pipeline(agent("a"), version="4", concurrency_key="k", concurrency_parts=({"text": "k"},))
    fourth, fifth = bench.start(keyed), bench.start(keyed)
    bench.pass_time(5)
    assert story(drawn(bench, fifth), "a") == ["turn 5..."]
    bench.do(fourth, "a")
    bench.do(fifth, "a")
    assert story(drawn(bench, fifth), "a") == ["turn 5", "1 completed 0"]


def test_outputs_by_hand_and_by_another_runs_key_are_no_executions(bench):
    """Who gave it, or that its key had given it: neither is a call."""
    run = bench.start(pipeline(agent("a", key_parts=({"text": "one"},), gate="{{input.ok}} == true")), {"ok": True})
    bench.do(run, "a")
    bench.orders.override(run, "a", {"by": "hand"}, "ann", "it was wrong")
    made = drawn(bench, run)
    assert [(entry["by"], entry["gate"] and entry["gate"]["verdict"]) for entry in segments(made, "a", "attempt")] == [
        (None, "held"),
        ("ann", None),
    ]
    second = bench.start(bench.definition, {"ok": True})
    bid, claim = bench.claim(second, "a")
    assert claim.outcome == "reuse"
    bench.store.complete(bid.step, bid.attempt_id, claim.output, Paid(), claim.reused_from)
    made = drawn(bench, second)
    (entry,) = segments(made, "a", "attempt")
    assert (entry["reused"], entry["gate"], made["repeated"]) == (True, None, [])


# Whatever happens: the timeline agrees with the tables.

_WAITS_OF = {
    "pending": {"dependencies", "turn"},
    "available": {"queue", "turn", "rescue", "handler", "key"},
    "retryable": {"retry", "handler", "key", "queue"},  # a retry's time is over some moments before the sweep
    "suspended": {"person"},
}


class Told(History):
    """Every history of test_histories, whose timelines are read after every action."""

    @invariant()
    def rules_hold(self):
        if not self.bench:
            return
        reads = Reads(self.store.engine)
        now = self.bench.sql("select stepfast.now() as now")[0].now
        for run_id in self.bench.runs:
            run = reads.run(run_id)
            made = timeline(run, reads.event_list(run_id), self.bench.definition, workers={}, now=now)
            for step, told in zip(run["steps"], made["steps"], strict=True):
                self.counts.update(entry.get("for", "") for entry in told["segments"])
                self._agree(run, step, told)

    def _agree(self, run, step, told):
        found = [entry for entry in told["segments"] if entry["kind"] != "mark"]
        attempts = [entry for entry in found if entry["kind"] == "attempt"]
        assert [entry["number"] for entry in attempts] == [entry["number"] for entry in step["tries"]]
        for before, after in pairwise(found):
            assert before["ended_at"] is not None, told
            assert before["ended_at"] <= after["started_at"], told
        waits = [entry["for"] for entry in found if entry["kind"] == "wait" and entry["ended_at"] is None]
        expected = set() if run["ended_at"] else _WAITS_OF.get(step["state"], set())
        # A wait that began in this very millisecond is none yet.
        assert len(waits) <= bool(expected), (step["state"], told)
        assert set(waits) <= expected, (run["state"], step["state"], told)
        executing = [entry for entry in attempts if entry["ended_at"] is None]
        assert len(executing) == (step["state"] == "executing")


def test_timelines_agree_with_the_tables_in_every_history(fast_store):
    """No two stretches of a step overlap, its attempts are all there, and what it waits for is what its state says."""
    play(Told, fast_store, HISTORIES_SHORT)
    # So few histories need not hold the rare ones; each has a test of its own above.
    expected = set(WAITS) if "HISTORIES" in os.environ else {"dependencies", "queue", "retry"}
    assert expected <= set(Told.counts), "a kind of wait came in no history"


# The drawing.


def test_idle_stretches_are_drawn_shorter():
    """A night in which nothing executes takes little room; and a column's time is the time of that column."""
    scale = Scale([(0, 10), (10, 20), (36_020, 36_030)], 36_030, 100)
    assert scale.gaps == [(20, 36_020)]
    columns = [scale.column(at) for at in (0, 10, 20, 36_020, 36_030)]
    assert columns == pytest.approx([0, 27.8, 55.6, 72.2, 100], abs=0.1)
    for at in (0, 7, 20, 20_000, 36_025, 36_030):
        assert scale.at_s(scale.column(at)) == pytest.approx(at)
    assert Scale([(0, 10)], 15, 100).gaps == []
    assert Scale([], 0, 10).column(0) == 0.0
    assert Scale([], 60, 10).column(30) == pytest.approx(5)


def _night(bench):
    """A run with a retry, a lost worker, a refusal, a night, an override, a resume and an approval."""
    run = bench.start(
        pipeline(agent("first"), agent("second", "first"), agent("third", "second", gate="{{second.ok}} == true"))
    )
    bid, _ = bench.claim(run, "first")
    bench.pass_time(3)
    bench.fail(bid, retry_ms=2_000, error=ERROR | {"message": "\x1b[2J[red]markup[/] " + "long " * 100})
    bench.pass_time(3)
    bench.sweep(lease_ms=CALM_MS)
    bench.do(run, "first")
    bench.claim(run, "second")
    bench.pass_time(4)
    lose_worker(bench)
    bench.do(run, "second")
    bid, _ = bench.claim(run, "third")
    bench.fail(bid, error=ERROR | {"code": "gate_refused", "message": "It does not hold."})
    bench.pass_time(9 * 3600)
    bench.orders.override(run, "second", {"ok": True}, "ann", None)
    bench.resume(run, "ann")
    bid, _ = bench.claim(run, "third")
    bench.store.suspend(bid.step, bid.attempt_id, "d1", {}, None)
    bench.pass_time(1)
    return run


@pytest.mark.parametrize("width", [40, 60, 80, 132, 250])
@pytest.mark.parametrize("glyphs", [UNICODE, ASCII], ids=["unicode", "ascii"])
def test_no_line_is_wider_than_the_terminal(bench, width, glyphs):
    """From 60 columns on nothing is broken by the terminal; bars stand below each other; ASCII is ASCII."""
    lines = [line.plain for line in Waterfall(drawn(bench, _night(bench)), width, glyphs).lines(wrapped=True)]
    assert max(map(len, lines)) <= max(width, 56)
    bars = [line for line in lines if glyphs.edge in line]
    assert len({(line.index(glyphs.edge), line.rindex(glyphs.edge)) for line in bars}) == 1
    assert len(bars) == 8
    if glyphs is ASCII:
        assert "".join(lines).isascii()


def test_what_is_drawn_names_all_that_happened(bench):
    """Attempts, waits, retries, the crash and who rescued it, gate values, who did what; agents' texts command nothing."""
    made = drawn(bench, _night(bench))
    text = "\n".join(line.plain for line in Waterfall(made, 100, UNICODE).lines(wrapped=False))
    for said in (
        "1 failed",
        "2 completed",
        "waited 2.0 s for the time of its retry (broken)",
        "1 lost",
        "worker_lost: The worker that executed second died.",
        "(other:2), which rescued it from worker",
        "gate {{second.ok}} == true refused: second.ok = None",
        "gate {{second.ok}} == true held: second.ok = True",
        "given up, with a dead letter (",
        "3 by hand",
        "ann gave its output by hand",
        "the run was resumed by ann",
        "≈9:00:00 h",
        "2 asked",
        "broken: \\x1b[2J[red]markup[/] long",
    ):
        assert said in text, f"{said}\n{text}"
    assert "\x1b" not in text
    assert list(drawing.foot(made)) == [
        "first was executed 2 times (broken); one was committed.",
        "second was executed 2 times (worker_lost); one was committed.",
    ]
    assert "Wasted: 1 call lost with a worker, which may have been paid for." in drawing.head(made)


def test_time_goes_on_while_something_executes(bench):
    """What has not ended ends now, and a clock that is behind draws nothing backwards."""
    run = bench.start(line("a"))
    bench.claim(run, "a")
    bench.pass_time(30)
    made = drawn(bench, run)
    (attempt,) = segments(made, "a", "attempt")
    assert (attempt["ended_at"], round(attempt["seconds"])) == (None, 30)
    reads = Reads(bench.store.engine)
    early = datetime.fromisoformat(made["created_at"]) - timedelta(hours=1)
    behind = timeline(reads.run(run), reads.event_list(run), bench.definition, workers={}, now=early)
    assert segments(behind, "a", "attempt")[0]["seconds"] == 0.0
    assert list(Waterfall(behind, 80, UNICODE).lines(wrapped=True))
