"""What an output must be before it is recorded, whoever made it. Every refusal is an InvalidOutput."""

import json
import math
from typing import Any, NoReturn

from app.errors import InvalidOutput
from app.pipelines.model import Agent, Json, canonical_json
from app.pipelines.yaml_source import unstorable

PROBLEMS_MAX = 5
NESTING_MAX_LEVELS = 100
# Of a text that is no JSON, this much before and after the fault is told.
EXCERPT_CHARS = 100


def parse_output(text: str, agent: Agent) -> object:
    """The JSON that a model wrote."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - EXCERPT_CHARS) : error.pos + EXCERPT_CHARS]
        # What the schema declares sensitive can stand anywhere in a text that cannot be read.
        shown: dict[str, object] = {} if '"x-sensitive"' in canonical_json(agent.schema) else {"near": near}
        where = f"line {error.lineno}, column {error.colno}"
        raise InvalidOutput(f"The output of {agent.id} is no JSON: {error.msg} at {where}.", details=shown) from error
    except (ValueError, RecursionError) as error:
        raise InvalidOutput(f"The output of {agent.id} is no JSON that can be stored: {error}.") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def check_output(output: object, agent: Agent, max_bytes: int) -> Json:
    """The output, if it is a JSON object that Postgres can store, within the limit, and in the agent's schema.

    The error names the place and the rule, and never quotes the value.
    """
    checked = check_object(output, f"The output of {agent.id}", max_bytes, " (STEPFAST_OUTPUT_MAX_BYTES)")
    if agent.schema is not None:
        _check_schema(checked, agent.schema)
    return checked


def check_object(output: object, what: str, max_bytes: int, limit: str = "") -> Json:
    """The value, if it is a JSON object that Postgres can store, within the limit. `what` begins the error.

    `limit` names what sets the limit.
    """
    if not isinstance(output, dict):
        raise InvalidOutput(f"{what} must be an object, not {type(output).__name__}.")
    try:
        # This also finds what contains itself, which the walk below would follow for ever.
        size_bytes = len(json.dumps(output, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidOutput(f"{what} is no JSON: {error}.") from error
    if size_bytes > max_bytes:
        raise InvalidOutput(f"{what} has {size_bytes:,} bytes; at most {max_bytes:,} are taken{limit}.")
    _check_values(output)
    return output


def _check_values(root: object) -> None:
    """Iterative, since an output may be nested deeply."""
    waiting: list[tuple[str, object, int]] = [("output", root, 1)]
    while waiting:
        place, value, level = waiting.pop()
        if level > NESTING_MAX_LEVELS:
            raise InvalidOutput(f"{place} is nested deeper than {NESTING_MAX_LEVELS} levels.")
        match value:
            case str() if unstorable(value) is not None:
                raise InvalidOutput(f"{place} holds a NUL or a lone surrogate, which cannot be stored.")
            case float() if not math.isfinite(value):
                raise InvalidOutput(f"{place} is no finite number.")
            case dict():
                for key, entry in value.items():
                    if not isinstance(key, str) or unstorable(key) is not None:
                        raise InvalidOutput(f"{place} has a key that is no text, or holds a NUL or a lone surrogate.")
                    waiting.append((f"{place}.{key}"[:200], entry, level + 1))
            case list() | tuple():
                waiting += [(f"{place}[{number}]"[:200], entry, level + 1) for number, entry in enumerate(value)]


def _check_schema(output: Json, schema: Json) -> None:
    from jsonschema import Draft202012Validator

    problems: list[str] = []
    for error in Draft202012Validator(schema).iter_errors(output):
        problems.append(f"{error.json_path.replace('$', 'output', 1)[:200]} {_rule(error)}")
        if len(problems) == PROBLEMS_MAX:
            break
    if problems:
        raise InvalidOutput(f"The output does not fit its schema: {'; '.join(problems)}.")


def _rule(error: Any) -> str:  # noqa: ANN401  # jsonschema's ValidationError, imported lazily
    """The rule that is broken, in the schema's words. A message of jsonschema's own may quote the value."""
    if error.validator == "required":
        return str(error.message)[:200]
    return f"breaks {error.validator!r}: {json.dumps(error.validator_value)[:200]}"
