"""The Claude simulator refuses what the real API refuses, by name, and accepts what it accepts."""

import json
from typing import get_args

import anthropic
import httpx2
import pytest
import simulating
from anthropic.types.model import Model
from simulating import ADD, HEADERS, USER, form, refused

from app.simulator.catalogue import MODELS
from app.simulator.schemas import unsupported
from app.simulator.script import parse


@pytest.fixture(scope="module")
def running():
    with simulating.running() as pair:
        yield pair


@pytest.fixture
def simulator(running):
    running.simulator.use(parse({}))
    return running.simulator


@pytest.fixture
def ask(running, simulator):
    return running.ask


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"extra_body": {"reply_style": "terse"}}, "reply_style: Extra inputs are not permitted"),
        ({"extra_body": {"temperature": 0}}, "temperature: Extra inputs"),
        ({"extra_body": {"top_p": 1}}, "top_p: Extra inputs"),
        ({"extra_body": {"top_k": 1}}, "top_k: Extra inputs"),
        ({"extra_body": {"workspace_id": "w"}}, "workspace_id: Extra inputs"),
        ({"extra_body": {"max_tokens": "5"}}, "max_tokens: Input should be a valid integer"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name: Extra inputs"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]},
            "messages.0.content.0.text.y: Extra",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "txt", "text": "x"}]}]}, "Input tag 'txt'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "Input tag 'robot'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input should be a valid list"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 'first message must use the "user" role'),
        ({"messages": [*USER, {"role": "assistant", "content": "{"}]}, "does not support assistant message prefill"),
        ({"messages": [{"role": "user", "content": ""}]}, "non-empty content"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}]}]}, "must be non-empty"),
        (
            {"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "scope": 1}}]},
            "system.0.cache_control.scope",
        ),
        ({"tools": [{**ADD, "run": "x"}]}, "tools.0.custom.run: Extra inputs"),
        ({"tools": [ADD, ADD]}, "Tool names must be unique"),
        ({"tools": [{"name": "a", "input_schema": {"type": "array"}}]}, "Input should be 'object'"),
        ({"tools": [{"name": "a", "input_schema": {"type": "object", "required": "x"}}]}, "JSON schema is invalid"),
        ({"tools": [{**ADD, "strict": True}]}, "For 'object' type, 'additionalProperties'"),
        ({"tools": [ADD], "tool_choice": {"type": "any"}}, "Thinking may not be enabled"),
        (
            {"tools": [ADD], "model": "claude-haiku-5-5", "tool_choice": {"type": "tool", "name": "sub"}},
            "Tool 'sub' not found",
        ),
        ({"output_config": {"effort": "huge"}}, "output_config.effort"),
        ({"output_config": {"effort": "low"}, "model": "claude-haiku-4-5"}, "effort parameter"),
        ({"thinking": {"type": "disabled"}}, '"thinking.type.disabled" is not supported'),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, '"thinking.type.enabled" is not supported'),
        ({"max_tokens": 128_001, "timeout": 60}, "128001 > 128000"),
        ({"stop_sequences": [" "]}, "non-whitespace"),
    ],
)
def test_what_the_api_refuses_is_refused_by_name(ask, changes, named):
    """A request with an invented, missing, misplaced or unsupported part is a 400 that names it."""
    assert named in refused(ask, **changes)


