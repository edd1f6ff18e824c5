"""Data as a person reads it: a diff as a coloured diff, text as text, small values as lines of `name: value`."""

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from app.cli import output

if TYPE_CHECKING:
    from app.pipelines.model import Json

SHORT_MAX_CHARS = 100
LINE_MAX_CHARS = 2_000
LINES_MAX = 2_000

_DIFF = re.compile(r"^(diff --git |@@ -\d|--- [^\n]*\n\+\+\+ )", re.MULTILINE)
_DIFF_STYLES = (
    (("diff ", "index ", "--- ", "+++ "), "bold"),
    (("@@",), "cyan"),
    (("+",), "green"),
    (("-",), "red"),
)

# A line, and its style.
Line = tuple[str, str]


def print_value(title: str, value: "Json") -> int:
    """Prints an object below its title. Returns how many of its lines were left out: those after LINES_MAX."""
    from rich.text import Text

    console = output.console()
    print()
    console.print(Text(output.one_line(title), style="bold"))
    left_out = 0
    for number, (line, style) in enumerate(_lines("", value)):
        if number >= LINES_MAX:
            left_out += 1
            continue
        shown = output.cut(output.clean(line), LINE_MAX_CHARS)
        console.print(Text(f"  {shown}", style=style), soft_wrap=True)
    if left_out:
        print(f"  ... {left_out:,} more lines")
    return left_out


def _lines(name: str, value: object) -> Iterator[Line]:
    match value:
        case str() if _DIFF.search(value):
            yield f"{name}:", ""
            for line in value.rstrip("\n").split("\n"):
                yield f"  {line}", _diff_style(line)
        case str() if "\n" in value or len(value) > SHORT_MAX_CHARS:
            yield f"{name}:", ""
            yield from ((f"  {line}", "") for line in value.rstrip("\n").split("\n"))
        case dict() if value:
            for key, entry in value.items():
                yield from _lines(f"{name}.{key}" if name else str(key), entry)
        case list() if any(isinstance(entry, dict | list) or len(str(entry)) > SHORT_MAX_CHARS for entry in value):
            for number, entry in enumerate(value):
                yield from _lines(f"{name}[{number}]", entry)
        case list():
            yield f"{name}: {', '.join(map(_scalar, value)) or 'none'}", ""
        case dict():
            yield f"{name}: nothing" if name else "nothing", ""
        case _:
            yield f"{name}: {_scalar(value)}", ""


def _scalar(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _diff_style(line: str) -> str:
    return next((style for starts, style in _DIFF_STYLES if line.startswith(starts)), "dim")
