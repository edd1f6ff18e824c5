"""What a request must be for the real API to accept it; anything else is an `ApiError` in the API's own shape.

The shape comes from the SDK's own parameter types, made strict. Three of their traits would let faults through: an
`Iterable` is validated only when it is read, response objects (which allow any key) stand among the content blocks, and
a union accepts what any of its members does. `_tightened` removes them. What types cannot say is checked below, with
the rule that each check mirrors.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import SchemaValidator, core_schema, from_json

from app.simulator.answers import count_input_tokens, signature
from app.simulator.catalogue import MODELS, Model, Thinking
from app.simulator.schemas import unsupported
from app.simulator.script import ERROR_TYPES

Body = dict[str, Any]

BODY_MAX_BYTES = 32 * 1024 * 1024  # the Messages and Token Counting APIs' limit (docs/en/api/errors)
MESSAGES_MAX = 100_000  # the SDK's docstring of `messages`
BREAKPOINTS_MAX = 4  # docs/en/build-with-claude/prompt-caching
BUDGET_MIN_TOKENS = 1_024  # the SDK's docstring of `thinking`
STRICT_TOOLS_MAX = 20  # docs/en/build-with-claude/structured-outputs

# The SDK sends these two as headers, though its types list them with the body.
_HEADERS_IN_TYPES = ("user_profile_id", "workspace_id")


class ApiError(Exception):
    """An error answer: `{"type": "error", "error": {"type", "message", "details"?}, "request_id"}`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type_: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        self.error: dict[str, Any] = {"type": type_ or ERROR_TYPES[status], "message": message}
        if code:
            self.error["details"] = {"error_code": code}


def warm_up() -> None:
    """Loads the SDK's types (1 s) and jsonschema, so that the first request need not wait for them."""
    _validators()
    _invalid({})


def parse(content: bytes) -> Body:
    """The body's JSON. NaN and lone surrogates are not JSON, here as there."""
    try:
        body = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The request body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "The request body must be a JSON object")
    return body


def authenticate(headers: dict[str, str]) -> None:
    """Every call needs a key and a version. Any key that begins with `sk-` is good; a script can revoke one (401)."""
    key = headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")
    if not key:
        raise ApiError(401, "x-api-key header is required")
    if not key.startswith("sk-"):
        raise ApiError(401, "invalid x-api-key")
    version = headers.get("anthropic-version")
    if not version:
        raise ApiError(400, "anthropic-version: header is required")
    if not re.fullmatch(r"20\d\d-\d\d-\d\d", version):
        raise ApiError(400, f'anthropic-version: "{version}" is not a valid version')


def check_message(body: Body) -> None:
    """Raises ApiError unless `POST /v1/messages` would accept the body."""
    create, stream = _validators()[:2]
    _validate(stream if body.get("stream") is True else create, body)
    model = _check_common(body)
    most = model.output_max_tokens
    if body["max_tokens"] < 0:
        raise ApiError(400, "max_tokens: Input should be greater than or equal to 0")
    if body["max_tokens"] > most:
        raise ApiError(
            400,
            f"max_tokens: {body['max_tokens']} > {most}, which is the maximum allowed number of output tokens for "
            f"{body['model']}",
        )
    thinking = body.get("thinking") or {}
    if thinking.get("budget_tokens", 0) >= body["max_tokens"] > 0:
        raise ApiError(400, "`max_tokens` must be greater than `thinking.budget_tokens`")
    for sequence in body.get("stop_sequences") or ():
        if not sequence.strip():
            raise ApiError(400, "stop_sequences: each stop sequence must contain non-whitespace")


def check_count(body: Body) -> None:
    """Raises ApiError unless `POST /v1/messages/count_tokens` would accept the body."""
    _validate(_validators()[2], body)
    _check_common(body)


