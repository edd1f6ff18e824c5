"""The models that the simulator knows, and what the real API lets each of them do.

Source: platform.claude.com/docs/en/models (overview and "what's new" pages), as of November 2026. A test compares the
names with the SDK's own list. Retired models, and unknown names, are a 404.
"""

from dataclasses import dataclass
from enum import Enum, auto


class Thinking(Enum):
    """How a model thinks."""

    BUDGET = auto()  # only when asked, with `enabled` and a budget
    BUDGET_OR_ADAPTIVE = auto()  # only when asked, either way
    ADAPTIVE = auto()  # only when asked, with `adaptive`; a budget is a 400
    DEFAULT = auto()  # unless `disabled`; a budget is a 400
    ALWAYS = auto()  # `disabled` is a 400 too, and so is a forced `tool_choice`


@dataclass(frozen=True, slots=True)
class Model:
    thinking: Thinking
    output_max_tokens: int = 128_000
    context_max_tokens: int = 1_000_000
    effort: bool = True
    prefill: bool = False  # an assistant's turn as the last message


_OF_4_5 = Model(Thinking.BUDGET, 64_000, 200_000, effort=False, prefill=True)
_OPUS_4_5 = Model(Thinking.BUDGET, 64_000, 200_000, prefill=True)

MODELS = {
    "claude-fable-5-2": Model(Thinking.ALWAYS),
    "claude-mythos-5-2": Model(Thinking.ALWAYS),
    "claude-opus-5-5": Model(Thinking.ALWAYS),
    "claude-sonnet-5-5": Model(Thinking.DEFAULT),
    "claude-haiku-5-5": Model(Thinking.DEFAULT),
    "claude-fable-5-1": Model(Thinking.ALWAYS),
    "claude-mythos-5-1": Model(Thinking.ALWAYS),
    "claude-fable-5": Model(Thinking.ALWAYS),
    "claude-mythos-5": Model(Thinking.ALWAYS),
    "claude-opus-5": Model(Thinking.DEFAULT),
    "claude-sonnet-5": Model(Thinking.DEFAULT),
    "claude-opus-4-8": Model(Thinking.ADAPTIVE),
    "claude-opus-4-7": Model(Thinking.ADAPTIVE),
    "claude-opus-4-6": Model(Thinking.BUDGET_OR_ADAPTIVE),
    "claude-sonnet-4-6": Model(Thinking.BUDGET_OR_ADAPTIVE, 64_000),
    "claude-opus-4-5": _OPUS_4_5,
    "claude-opus-4-5-20251101": _OPUS_4_5,
    "claude-sonnet-4-5": _OF_4_5,
    "claude-sonnet-4-5-20250929": _OF_4_5,
    "claude-haiku-4-5": _OF_4_5,
    "claude-haiku-4-5-20251001": _OF_4_5,
}
