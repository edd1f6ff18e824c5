"""How values are written for people, in a terminal and on a page: ids, times, durations, costs, and foreign text."""

import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from app.redaction import redact_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from app.redaction import Json

# Control characters, which command a terminal, and those that turn the direction of writing around.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
SHORT_ID_CHARS = 8
SHORT_MAX_CHARS = 100

_DIFF = re.compile(r"^(diff --git |@@ -\d|--- [^\n]*\n\+\+\+ )", re.MULTILINE)
_DIFF_STYLES = (
    (("diff ", "index ", "--- ", "+++ "), "bold"),
    (("@@",), "cyan"),
    (("+",), "green"),
    (("-",), "red"),
)


def clean(text: str) -> str:
    """The text, redacted, with its control characters as visible escapes."""
    return _CONTROL.sub(_visible, redact_text(text))


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def one_line(text: str) -> str:
    """`clean`, with every run of white space as one space: a table's cell, or a part of a sentence."""
    return " ".join(clean(text).split())


def cut(text: str, max_chars: int) -> str:
    """The text, or its beginning with a mark that it was longer."""
    return text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."


def short(run_id: str) -> str:
    """The beginning of an id, long enough to name it."""
    return run_id[:SHORT_ID_CHARS]


def seconds(value: float) -> str:
    """A duration: 0.4 s, 12.3 s, 4:07 min, 2:05:09 h."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(int(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def took(run: "Json") -> str:
    """`duration` as text."""
    spent = duration(run)
    return "-" if spent is None else seconds(spent)


def duration(entry: "Json") -> float | None:
    """Seconds from `started_at` to `ended_at`, or until now; None before the start."""
    if entry["started_at"] is None:
        return None
    end = datetime.fromisoformat(entry["ended_at"]) if entry["ended_at"] else datetime.now(UTC)
    return max(0.0, (end - datetime.fromisoformat(entry["started_at"])).total_seconds())


def dollars(value: float | None) -> str:
    """A cost in US dollars; a dash where there is none, or where it is unknown."""
    if value is None:
        return "-"
    return f"${value:,.2f}" if value >= 1 else f"${value:.4f}"


def moment(text: str | None) -> str:
    """A time of the read model, to the second, in UTC."""
    return f"{text[:10]} {text[11:19]}" if text else "-"


def lines(name: str, value: object) -> "Iterator[tuple[str, str]]":
    """A value as lines, each with its style: diffs coloured, text as text, small values as `name: value`."""
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
                yield from lines(f"{name}.{key}" if name else str(key), entry)
        case list() if any(isinstance(entry, dict | list) or len(str(entry)) > SHORT_MAX_CHARS for entry in value):
            for number, entry in enumerate(value):
                yield from lines(f"{name}[{number}]", entry)
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