def _check_common(body: Body) -> Model:
    model = MODELS.get(body["model"])
    if model is None:
        raise ApiError(404, f"model: {body['model']}")
    _check_turns(body, model)
    _check_tools(body, model)
    _check_thinking(body, model)
    _check_schemas(body)
    if sum(block.get("cache_control") is not None for block in _cacheable(body)) > BREAKPOINTS_MAX:
        raise ApiError(400, f"A maximum of {BREAKPOINTS_MAX} blocks with cache_control may be provided")
    if (tokens := count_input_tokens(body)) > model.context_max_tokens:
        raise ApiError(400, f"prompt is too long: {tokens} tokens > {model.context_max_tokens} maximum")
    return model


def _check_turns(body: Body, model: Model) -> None:
    """docs/en/api/messages: the first turn is the user's. Two turns of one role in a row count as one."""
    messages = body["messages"]
    if not messages:
        raise ApiError(400, "messages: at least one message is required")
    if len(messages) > MESSAGES_MAX:
        raise ApiError(400, f"messages: at most {MESSAGES_MAX} messages are allowed")
    if messages[0]["role"] != "user":
        raise ApiError(400, 'messages: first message must use the "user" role')
    if messages[-1]["role"] == "assistant" and (not model.prefill or (body.get("output_config") or {}).get("format")):
        raise ApiError(
            400,
            "This model does not support assistant message prefill. The conversation must end with a user message.",
        )
    for index, message in enumerate(messages):
        if not message["content"] and not (index == len(messages) - 1 and message["role"] == "assistant"):
            raise ApiError(
                400,
                f"messages.{index}: all messages must have non-empty content except for the optional final assistant "
                "message",
            )
    system = body.get("system")
    for name, blocks in [("system", system), *(("messages", message["content"]) for message in messages)]:
        if isinstance(blocks, list) and any(block.get("text") == "" for block in blocks if block["type"] == "text"):
            raise ApiError(400, f"{name}: text content blocks must be non-empty")
    _check_tool_turns(messages)


def _check_tool_turns(messages: list[Body]) -> None:
    """docs/en/agents-and-tools/tool-use: each `tool_use` is answered, by a `tool_result`, in the very next turn."""
    waiting: set[str] = set()
    for index, message in enumerate(messages):
        blocks = message["content"] if isinstance(message["content"], list) else []
        results = {block["tool_use_id"] for block in blocks if block["type"] == "tool_result"}
        if strangers := results - waiting:
            raise ApiError(
                400,
                f"messages.{index}.content: unexpected `tool_use_id` found in `tool_result` blocks: "
                f"{', '.join(sorted(strangers))}. Each `tool_result` block must have a corresponding `tool_use` block "
                "in the previous message.",
            )
        if missing := waiting - results:
            raise ApiError(
                400,
                f"messages.{index - 1}: `tool_use` ids were found without `tool_result` blocks immediately after: "
                f"{', '.join(sorted(missing))}.",
            )
        waiting = {block["id"] for block in blocks if block["type"] == "tool_use"}


def _check_tools(body: Body, model: Model) -> None:
    """docs/en/agents-and-tools/tool-use: names, and the choice among them."""
    names = [tool["name"] for tool in body.get("tools") or () if "name" in tool]
    for index, name in enumerate(names):
        if not re.fullmatch(r"[a-zA-Z0-9_-]{1,128}", name):
            raise ApiError(400, f"tools.{index}.custom.name: String should match pattern '^[a-zA-Z0-9_-]{{1,128}}$'")
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: Tool names must be unique.")
    choice = body.get("tool_choice")
    if choice is None:
        return
    if not body.get("tools"):
        raise ApiError(400, "tool_choice: may only be specified while providing tools")
    if choice["type"] == "tool" and choice["name"] not in names:
        raise ApiError(400, f"tool_choice.name: Tool '{choice['name']}' not found in provided tools")
    # docs/en/models/opus-5-5/whats-new-opus-5-5, "Forced tool use is not supported"; budgets never allowed it.
    thinks = model.thinking is Thinking.ALWAYS or (body.get("thinking") or {}).get("type") == "enabled"
    if choice["type"] in ("any", "tool") and thinks:
        raise ApiError(400, "Thinking may not be enabled when tool_choice forces tool use.")


