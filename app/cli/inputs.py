"""What is typed, as values: a run's `--input` and labels, and `--since`."""

import json
import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from app.errors import Misuse
from app.pipelines import files
from app.pipelines.report import Unreadable

if TYPE_CHECKING:
    from app.pipelines.model import Json

LABEL_HELP = "Words of your own about the run, to find it by. Repeatable."
HELP = (
    "K=V gives one field: V is taken as JSON where it is JSON, otherwise as text. "
    "K=@FILE gives a file's text, which is UTF-8. @FILE gives all fields of a JSON object. Repeatable."
)

_AGO = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse(given: Iterable[str], max_bytes: int) -> "Json":
    """The input that `--input` options describe. Raises Misuse."""
    found: Json = {}
    for text in given:
        if text.startswith("@"):
            fields = read_object(Path(text[1:]), "input", max_bytes)
        else:
            key, separator, value = text.partition("=")
            if not (key and separator):
                raise Misuse(
                    f"--input {text!r} is no key=value.",
                    next_step="Write --input KEY=VALUE, --input KEY=@FILE or --input @FILE.json.",
                )
            fields = {key: _text(Path(value[1:]), "input", max_bytes) if value.startswith("@") else _value(value)}
        for key in fields:
            if key in found:
                raise Misuse(f"--input gives {key!r} twice.")
        found |= fields
    return found


def labels(given: Iterable[str]) -> "dict[str, str]":
    """What `--label K=V` options say; values are text. Raises Misuse."""
    found: dict[str, str] = {}
    for text in given:
        key, separator, value = text.partition("=")
        if not (key and separator):
            raise Misuse(f"--label {text!r} is no key=value.", next_step="Write --label KEY=VALUE.")
        if key in found:
            raise Misuse(f"--label gives {key!r} twice.")
        found[key] = value
    return found


def read_object(file: Path, what: str, max_bytes: int) -> "Json":
    """The JSON object that a file holds; `what` names it in errors. Raises Misuse."""
    text = _text(file, what, max_bytes)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Misuse(f"The {what} file {file} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise Misuse(f"The {what} file {file} holds no JSON object.")
    return value


def _text(file: Path, what: str, max_bytes: int) -> str:
    try:
        return files.read(file, max_bytes)
    except Unreadable as error:
        place = f", line {error.place[0]}, column {error.place[1]}," if error.place[0] else ""
        raise Misuse(f"The {what} file {file}{place} {error}", next_step="Name a text file of UTF-8.") from error


def _value(text: str) -> object:
    try:
        return json.loads(text, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return text


def _not_json(name: str) -> object:
    raise ValueError(name)


def since(_ctx: click.Context, _param: click.Parameter, text: str | None) -> datetime | timedelta | None:
    """An age, or a time, which is in UTC unless it says otherwise."""
    if text is None:
        return None
    if found := _AGO.fullmatch(text.strip()):
        return timedelta(**{_UNITS[found[2]]: int(found[1])})
    try:
        at = datetime.fromisoformat(text.strip())
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no age such as 2h or 3d, and no time such as 2026-01-31T06:00."
        ) from None
    return at if at.tzinfo else at.replace(tzinfo=UTC)
