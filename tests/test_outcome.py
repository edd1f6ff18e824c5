"""What becomes of a failed attempt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import errors
from app.execution.outcome import backoff_ms, decide
from app.pipelines.model import Agent, Backoff, OnRefused, RetryPolicy
from app.runs.store import Ending

POLICY = RetryPolicy(max_attempts=3, initial_ms=1_000, max_ms=60_000, jitter=0.0)


DISCARD = Ending("discard")


def _retry(delay_ms, *, counts=True):
    return Ending("retry", counts=counts, retry_ms=delay_ms)


def _decide(error, failures=0, waits=0, rounds=0, **fields):
    agent = Agent("reviewer", retry_policy=POLICY, **fields)
    return decide(error, agent, failures=failures, waits=waits, rounds=rounds, random_0_to_1=0.5)


def test_retryable_failure_is_retried_until_its_attempts_are_used_up():
    """aws-durable-execution 1-12 exhaustion: max_attempts counts every failure, the first one too."""
    assert _decide(errors.TimedOut("late")) == _retry(1_000)
    assert _decide(errors.TimedOut("late"), failures=1) == _retry(2_000)
    assert _decide(errors.TimedOut("late"), failures=2) == DISCARD


@pytest.mark.parametrize(
    "error",
    [
        errors.GateRefused("no"),
        errors.ModelRefused("no"),
        errors.OutcomeUnknown("?"),
        errors.AccountProblem("key"),
        errors.AuthorMistake("typo"),
    ],
)
def test_permanent_failure_is_not_retried(error):
    """aws-durable-execution 1-16 non-retryable: a retry would fail again, and cost again."""
    assert _decide(error) == DISCARD


def test_rate_limit_counts_against_nothing():
    """A 429 is a wait: it may be met any number of times, with a growing pause."""
    assert _decide(errors.RateLimited("429"), failures=2, waits=0) == _retry(1_000, counts=False)
    assert _decide(errors.RateLimited("429"), failures=2, waits=500) == _retry(60_000, counts=False)


def test_the_servers_wish_is_obeyed_where_it_is_longer():
    """Retry-After lengthens the policy's delay and never shortens it."""
    error = errors.RateLimited("429")
    error.retry_after_s = 7.0
    assert _decide(error) == _retry(7_000, counts=False)
    error.retry_after_s = 0.1
    assert _decide(error) == _retry(1_000, counts=False)


def test_refused_gate_sends_the_work_back_while_rounds_are_left():
    """on_refused: the agent that is named runs again, given what the gate read; after max_rounds it is a dead letter."""
    error = errors.GateRefused("no")
    error.read = {"coder": {"confidence": 0.5}}
    loop = {"gate": "{{coder.confidence}} >= 0.85", "on_refused": OnRefused("coder", max_rounds=2)}
    ending = _decide(error, rounds=1, **loop)
    assert (ending.action, ending.rerun) == ("rerun", "coder")
    assert ending.feedback == {"gate_of": "reviewer", "gate": loop["gate"], "read": {"coder": {"confidence": 0.5}}}
    assert _decide(error, rounds=2, **loop) == DISCARD


@pytest.mark.parametrize(
    ("backoff", "expected"),
    [
        (Backoff.EXPONENTIAL, [1_000, 2_000, 4_000, 8_000]),
        (Backoff.LINEAR, [1_000, 2_000, 3_000, 4_000]),
        (Backoff.CONSTANT, [1_000, 1_000, 1_000, 1_000]),
    ],
)
def test_backoff_grows_as_its_name_says(backoff, expected):
    """The three shapes of the delay."""
    policy = RetryPolicy(backoff=backoff, jitter=0.0)
    assert [backoff_ms(policy, number, 0.0) for number in (1, 2, 3, 4)] == expected


@given(
    st.sampled_from(Backoff),
    st.integers(1, 10**6),
    st.integers(1, 10**6),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 10**9),
)
def test_backoff_stays_within_its_bounds(backoff, initial_ms, max_ms, jitter, random_0_to_1, number):
    """Whatever the policy and the number of the retry: from zero to max_ms, and never an overflow."""
    policy = RetryPolicy(backoff=backoff, initial_ms=initial_ms, max_ms=max_ms, jitter=jitter)
    assert 0 <= backoff_ms(policy, number, random_0_to_1) <= max_ms
