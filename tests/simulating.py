"""What the simulator's tests share: requests, and a simulator with the real SDK's client for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import anthropic
import pytest

from app.simulator.server import Simulator

HEADERS = {"x-api-key": "sk-a", "anthropic-version": "2023-06-01"}
USER = [{"role": "user", "content": "Review this."}]
VERDICT = {
    "type": "object",
    "properties": {
        "verdict": {"enum": ["approved", "rejected"]},
        "confidence": {"type": "number", "description": "How sure.\n\n{minimum: 0.5, maximum: 1}"},
        "findings": {"type": "array", "items": {"$ref": "#/$defs/finding"}, "minItems": 1},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "at": {"type": "string", "format": "date-time"},
    },
    "required": ["verdict", "confidence", "findings", "note", "at"],
    "additionalProperties": False,
    "$defs": {
        "finding": {
            "type": "object",
            "properties": {"line": {"type": "integer"}, "kind": {"const": "bug"}},
            "required": ["line", "kind"],
            "additionalProperties": False,
        }
    },
}
ADD = {
    "name": "add",
    "description": "Adds.",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 3, "maximum": 5}, "b": {"type": "integer", "multipleOf": 7}},
        "required": ["a", "b"],
    },
}


def form(schema):
    return {"format": {"type": "json_schema", "schema": schema}}


def texts(message):
    return [block.text for block in message.content if block.type == "text"]


@dataclass
class Running:
    simulator: Simulator
    client: anthropic.Anthropic

    def ask(self, **changes):
        """One message by the SDK; what is not given is the simplest that is valid."""
        return self.client.messages.create(
            **{"model": "claude-opus-5-5", "max_tokens": 1000, "messages": USER, **changes}
        )


@contextmanager
def running() -> Iterator[Running]:
    with (
        Simulator(seed=7) as simulator,
        anthropic.Anthropic(api_key="sk-test", base_url=simulator.url, max_retries=0) as client,
    ):
        yield Running(simulator, client)


def refused(ask, **changes):
    """The message of the 400 that a request gets."""
    with pytest.raises(anthropic.BadRequestError) as caught:
        ask(**changes)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id.startswith("req_")
    return caught.value.api_message
