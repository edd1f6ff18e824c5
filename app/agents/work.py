"""What goes into an agent and what comes out: the vocabulary between the executor and the agents' room."""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from uuid import UUID

    from app.clock import Deadline
    from app.pipelines.model import Agent, Json


@dataclass(frozen=True, slots=True)
class Work:
    """One attempt at a step. `outputs` holds the recorded outputs of `agent.reads`, by agent id.

    `feedback` is what a later gate read when it sent this agent back to work.
    """

    run_id: "UUID"
    attempt_id: "UUID"
    pipeline: str
    agent: "Agent"
    generation: int
    number: int
    input: "Json"
    outputs: "dict[str, Json]"
    deadline: "Deadline"
    feedback: "Json | None" = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished call; all but `output` and `observed` is None for a handler.

    `observed` is what it saw of the world: {"name", "value", "probe"} each.

    `usage` has the keys input_tokens (cache included), output_tokens, cache_read_tokens, cache_creation_tokens and
    thinking_tokens.
    """

    output: "Json"
    usage: dict[str, int] | None = None
    cost_usd: float | None = None
    model: str | None = None
    request_id: str | None = None
    observed: "tuple[Json, ...]" = ()


class EffectState(StrEnum):
    NEW = "new"  # nobody began it: do it
    HAPPENED = "happened"  # recorded, with its output
    UNKNOWN = "unknown"  # somebody began it and did not record an end: look outside first


@dataclass(frozen=True, slots=True)
class Effect:
    state: EffectState
    output: "Json | None" = None


class Effects(Protocol):
    """The record behind `ctx.once`: one row for each (run, agent, generation, key), guarded by the attempt."""

    def begin(self, key: str) -> Effect:
        """Records that the effect is about to happen, unless it stands recorded. Raises StaleClaim if fenced."""

    def finish(self, key: str, output: "Json") -> None:
        """Records that it happened, with its output."""

    def forget(self, key: str) -> None:
        """Records that it did not happen: the next `begin` is NEW."""