def test_what_the_api_accepts_is_accepted(ask):
    """Two turns of one role, images, cached and forced tools, and older models' budgets and prefill pass."""
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    ask(messages=[*USER, {"role": "user", "content": [image, {"type": "text", "text": "x"}]}])
    ask(model="claude-haiku-5-5", tools=[{**ADD, "cache_control": {"type": "ephemeral"}}], tool_choice={"type": "any"})
    ask(model="claude-haiku-4-5", max_tokens=5000, thinking={"type": "enabled", "budget_tokens": 1024})
    ask(model="claude-haiku-4-5", messages=[*USER, {"role": "assistant", "content": "Well,"}])
    ask(metadata={"user_id": "u"}, service_tier="auto", thinking={"type": "adaptive", "display": "summarized"})


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "object", "properties": {}}, "'additionalProperties' must be explicitly set to false"),
        ({"type": "integer", "minimum": 1}, "For 'integer' type, property 'minimum' is not supported"),
        ({"type": "string", "maxLength": 1}, "property 'maxLength'"),
        ({"type": "string", "format": "phone"}, "format 'phone'"),
        ({"type": "string", "pattern": "(?=x)"}, "look-around"),
        ({"type": "array", "items": {"type": "string"}, "minItems": 2}, "'minItems'"),
        ({"type": "array", "items": {"type": "string"}, "maxItems": 2}, "property 'maxItems'"),
        ({"oneOf": [{"type": "string"}]}, "oneOf"),
        ({"enum": [{"a": 1}]}, "'enum'"),
        ({"$ref": "https://example.com/x"}, "must name a definition"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}}, "Recursive"),
        (
            {
                "type": "object",
                "properties": {f"p{n}": {"type": "string"} for n in range(25)},
                "additionalProperties": False,
            },
            "optional parameters",
        ),
        ({"type": "array", "items": {}}, "type is required"),
        ({"type": "object", "properties": [], "additionalProperties": False}, "JSON schema is invalid"),
    ],
)
def test_schemas_outside_the_supported_subset_are_refused(ask, schema, named):
    """Structured outputs take the API's subset of JSON Schema, and what is outside it is named."""
    message = refused(ask, output_config=form(schema))
    assert message.startswith("output_config.format.schema: ")
    assert named in message


def test_what_the_sdk_makes_of_any_schema_is_supported():
    """The SDK's own transformation lands inside the subset."""
    rich = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 1}, "o": {"oneOf": [{"type": "string", "minLength": 3}]}},
    }
    assert unsupported(anthropic.transform_schema(rich)) is None


@pytest.mark.parametrize("model", ["claude-3-5-sonnet", "claude-3-opus", "claude-3-5-sonnet-20241022", "gpt-5"])
def test_unknown_and_retired_models_are_not_found(ask, model):
    """A model that the API does not serve is a 404 that names it."""
    with pytest.raises(anthropic.NotFoundError, match=model):
        ask(model=model)


def test_keys_and_versions_are_required(simulator):
    """No key, a key of another shape and no version are refused; either header carries a key."""
    body = {"model": "claude-opus-5-5", "max_tokens": 100, "messages": USER}
    version = {"anthropic-version": "2023-06-01"}
    for headers, status in [
        (version, 401),
        ({**version, "x-api-key": "wrong"}, 401),
        ({"x-api-key": "sk-a"}, 400),
        ({"x-api-key": "sk-a", "anthropic-version": "latest"}, 400),
        ({**version, "x-api-key": "sk-a"}, 200),
        ({**version, "authorization": "Bearer sk-a"}, 200),
    ]:
        assert httpx2.post(f"{simulator.url}/v1/messages", json=body, headers=headers).status_code == status
    assert "sk-a" not in json.dumps(httpx2.get(f"{simulator.url}/_simulator/requests").json())


def test_bodies_that_are_no_json_or_too_long_are_refused(simulator):
    """Broken JSON, NaN and lone surrogates are a 400; more than 32 MB is a 413; an unknown path is a 404."""
    for content in (b"", b"{", b"[]", b'{"max_tokens": NaN}', b'{"model": "\\ud800"}', b"\xff"):
        assert httpx2.post(f"{simulator.url}/v1/messages", content=content, headers=HEADERS).status_code == 400
    long = httpx2.post(f"{simulator.url}/v1/messages", content=b" " * (32 * 1024 * 1024 + 1), headers=HEADERS)
    assert (long.status_code, long.json()["error"]["type"]) == (413, "request_too_large")
    assert httpx2.post(f"{simulator.url}/v1/complete", headers=HEADERS).json()["error"]["type"] == "not_found_error"


def test_the_models_are_those_of_the_sdk(running):
    """The catalogue holds every model that the SDK lists and that is not retired."""
    named = set(get_args(get_args(Model)[0])) - {"claude-mythos-preview"}
    assert named == set(MODELS) == {model.id for model in running.client.models.list()}
