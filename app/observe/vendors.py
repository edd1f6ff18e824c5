"""The attributes by which each provider shows a span: its kind, what went in and came out, tokens and cost.

Langfuse reads `langfuse.*` first. LangSmith reads `langsmith.*` and the older `gen_ai.prompt` and `gen_ai.completion`.
Any other backend gets OpenTelemetry's own conventions for generative AI, and `input.value` and `output.value`, which
most know. Only the span of a model's call carries tokens and cost by these names: each generation is counted once.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

Attribute = str | bool | int | float | Sequence[str]
Attributes = dict[str, Attribute]


class Kind(StrEnum):
    RUN = "run"
    STEP = "step"
    ATTEMPT = "attempt"
    GATE = "gate"
    HANDLER = "handler"
    COMMIT = "commit"


_LANGFUSE = {Kind.RUN: "chain", Kind.ATTEMPT: "agent", Kind.GATE: "guardrail", Kind.HANDLER: "tool"}


@dataclass(frozen=True, slots=True)
class Call:
    """What is told of a model's call beside what the SDK's span has. Texts are None where the file does not show them.

    `usage` and `cost_usd` are those of `Answer`; `system` and `user` the messages, `output` the answer's JSON.
    """

    system: str | None = None
    user: str | None = None
    output: object = None
    stop_reason: str | None = None
    usage: Mapping[str, int] | None = None
    cost_usd: float | None = None


def of_span(provider: str, kind: Kind, trace_name: str, shown_in: object, shown_out: object) -> Attributes:
    """Of a span of ours. `shown_in` and `shown_out` are JSON values, redacted and cut; None shows nothing."""
    values = {"input": shown_in, "output": shown_out}
    shown: Attributes = {name: as_text(value) for name, value in values.items() if value is not None}
    match provider:
        case "langfuse":
            found: Attributes = {f"langfuse.observation.{name}": text for name, text in shown.items()}
            if kind is Kind.RUN:
                found |= {f"langfuse.trace.{name}": text for name, text in shown.items()}
            found |= {"langfuse.observation.type": _LANGFUSE.get(kind, "span"), "langfuse.trace.name": trace_name}
        case "langsmith":
            names = {"input": "gen_ai.prompt", "output": "gen_ai.completion"}
            found = {names[name]: text for name, text in shown.items()}
            found["langsmith.span.kind"] = "tool" if kind is Kind.HANDLER else "chain"
        case _:
            found = {f"{name}.value": text for name, text in shown.items()}
    return found


def of_call(provider: str, trace_name: str, call: Call) -> Attributes:
    """Of the SDK's span of a model's call."""
    found: Attributes = {}
    if call.stop_reason:
        found["gen_ai.response.finish_reasons"] = [call.stop_reason]
    messages = [
        {"role": role, "content": text} for role, text in (("system", call.system), ("user", call.user)) if text
    ]
    answer = None if call.output is None else as_text(call.output)
    match provider:
        case "langfuse":
            found |= _of_langfuse(messages, answer, call) | {"langfuse.trace.name": trace_name}
        case "langsmith":
            found |= _of_langsmith(messages, answer, call)
        case _:
            found |= _of_genai(call, answer)
    return found


def _of_langfuse(messages: list[dict[str, str]], answer: str | None, call: Call) -> Attributes:
    found: Attributes = {"langfuse.observation.type": "generation"}
    if messages:
        found["langfuse.observation.input"] = as_text(messages)
    if answer is not None:
        found["langfuse.observation.output"] = answer
    if call.usage:
        # Langfuse adds up whatever begins with "input", so what went through the cache is taken out of it.
        read, created = call.usage["cache_read_tokens"], call.usage["cache_creation_tokens"]
        details = {
            "input": call.usage["input_tokens"] - read - created,
            "input_cached_tokens": read,
            "input_cache_creation": created,
            "output": call.usage["output_tokens"],
            "total": call.usage["input_tokens"] + call.usage["output_tokens"],
        }
        found["langfuse.observation.usage_details"] = json.dumps(details)
    if call.cost_usd is not None:
        found["langfuse.observation.cost_details"] = json.dumps({"total": call.cost_usd})
    return found


def _of_langsmith(messages: list[dict[str, str]], answer: str | None, call: Call) -> Attributes:
    found: Attributes = {"langsmith.span.kind": "llm", "gen_ai.system": "anthropic"}
    for number, message in enumerate(messages):
        found |= {f"gen_ai.prompt.{number}.{name}": text for name, text in message.items()}
    if answer is not None:
        found |= {"gen_ai.completion.0.role": "assistant", "gen_ai.completion.0.content": answer}
    if call.usage:
        told: dict[str, object] = {
            "input_tokens": call.usage["input_tokens"],
            "output_tokens": call.usage["output_tokens"],
            "total_tokens": call.usage["input_tokens"] + call.usage["output_tokens"],
            "input_token_details": {
                "cache_read": call.usage["cache_read_tokens"],
                "cache_creation": call.usage["cache_creation_tokens"],
            },
            "output_token_details": {"reasoning": call.usage["thinking_tokens"]},
        }
        if call.cost_usd is not None:
            told["total_cost"] = call.cost_usd
        found["langsmith.usage_metadata"] = json.dumps(told)
    return found


def _of_genai(call: Call, answer: str | None) -> Attributes:
    found: Attributes = {}
    if call.system:
        found["gen_ai.system_instructions"] = as_text([_part(call.system)])
    if call.user:
        found["gen_ai.input.messages"] = as_text([{"role": "user", "parts": [_part(call.user)]}])
    if answer is not None:
        said: dict[str, object] = {"role": "assistant", "parts": [_part(answer)]}
        found["gen_ai.output.messages"] = as_text([said | {"finish_reason": call.stop_reason or "unknown"}])
    if call.cost_usd is not None:
        found["gen_ai.usage.cost"] = call.cost_usd
    return found


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "content": text}


def as_text(value: object) -> str:
    """A text as it is; what else, as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
