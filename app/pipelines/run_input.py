"""Whether a run can begin with an input: asked at its start, and by the first agents for what plain SQL enqueued."""

import json
import math
from typing import TYPE_CHECKING

from app.errors import Misuse

if TYPE_CHECKING:
    from app.pipelines.model import Json

_PROBLEMS_MAX = 5


def check_input(run_input: object, max_bytes: int, schema: "Json | None") -> None:
    """Raises Misuse, in one sentence, for an input that Postgres or the pipeline would refuse."""
    if not isinstance(run_input, dict):
        raise Misuse("The input must be a JSON object.")
    try:
        # First, since it finds what contains itself, which the walk below would follow for ever.
        size = len(json.dumps(run_input, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise Misuse("The input contains itself, or is nested too deeply.") from error
    except TypeError:
        size = 0  # the walk names the place
    _check_values(run_input, "input")
    if size > max_bytes:
        raise Misuse(
            f"The input has {size:,} bytes; at most {max_bytes:,} are taken.",
            next_step="Pass a path or an address of the data, or raise STEPFAST_INPUT_MAX_BYTES.",
        )
    if schema is not None:
        from jsonschema import Draft202012Validator

        found = sorted(
            Draft202012Validator(schema).iter_errors(run_input), key=lambda error: list(map(str, error.path))
        )
        if found:
            said = "; ".join(
                f"{error.json_path.replace('$', 'input', 1)}: {error.message}" for error in found[:_PROBLEMS_MAX]
            )
            raise Misuse(f"The input does not fit the pipeline's input_schema: {said[:2000]}")


def _check_values(root: object, name: str) -> None:  # noqa: C901  # one branch a kind of value
    """Postgres takes no NUL, no lone surrogate and no NaN in JSON. Iterative: an input may be nested deeply."""
    waiting: list[tuple[str, object]] = [(name, root)]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, str):
            if "\x00" in value:
                raise Misuse(f"{place} holds a NUL byte.", next_step="Remove it, or encode the data as base64.")
            if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise Misuse(f"{place} holds a lone surrogate, which is no text.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise Misuse(f"{place} is {value}, which is no JSON.")
        elif isinstance(value, dict):
            for key, entry in value.items():
                if not isinstance(key, str):
                    raise Misuse(f"{place} has the key {key!r}, which is no text.")
                waiting += [(f"{place}, a key", key), (f"{place}.{key}", entry)]
        elif isinstance(value, list | tuple):
            waiting += [(f"{place}[{number}]", entry) for number, entry in enumerate(value)]
        elif value is not None and not isinstance(value, bool | int | float):
            raise Misuse(f"{place} is a {type(value).__name__}, which is no JSON.")