def _check_thinking(body: Body, model: Model) -> None:
    """docs/en/build-with-claude/thinking and each model's "what's new" page: which type a model takes."""
    thinking = body.get("thinking") or {}
    effort = (body.get("output_config") or {}).get("effort")
    if effort and not model.effort:
        raise ApiError(400, "This model does not support the effort parameter.")
    kind = thinking.get("type")
    refused = {
        Thinking.BUDGET: {"adaptive"},
        Thinking.BUDGET_OR_ADAPTIVE: set(),
        Thinking.ADAPTIVE: {"enabled"},
        Thinking.DEFAULT: {"enabled"},
        Thinking.ALWAYS: {"enabled", "disabled"},
    }[model.thinking]
    # Which models take `between_tools` is not known here; what we do not know is refused.
    if kind in refused | {"between_tools"}:
        raise ApiError(400, f'"thinking.type.{kind}" is not supported for this model.')
    # docs/en/about-claude/models/migration-guide: rejected on Opus 5; assumed for its whole generation.
    if kind == "disabled" and model.thinking is Thinking.DEFAULT and effort in ("xhigh", "max"):
        raise ApiError(400, f'"thinking.type.disabled" is not supported with effort "{effort}".')
    if kind == "enabled" and thinking["budget_tokens"] < BUDGET_MIN_TOKENS:
        raise ApiError(
            400, f"thinking.enabled.budget_tokens: Input should be greater than or equal to {BUDGET_MIN_TOKENS}"
        )
    # The SDK's docstring of `signature`: a modified block is a 400, and so is another model's.
    for place, block in _message_blocks(body):
        if block["type"] == "thinking" and block["signature"] != signature(body["model"], block["thinking"]):
            raise ApiError(400, f"{place}: Invalid `signature` in `thinking` block")


def _check_schemas(body: Body) -> None:
    """docs/en/build-with-claude/structured-outputs: schemas that become a grammar have to be in the subset.

    docs/en/agents-and-tools/tool-use: every tool's schema is a valid one, of an object.
    """
    form = (body.get("output_config") or {}).get("format")
    if form and (fault := _invalid(form["schema"]) or unsupported(form["schema"])):
        raise ApiError(400, f"output_config.format.schema: {fault}")
    strict = [tool for tool in body.get("tools") or () if tool.get("strict")]
    if len(strict) > STRICT_TOOLS_MAX:
        raise ApiError(400, f"Too many strict tools ({len(strict)}; limit: {STRICT_TOOLS_MAX})")
    for index, tool in enumerate(body.get("tools") or ()):
        schema = tool.get("input_schema")
        if schema is None:
            continue
        if schema.get("type") != "object":
            raise ApiError(400, f"tools.{index}.custom.input_schema.type: Input should be 'object'")
        if fault := _invalid(schema) or (unsupported(schema) if tool.get("strict") else None):
            raise ApiError(400, f"tools.{index}.custom.input_schema: {fault}")


def _invalid(schema: Body) -> str | None:
    from jsonschema import Draft202012Validator, SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        return f"JSON schema is invalid. It must match JSON Schema draft 2020-12: {error.message}"
    return None


def _message_blocks(body: Body) -> Iterator[tuple[str, Body]]:
    for index, message in enumerate(body["messages"]):
        if isinstance(message["content"], list):
            for number, block in enumerate(message["content"]):
                yield f"messages.{index}.content.{number}", block


def _cacheable(body: Body) -> Iterator[Body]:
    yield {"cache_control": body.get("cache_control")}
    yield from body.get("tools") or ()
    yield from body["system"] if isinstance(body.get("system"), list) else ()
    yield from (block for _, block in _message_blocks(body))


