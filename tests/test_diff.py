"""What differs between two runs: each kind of difference is named, long texts are bounded, what is redacted is not shown."""

import json

import pytest
from benches import ERROR, Bench
from pipelines import agent, pipeline

from app.pipelines.model import Prompt
from app.runs.database import engine
from app.runs.diff import SHOWN_MAX_LINES, diff
from app.runs.reads import Reads
from app.runs.store import Paid, Store

PAID = Paid("claude-sonnet-5-5", "req", {"input_tokens": 1}, 0.01)
PROMPT = Prompt("You work.", "Do {{input.what}}.")


@pytest.fixture
def bench(database_url):
    store = Store(engine(database_url, pool_max=2))
    yield Bench(store)
    store.engine.dispose()


def _do(bench, definition, run_input, outputs):
    """A run in which the agents of `outputs` put these out; the next one, if there is one, is given up."""
    run = bench.start(definition, run_input)
    for name, output in outputs.items():
        bid, _ = bench.claim(run, name)
        if output is None:
            bench.fail(bid, error=ERROR | {"message": "It broke."})
        else:
            bench.store.complete(bid.step, bid.attempt_id, output, PAID)
    return Reads(bench.store.engine).run(run), definition


def _changes(found, name):
    (entry,) = [entry for entry in found["agents"] if entry["agent"] == name]
    return {change["what"]: change for change in entry["changes"]}


def test_equal_runs_differ_in_nothing(bench):
    """Time, cost and ids are no changes."""
    definition = pipeline(agent("a", prompt=PROMPT), agent("b", "a"))
    sides = [_do(bench, definition, {"what": "x"}, {"a": {"n": 1}, "b": {}}) for _ in range(2)]
    found = diff(*sides)
    assert (found["same"], found["changes"]) == (True, [])
    assert [entry["facts"]["cost_usd"] for entry in found["agents"]] == [[0.01, 0.01]] * 2
    assert found["first"]["run_id"] == sides[0][0]["id"]


def test_every_kind_of_difference_is_named(bench):
    """Inputs, prompt, model, definition, schema, gate and what it saw, output, error, and agents that only one has."""
    first = pipeline(
        agent("a", prompt=PROMPT),
        agent("b", "a", gate="{{a.n}} > 0", timeout_ms=1_000),
        agent("c", "b", handler="h:f"),
        agent("old"),
    )
    second = pipeline(
        agent("a", prompt=Prompt("You work.", "Do {{input.what}} again."), model="claude-opus-5-5", schema={}),
        agent("b", "a", gate="{{a.n}} > 1", timeout_ms=2_000),
        agent("c", "b", handler="h:g"),
        agent("new"),
        version="2",
    )
    found = diff(
        _do(bench, first, {"what": "x"}, {"a": {"n": 1}, "b": {"m": 1}, "c": {}, "old": {}}),
        _do(bench, second, {"what": "y"}, {"a": {"n": 2}, "b": None}),
    )
    json.dumps(found)
    assert not found["same"]
    assert [change["what"] for change in found["changes"]] == ["version", "state", "input"]
    a, b, c = (_changes(found, name) for name in "abc")
    assert a.keys() == {"model", "schema", "prompt", "output"}
    assert [line for line in a["prompt"]["diff"] if line[0] in "+-"] == [
        "-user: Do {{input.what}}.",
        "+user: Do {{input.what}} again.",
    ]
    assert (a["output"]["first"], a["output"]["second"]) == ({"n": 1}, {"n": 2})
    assert b.keys() == {
        *("gate", "definition: timeout_ms", "state", "input: output of a", "gate saw", "error", "output"),
    }
    assert (b["state"]["first"], b["state"]["second"]) == ("completed", "discarded")
    assert b["error"]["diff"][1:] == ["+code: broken", "+message: It broke."]
    assert c.keys() == {"handler", "state"}
    assert {entry["agent"]: entry["only_in"] for entry in found["agents"]} == {
        **dict.fromkeys("abc"),
        "old": "first",
        "new": "second",
    }


def test_long_texts_are_bounded(bench):
    """At most so many lines of a diff, and how many more there were."""
    definition = pipeline(agent("a"))
    texts = ["\n".join(f"{word} {number}" for number in range(5_000)) for word in ("one", "two")]
    found = diff(*(_do(bench, definition, {}, {"a": {"text": text}}) for text in texts))
    change = _changes(found, "a")["output"]
    assert len(change["diff"]) <= SHOWN_MAX_LINES
    assert change["left_out"] > 1_000


def test_what_is_redacted_is_said_to_differ_and_not_shown(bench):
    """Two outputs that look alike once redacted have other hashes."""
    definition = pipeline(agent("a"), agent("b", "a"))
    sides = [_do(bench, definition, {}, {"a": {"pin": pin}, "b": {}}) for pin in ("1", "2")]
    for run, _ in sides:
        run["steps"][0]["tries"][0]["output"] = {"pin": "[redacted]"}  # as operations.document does
    found = diff(*sides)
    assert _changes(found, "a")["output"] == {"what": "output", "redacted": True}
    assert _changes(found, "b")["input: output of a"] == {"what": "input: output of a", "redacted": True}
    assert not found["same"]


def test_a_run_that_has_not_begun_can_be_compared(bench):
    """Nothing was given yet: what differs is that."""
    definition = pipeline(agent("a"))
    done = _do(bench, definition, {}, {"a": {}})
    found = diff(done, _do(bench, definition, {}, {}))
    assert list(_changes(found, "a")) == ["state"]
    assert found["agents"][0]["facts"]["attempts"] == [1, 0]
    assert found["second"]["seconds"] is None
