"""What a handler records of the world, and how a probe looks again."""

import types

import pytest
from deploying import Memory
from working import order, settings_for

from app.agents import handlers
from app.agents.context import OBSERVED_MAX_COUNT
from app.agents.handlers import Handler
from app.errors import AuthorMistake, HandlerFailed, InvalidOutput, ProbeMissing, StaleInput, TimedOut
from app.execution.outcome import decide
from app.pipelines.model import Agent

BESIDE = types.ModuleType("beside")
BESIDE.head = lambda ctx: "abc"


def call(function):
    handler = Handler(function, "0" * 64, repeatable=False, module=BESIDE)
    return handlers.call(handler, order(), Memory(), settings_for("http://localhost"))


def look(function, **fields):
    return handlers.look(Handler(function, "0" * 64, repeatable=False), order(**fields))


def test_observations_go_with_the_output():
    """By name, with the value and the probe; the last of a name counts."""

    def survey(ctx):
        ctx.observed("repo", "old", probe="head")
        ctx.observed("repo", "abc", probe="head")
        ctx.observed("count", {"n": [1, None]}, probe="head")

    assert call(survey).observed == (
        {"name": "repo", "value": "abc", "probe": "head"},
        {"name": "count", "value": {"n": [1, None]}, "probe": "head"},
    )


@pytest.mark.parametrize(
    ("name", "value", "probe", "error"),
    [
        ("", 1, "head", AuthorMistake),
        (3, 1, "head", AuthorMistake),
        ("repo", 1, "tail", AuthorMistake),
        ("repo", object(), "head", InvalidOutput),
        ("repo", float("nan"), "head", InvalidOutput),
        ("repo", "x" * 1_000, "head", InvalidOutput),
    ],
)
def test_bad_observation_is_refused_at_once(name, value, probe, error):
    """Not hours later, when somebody is to look again."""
    with pytest.raises(error):
        call(lambda ctx: ctx.observed(name, value, probe=probe))


def test_observations_are_bounded():
    """Each costs every dependent a look."""

    def survey(ctx):
        for number in range(OBSERVED_MAX_COUNT + 1):
            ctx.observed(f"n{number}", number, probe="head")

    with pytest.raises(AuthorMistake, match="at most 20"):
        call(survey)


def test_probe_sees_the_run_and_may_have_no_effect():
    """It is given a context, whose input says where to look, and that lets it do nothing."""
    assert look(lambda ctx: [ctx.run.input["issue"]]) == ["it breaks"]
    with pytest.raises(AuthorMistake, match="only looks"):
        look(lambda ctx: ctx.once("mail", dict))


def test_probe_that_fails_is_a_failure_that_may_pass():
    """The network may be back at the next attempt; a probe may be repeated, whatever its agent may not."""

    def broken(ctx):
        raise OSError("no route")

    with pytest.raises(HandlerFailed, match="no route"):
        look(broken)

    def slow(ctx):
        while True:
            pass

    with pytest.raises(TimedOut):
        look(slow, timeout_ms=100, idempotent=False)


def test_what_becomes_of_a_stale_input_and_of_a_missing_probe():
    """The observer is done again; a worker without the probe uses up no attempt."""
    agent, counts = Agent("a"), {"failures": 2, "waits": 0, "rounds": 0, "random_0_to_1": 0.0}
    stale = StaleInput("It moved.")
    stale.agent = "survey"
    ending = decide(stale, agent, **counts)
    assert (ending.action, ending.rerun) == ("rerun", "survey")
    ending = decide(ProbeMissing("None here."), agent, **counts)
    assert (ending.action, ending.counts) == ("retry", False)
