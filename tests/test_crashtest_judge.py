"""What a crash test promises of a run, decided over values: each promise can be found broken."""

from uuid import uuid4

import pytest
from commanding import complete

from app import operations
from app.cli import crashtest
from app.crashpoints import CrashPoint, Note
from app.crashtest import answers, world
from app.crashtest.cells import Answers, Cell, Fault
from app.crashtest.judge import Seen, Verdict, judge, undisturbed
from app.errors import Misuse
from app.pipelines.model import Agent, Pipeline, Prompt
from app.simulator.script import Call, Count, Script, choose

ASKS = Agent("asks", model="claude-sonnet-5-5", prompt=Prompt("You ask.", "Ask."))
DOES = Agent("does", handler="handlers:does", depends_on=("asks",))
PIPELINE = Pipeline("tested", "1.0.0", (ASKS, DOES))


def _step(agent, output, *states, repeatable=True):
    tries = [
        {
            "id": f"{agent}{number}",
            "state": state,
            "output": output if state == "completed" else None,
            "repeatable": repeatable,
        }
        for number, state in enumerate(states)
    ]
    return {"agent": agent, "state": "completed", "attempt_id": tries[-1]["id"], "tries": tries}


def _seen(**changes):
    """A run that went as an undisturbed one does, but for these changes."""
    tries = {"asks": ("completed",), "does": ("completed",)} | changes.pop("tries", {})
    output = changes.pop("output", {"text": "hello", "took_ms": 5, "id": str(uuid4())})
    run = {
        "state": changes.pop("state", "completed"),
        "steps": [
            _step("asks", output, *tries["asks"]),
            _step("does", {}, *tries["does"], repeatable=changes.pop("repeatable", True)),
        ],
    }
    codes = changes.pop("codes", ())
    done = [Note(False, CrashPoint.EFFECT_DONE, "does", 1, 0.0)] * changes.pop("effects", 1)
    called = [Note(False, CrashPoint.CALL_BEFORE, "does", 1, 0.0)] * changes.pop("called", 1)
    values = {
        "run": run,
        "events": [{"agent": agent, "data": {"code": code}} for agent, code in codes],
        "notes": done + called,
        "calls": {"asks": 1},
        "left": {"file": "x"},
        "struck": True,
        "died": "worker",
        "recovered_s": 1.0,
        "violations": [],
        "problems": [],
    }
    return Seen(**values | changes)


KILLED = Cell("complete.before:asks", "asks", (CrashPoint.COMPLETE_BEFORE,))
CLAIMED = Cell("claim.after:asks", "asks", (CrashPoint.CLAIM_AFTER,))
EFFECT = Cell("effect.begun:does", "does", (CrashPoint.EFFECT_BEGUN,))
BEFORE = Cell("call.before:does", "does", (CrashPoint.CALL_BEFORE,))
RESTARTED = Cell("postgres", "asks", (CrashPoint.COMPLETE_BEFORE,), fault=Fault.POSTGRES_FAST)
FROZEN = Cell("frozen", "asks", (CrashPoint.COMPLETE_BEFORE,), fault=Fault.WORKER_FROZEN)
DOUBLED = Cell("doubled", fault=Fault.MESSAGE_DOUBLED)
FAILING = Cell("fail.after:asks", "asks", (CrashPoint.FAIL_AFTER,), Answers.FAILS_ONCE)
LOST = {"asks": ("lost", "completed")}
UNKNOWN = (("does", "outcome_unknown"),)


