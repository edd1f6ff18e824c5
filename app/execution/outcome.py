"""What becomes of a step whose attempt failed: a pure decision over values."""

from typing import TYPE_CHECKING

from app.errors import GateRefused, Permanent, Retryable, StaleInput
from app.runs.store import Ending

if TYPE_CHECKING:
    from app.errors import AgentError
    from app.pipelines.model import Agent, Json, RetryPolicy


def decide(
    error: "AgentError", agent: "Agent", *, failures: int, waits: int, rounds: int, random_0_to_1: float
) -> Ending:
    """`failures`, `waits` and `rounds` are those before this one, since the last resume."""
    if isinstance(error, GateRefused) and agent.on_refused and rounds < agent.on_refused.max_rounds:
        return Ending("rerun", rerun=agent.on_refused.rerun, feedback=_feedback(agent, error))
    if isinstance(error, StaleInput):
        return Ending("rerun", rerun=error.agent)
    if isinstance(error, Permanent):
        return Ending("discard")
    counts = error.counts_as_attempt if isinstance(error, Retryable) else True
    if counts and failures + 1 >= agent.retry_policy.max_attempts:
        return Ending("discard")
    delay_ms = backoff_ms(agent.retry_policy, (failures if counts else waits) + 1, random_0_to_1)
    if isinstance(error, Retryable) and error.retry_after_s is not None:
        delay_ms = max(delay_ms, round(error.retry_after_s * 1000))
    return Ending("retry", counts=counts, retry_ms=delay_ms)


def _feedback(agent: "Agent", error: GateRefused) -> "Json":
    return {"gate_of": agent.id, "gate": agent.gate, "read": error.read or {}}


def backoff_ms(policy: "RetryPolicy", number: int, random_0_to_1: float) -> int:
    """The delay before retry `number`, from 1 (see RetryPolicy)."""
    return round(policy.delay_ms(number) * (1 - policy.jitter * random_0_to_1))