def _validate(validator: SchemaValidator, body: Body) -> None:
    try:
        validator.validate_python(body, strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        told = "; ".join(f"{_place(fault['loc'])}: {fault['msg']}" for fault in faults[:5])
        raise ApiError(400, told.replace(_BRANCH, "")) from None


def _place(loc: tuple[int | str, ...]) -> str:
    """The path as the API writes it: with the type of a block, without the branches of our unions."""
    return ".".join(str(part) for part in loc if not str(part).startswith(_BRANCH))


_BRANCH = "\N{PILCROW SIGN}"  # begins the tags of unions that the real API does not name in its paths


@cache
def _validators() -> tuple[SchemaValidator, SchemaValidator, SchemaValidator]:
    """For a message, a streamed message, and a count of tokens."""
    from anthropic.types.message_count_tokens_params import MessageCountTokensParams
    from anthropic.types.message_create_params import MessageCreateParams

    either = MessageCreateParams | MessageCountTokensParams  # a union, so that `config` reaches every type inside
    schema = TypeAdapter(either, config=ConfigDict(extra="forbid")).core_schema
    assert schema["type"] == "definitions"
    known: dict[str, Any] = {definition["ref"]: definition for definition in schema["definitions"]}
    definitions = [_tightened(definition, known) for definition in schema["definitions"]]
    choices = [_tightened(choice, known) for choice in schema["schema"]["choices"]]
    assert len(choices) == 3
    for choice in choices:
        for name in _HEADERS_IN_TYPES:
            choice["fields"].pop(name, None)
    create, stream, count = (SchemaValidator(core_schema.definitions_schema(choice, definitions)) for choice in choices)
    return create, stream, count


def _tightened(node: Any, known: dict[str, Any]) -> Any:  # noqa: ANN401  # pydantic's core schemas are nested JSON
    """A copy of a core schema that validates at once, forbids unknown keys, and tells the members of unions apart."""
    if isinstance(node, list):
        return [_tightened(part, known) for part in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") == "union":
        return _tagged(
            {**node, "choices": [choice for choice in node["choices"] if not _is_response(choice, known)]}, known
        )
    node = {key: _tightened(value, known) for key, value in node.items()}
    if node.get("type") == "generator":
        return core_schema.list_schema(node["items_schema"])
    if node.get("type") == "typed-dict" and node.get("extra_behavior") != "allow":
        node["extra_behavior"] = "forbid"
    return node


def _is_response(choice: Any, known: dict[str, Any]) -> bool:  # noqa: ANN401
    """Whether a union's member is one of the SDK's response objects, or a union of them."""
    choice = _resolved(choice, known)
    inner = choice.get("choices") if choice["type"] == "union" else None
    return all(_is_response(one, known) for one in inner) if inner else bool(choice["type"] == "model")


def _tagged(union: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """A union as pydantic's tagged union, by `type` or `role`, or by being text or a list; else the union itself."""
    choices = {_tag(choice, known): _tightened(choice, known) for choice in union["choices"]}
    if None in choices or len(choices) < len(union["choices"]):
        return {**union, "choices": _tightened(union["choices"], known)}
    return {"type": "tagged-union", "choices": choices, "discriminator": _tag_of_value(set(choices))}


def _tag(choice: Any, known: dict[str, Any]) -> str | None:  # noqa: ANN401
    choice = _resolved(choice, known)
    if choice["type"] in ("str", "generator"):
        return f"{_BRANCH}{choice['type']}"
    for key, prefix in (("type", ""), ("role", _BRANCH)):
        field = choice.get("fields", {}).get(key, {}).get("schema", {})
        literal: dict[str, Any] = field.get("schema", field)  # the type of a client's tool may be null
        if literal.get("type") == "literal":
            return prefix + str(literal["expected"][0])
    return None


def _tag_of_value(tags: set[str | None]) -> Callable[[Any], str | None] | str:
    if not any(str(tag).startswith(_BRANCH) for tag in tags) and "custom" not in tags:
        return "type"

    def kind(value: Any) -> str | None:  # noqa: ANN401
        if not isinstance(value, dict):
            return _BRANCH + ("str" if isinstance(value, str) else "generator")
        return _BRANCH + str(value["role"]) if "role" in value else str(value.get("type") or "custom")

    return kind


def _resolved(choice: Any, known: dict[str, Any]) -> Any:  # noqa: ANN401
    return known[choice["schema_ref"]] if choice["type"] == "definition-ref" else choice