@pytest.mark.parametrize(
    ("cell", "changes", "verdict"),
    [
        (KILLED, {}, Verdict.OK),
        (KILLED, {"tries": LOST, "calls": {"asks": 2}}, Verdict.OK),
        (KILLED, {"calls": {"asks": 2}}, "1 calls were repeated, and 0 were in flight"),
        (KILLED, {"tries": LOST, "calls": {"asks": 3}}, "2 calls were repeated, and 1 were in flight"),
        (CLAIMED, {"tries": LOST, "calls": {"asks": 2}}, "1 calls were repeated, and 0 were in flight"),
        (RESTARTED, {"tries": LOST, "calls": {"asks": 2}}, "1 calls were repeated, and 0 were in flight"),
        (FAILING, {"tries": {"asks": ("failed", "completed")}, "calls": {"asks": 2}}, Verdict.OK),
        (FAILING, {"tries": {"asks": ("failed", "completed")}, "calls": {"asks": 3}}, "1 calls were repeated"),
        (EFFECT, {"effects": 2}, "1 effects were repeated"),
        (BEFORE, {"called": 2, "repeatable": False}, "1 effects were repeated"),
        (BEFORE, {"called": 2}, Verdict.OK),
        (KILLED, {"output": {"text": "other", "took_ms": 5, "id": "x"}}, "outputs differ: asks.text"),
        (KILLED, {"output": {"text": "hello", "took_ms": 7, "id": "x"}}, Verdict.OK),
        (KILLED, {"left": {"file": "y"}}, "what the handlers left behind differs: file"),
        (KILLED, {"left": {"file": "x", "more": "y"}}, "what the handlers left behind differs: more"),
        (KILLED, {"struck": False}, "the worker did not come to this point"),
        (KILLED, {"violations": ["1: asks: two outputs"]}, "rule 1: asks: two outputs"),
        (KILLED, {"problems": ["it did not end"]}, "it did not end"),
        (KILLED, {"state": "failed"}, "the run ended failed"),
        (BEFORE, {"state": "failed", "codes": UNKNOWN, "repeatable": False}, Verdict.UNKNOWN),
        (BEFORE, {"state": "failed", "codes": UNKNOWN}, "does had begun no effect, and ended as outcome_unknown"),
        (EFFECT, {"state": "failed", "codes": UNKNOWN}, Verdict.UNKNOWN),
        (KILLED, {"codes": (("asks", "outcome_unknown"),)}, "asks may be repeated, and ended as outcome_unknown"),
        (RESTARTED, {"codes": UNKNOWN, "repeatable": False}, "nothing died, and a step ended as outcome_unknown"),
        (FROZEN, {"tries": LOST, "calls": {"asks": 2}}, Verdict.OK),
        (FROZEN, {}, "nobody took the step from the worker that was away"),
        (DOUBLED, {"tries": {"does": ("completed", "completed")}}, "does was attempted 2 times"),
    ],
)  # fmt: skip
def test_each_promise_can_be_broken(cell, changes, verdict):
    """What is allowed is ok, what is promised is told apart from a failure, and everything else is named."""
    normal = undisturbed(PIPELINE, _seen(), _seen())
    if not changes.get("repeatable", True):
        normal = undisturbed(PIPELINE, _seen(repeatable=False), _seen(repeatable=False))
    judged = judge(PIPELINE, cell, _seen(**changes), normal)
    if isinstance(verdict, Verdict):
        assert (judged.verdict, judged.why) == (verdict, [])
    else:
        assert judged.verdict == Verdict.BROKEN
        assert judged.why[0].startswith(verdict)


def test_what_differs_by_itself_is_not_compared():
    """Ids differ between undisturbed runs, and durations always may; the rest must be the same."""
    normal = undisturbed(PIPELINE, _seen(), _seen())
    assert normal.not_compared == ["asks.id"]


def test_files_and_commits_are_what_is_left(tmp_path):
    """Files by their content; of a repository the commits, and nothing that git keeps for itself."""
    folder = tmp_path / "scratch"
    world.renew(folder, None)
    (folder / "a").write_text("1")
    first = world.left(folder)
    (folder / "a").write_text("2")
    assert world.differing(dict(first), dict(world.left(folder))) == {"a"}
    (folder / ".git").mkdir()
    (folder / ".git" / "config").touch()
    assert world.left(folder).keys() == {"a", "commits in ."}
    world.renew(folder, None)
    assert list(folder.iterdir()) == []
    assert world.placed({"a": ["{scratch}/x", 1]}, folder) == {"a": [f"{folder}/x", 1]}


def test_models_answer_as_they_did_in_an_earlier_run(here):
    """--answers: each prompt gets the output of its agent, trouble comes first, and every call is counted."""
    operations.publish(here, PIPELINE)
    run_id = operations.start(here, "tested", {"folder": "there"}).run_id
    with pytest.raises(Misuse, match="has no output of asks"):
        crashtest._earlier(str(run_id), PIPELINE)
    complete(here.store, PIPELINE, run_id, "asks", {"text": "as before"})
    earlier = crashtest._earlier(str(run_id), PIPELINE)
    assert earlier.run_input == {"folder": "there"}
    good = answers.recorded(PIPELINE, earlier.outputs)
    script = answers.script(PIPELINE, good, "asks", Answers.FAILS_ONCE)
    counts = [Count() for _ in script.rules]
    call = Call("claude-sonnet-5-5", "You ask.\n\nmore", "Ask.", {})
    assert [choose(script, call, counts).status for _ in range(2)] == [529, None]
    assert choose(script, call, counts).reply == "as before"
    assert answers.calls(PIPELINE, [{"matched": count.matched} for count in counts]) == {"asks": 3}
    assert answers.script(PIPELINE, Script(), "-", Answers.GOOD).rules[0].reply is None
