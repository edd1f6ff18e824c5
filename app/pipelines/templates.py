"""Templates: text with variables such as `{{input.issue}}` or `{{coder.confidence}}`.

A template is parsed once, into parts: `{"text": "…"}` and `{"path": ["coder", "confidence"]}`. A part's value never
becomes a template or code again. `{{task_id}}` is another name for `{{run_id}}`. There is no escape: `{{` always opens
a variable.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from app.errors import AuthorMistake
from app.pipelines.model import Json, canonical_json
from app.pipelines.report import nearest

Path = tuple[str, ...]

_VARIABLE = re.compile(r"\{\{\s*([A-Za-z_][\w-]*(?:\.[\w-]+)*)\s*\}\}", re.ASCII)


class BadText(ValueError):
    """A template or an expression that cannot be parsed. `offset` counts characters of its text from 0."""

    def __init__(self, offset: int, message: str) -> None:
        super().__init__(message)
        self.offset = offset


def variables(text: str) -> Iterator[tuple[int, int, Path]]:
    """Start, end and path of each variable. Raises BadText at a `{{` that begins none."""
    start = text.find("{{")
    while start >= 0:
        found = _VARIABLE.match(text, start)
        if not found:
            raise BadText(start, "'{{' begins no variable such as {{input.issue}} or {{agent.field}}.")
        path = tuple(found[1].split("."))
        yield start, found.end(), ("run_id",) if path == ("task_id",) else path
        start = text.find("{{", found.end())


def parse(text: str) -> tuple[Json, ...]:
    """The parts of a template. Raises BadText."""
    parts: list[Json] = []
    done = 0
    for start, end, path in variables(text):
        if start > done:
            parts.append({"text": text[done:start]})
        parts.append({"path": list(path)})
        done = end
    if done < len(text):
        parts.append({"text": text[done:]})
    return tuple(parts)


def paths(parts: Iterable[Json]) -> tuple[Path, ...]:
    """The variables among the parts."""
    return tuple(tuple(part["path"]) for part in parts if "path" in part)


def render(parts: Iterable[Json], context: Mapping[str, object]) -> str:
    """The text with its values: strings as they are, anything else as canonical JSON. Raises AuthorMistake.

    `context` is such as `{"run_id": "…", "agent": "coder", "input": {…}, "researcher": {…}}`.
    """
    return "".join(part["text"] if "text" in part else _shown(lookup(part["path"], context)) for part in parts)


def lookup(path: Sequence[str], context: Mapping[str, object]) -> object:
    """The value at a path. Raises AuthorMistake, naming the nearest field, where there is none."""
    value: object = context
    for depth, name in enumerate(path):
        if not isinstance(value, Mapping) or name not in value:
            known = [str(key) for key in value] if isinstance(value, Mapping) else []
            owner = ".".join(path[:depth]) or "the run"
            what = f"{owner} has no field {name!r}" if isinstance(value, Mapping) else f"{owner} is no object"
            raise AuthorMistake(
                f"{{{{{'.'.join(path)}}}}} has no value: {what}.{nearest(name, known)}",
                details={"variable": ".".join(path), "fields": known[:50]},
            )
        value = value[name]
    return value


def lookup_shown(path: Path, values: Mapping[str, object]) -> object:
    """What stands at a path of what may be shown, or in place of that in which it lies: the whole may be hidden.

    None where nothing does.
    """
    value: object = values
    for name in path:
        if not isinstance(value, Mapping):
            return value
        value = value.get(name)
    return value


def _shown(value: object) -> str:
    return value if isinstance(value, str) else canonical_json(value)
