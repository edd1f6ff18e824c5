"""What is printed: redacted, without control characters, as aligned text or as one JSON document.

Rich is given `Text`, never markup: an agent's output that looks like markup is shown as it is.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from app.redaction import redact
from app.words import clean, cut, dollars, duration, moment, one_line, seconds, short, took

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# `output.moment` is how commands call it.
__all__ = ["clean", "console", "cut", "dollars", "duration", "moment", "one_line", "print_fields", "print_json"]
__all__ += ["print_next", "seconds", "short", "table", "took"]

PIPED_WIDTH_CHARS = 1_000
_STYLES = {
    "completed": "green",
    "failed": "red",
    "discarded": "red",
    "cancelled": "red",
    "executing": "cyan",
    "running": "cyan",
    "retryable": "yellow",
    "suspended": "yellow",
}


def print_json(value: object) -> None:
    """One document, in ASCII, so that no control character reaches a terminal."""
    print(json.dumps(redact(value), indent=2))


def print_fields(fields: Mapping[str, str]) -> None:
    """A line a field, aligned."""
    width = max(map(len, fields))
    for name, value in fields.items():
        print(f"{name:<{width}}  {one_line(value)}")


def print_next(command: str, file: TextIO | None = None) -> None:
    """The one command to type next; `stepfast` is written as it is typed here."""
    from app.cli.local import program

    print(clean(f"Next: {program()}{command.removeprefix('stepfast')}"), file=file)


def console() -> "Console":
    """For people. A pipe gets each row as one line, whatever its length."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPED_WIDTH_CHARS
    return Console(file=sys.stdout, width=width, markup=False, highlight=False, emoji=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[str] = ()) -> "Table":
    """A plain table. The columns in `right` are numbers; one named `state` is coloured by its value."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(_cell(value, name) for name, value in zip(columns, row, strict=True)))
    return made


def _cell(value: str, column: str) -> "Text":
    from rich.text import Text

    style = _STYLES.get(value.partition(" ")[0], "") if column == "state" and value else ""
    return Text(one_line(value), style=style)
