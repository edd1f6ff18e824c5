"""docs/failure-modes.md says what the database does: its table is made here, by doing each case."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from benches import Bench
from pipelines import agent, pipeline

from app.errors import NotPossible
from app.pipelines.model import FailureMode
from app.runs.database import engine
from app.runs.orders import Orders
from app.runs.store import Store

DOCUMENT = Path(__file__).parent.parent / "docs/failure-modes.md"
OUTCOMES = ("completed", "discarded", "rejected")
# What the document draws. `left` meets the outcome while `right` executes; nothing else has begun by then.
OTHERS = ("left", "right", "beside", "after", "join")


@pytest.fixture
def bench(database_url):
    store = Store(engine(database_url, pool_max=4))
    yield Bench(store)
    store.engine.dispose()


@dataclass(frozen=True)
class Ended:
    states: dict[str, str]
    run: str
    dead_letters: int
    resumed: tuple[str, ...]  # what was executed after a `resume`, in order


def definition(mode):
    return pipeline(
        agent("start"),
        agent("left", "start", failure_mode=mode, requires_human_approval=True),
        agent("right", "start"),
        agent("after", "left"),
        agent("beside", "right"),
        agent("join", "after", "beside"),
        version=mode,
    )


def do_available(bench, run):
    """Executes whatever may be executed, until nothing may. Returns the agents in that order."""
    done = []
    while available := sorted(name for name, state in bench.states(run).items() if state == "available"):
        bench.do(run, available[0])
        done.append(available[0])
    return tuple(done)


def meet(bench, run, outcome):
    """Lets `left` end as the case wants."""
    bid, claim = bench.claim(run, "left")
    assert claim.outcome == "claimed"
    if outcome == "completed":
        bench.complete(bid)
    elif outcome == "discarded":
        bench.fail(bid)
    else:
        bench.store.suspend(bid.step, bid.attempt_id, "digest", {}, 1_000)
        bench.pass_time(2 if outcome == "expired" else 0)
        orders = Orders(bench.store.engine)
        asked = {"digest": "digest", "by": "ann", "reason": "because"}
        assert orders.decide(run, "left", approved=outcome == "expired", **asked) == outcome


def happens(bench, outcome, mode) -> Ended:
    """One case, to the end of the run, and once more after a resume."""
    run = bench.start(definition(mode))
    bench.do(run, "start")
    right, _ = bench.claim(run, "right")
    meet(bench, run, outcome)
    bench.complete(right)
    do_available(bench, run)
    partial = bench.sql("select partial from stepfast.runs where id = :r", r=run)
    ended = Ended(
        states=bench.states(run),
        run=bench.run_state(run) + (", partial" if partial else ""),
        dead_letters=bench.sql("select count(*) from stepfast.dead_letters where run_id = :r", r=run),
        resumed=(),
    )
    try:
        bench.resume(run)
    except NotPossible:
        return ended
    return Ended(ended.states, ended.run, ended.dead_letters, do_available(bench, run))


def row(outcome, mode, ended):
    states = [ended.states[name] for name in OTHERS]
    letter = "yes" if ended.dead_letters else "no"
    return (
        f"| {outcome} | `{mode}` | {' | '.join(states)} | {ended.run} | {letter} | {', '.join(ended.resumed) or '-'} |"
    )


def test_document_shows_what_happens_in_each_case(bench):
    """Outcome of an agent by its failure mode: the states of what depends on it and of the run, and the dead letter."""
    heads = [
        "`left` is",
        "its `failure_mode`",
        *(f"`{name}`" for name in OTHERS),
        "run",
        "dead letter",
        "done by `resume`",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [row(outcome, mode, happens(bench, outcome, mode)) for outcome in OUTCOMES for mode in FailureMode]
    table = "\n".join(lines)
    assert f"\n\n{table}\n\n" in DOCUMENT.read_text(), f"{DOCUMENT} must hold this table:\n\n{table}\n"


@pytest.mark.parametrize("mode", FailureMode)
def test_approval_that_expires_is_a_rejection(bench, mode):
    """Nobody decided in time: the same states, and no dead letter either."""
    assert happens(bench, "expired", mode) == happens(bench, "rejected", mode)


def test_dependent_of_what_failed_runs_without_its_output(bench):
    """Under `continue` the claim hands over the other outputs, and the missing one is not among them."""
    made = pipeline(agent("a", failure_mode=FailureMode.CONTINUE), agent("b"), agent("c", "a", "b"))
    run = bench.start(made)
    bench.do(run, "b")
    bid, _ = bench.claim(run, "a")
    assert [step.agent for step in bench.fail(bid).ready] == ["c"]
    assert bench.claim(run, "c")[1].outputs == {"b": {"by": "b"}}


def test_skipped_agent_skips_whatever_its_own_mode_says(bench):
    """`continue` on a skipped agent lets nothing run: what depends on it, at any distance, is skipped."""
    made = pipeline(
        agent("a", failure_mode=FailureMode.SKIP_DEPENDENTS),
        agent("b", "a", failure_mode=FailureMode.CONTINUE),
        agent("c"),
        agent("d", "b", "c"),
    )
    run = bench.start(made)
    bid, _ = bench.claim(run, "a")
    bench.fail(bid)
    bench.do(run, "c")
    assert bench.states(run) == {"a": "discarded", "b": "skipped", "c": "completed", "d": "skipped"}


def test_resume_from_the_failed_agent_closes_the_gap(bench):
    """Plain resume leaves alone what ran without the output; `resume --from` does that again, on the output."""
    run = bench.start(definition(FailureMode.CONTINUE))
    bench.do(run, "start")
    meet(bench, run, "discarded")
    do_available(bench, run)
    assert set(Orders(bench.store.engine).resume_from(run, "left", "ann")) == {"left", "after", "join"}
    assert do_available(bench, run) == ("left", "after", "join")
    reads = bench.sql(
        "select reads from stepfast.attempts where run_id = :r and agent = 'after' and generation = 2", r=run
    )
    assert list(reads) == ["left"]
