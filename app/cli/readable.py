"""Data as a person reads it, in a terminal: see `words.lines`."""

from typing import TYPE_CHECKING

from app import words
from app.cli import output

if TYPE_CHECKING:
    from app.pipelines.model import Json

LINE_MAX_CHARS = 2_000
LINES_MAX = 2_000


def print_value(title: str, value: "Json") -> int:
    """Prints an object below its title. Returns how many of its lines were left out: those after LINES_MAX."""
    from rich.text import Text

    console = output.console()
    print()
    console.print(Text(output.one_line(title), style="bold"))
    left_out = 0
    for number, (line, style) in enumerate(words.lines("", value)):
        if number >= LINES_MAX:
            left_out += 1
            continue
        # A line end that an agent wrote into a short text or a name begins no line of ours.
        shown = output.cut(output.clean(line).replace("\n", "\\n"), LINE_MAX_CHARS)
        console.print(Text(f"  {shown}", style=style), soft_wrap=True)
    if left_out:
        print(f"  ... {left_out:,} more lines")
    return left_out
