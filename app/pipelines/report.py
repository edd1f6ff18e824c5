"""Collects the faults of a check, so that all of them are reported at once."""

import difflib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Literal

from app.errors import Fault
from app.pipelines.limits import FAULTS_MAX_COUNT

Place = tuple[int, int]  # line and column, from 1
WHOLE_FILE: Place = (0, 0)


class Unreadable(ValueError):
    """What stops the reading of one file. `place` is where; the message continues a sentence that names the file."""

    def __init__(self, place: Place, message: str) -> None:
        super().__init__(message)
        self.place = place


class Report:
    def __init__(self) -> None:
        self._faults: set[Fault] = set()

    def error(self, file: Path, place: Place, message: str, rule: str = "") -> None:
        self._add(file, place, message, "error", rule)

    def warn(self, file: Path, place: Place, message: str, rule: str = "") -> None:
        self._add(file, place, message, "warning", rule)

    @property
    def faults(self) -> tuple[Fault, ...]:
        """By file, line and column."""
        return tuple(sorted(self._faults))

    @property
    def has_errors(self) -> bool:
        return any(fault.severity == "error" for fault in self._faults)

    def _add(self, file: Path, place: Place, message: str, severity: Literal["error", "warning"], rule: str) -> None:
        # Past the limit a further fault helps nobody, and the file is refused already.
        if len(self._faults) < FAULTS_MAX_COUNT or (severity == "error" and not self.has_errors):
            self._faults.add(Fault(str(file), *place, message, severity, rule))


def place_of(text: str, offset: int) -> Place:
    """The place of a character of a text."""
    return text.count("\n", 0, offset) + 1, offset - text.rfind("\n", 0, offset)


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint that ends a message: the nearest valid name, or all of them where few and none is near; else nothing."""
    names = sorted(str(other) for other in islice(valid, 1_000) if len(other) <= 100)
    near = difflib.get_close_matches(name[:100], names, n=1)
    if near:
        return f" Did you mean {near[0]!r}?"
    return f" Known: {', '.join(names)}." if 0 < len(names) <= 12 else ""


def cut(text: str) -> str:
    """A foreign text, quoted and short enough for a message."""
    return repr(text if len(text) <= 60 else text[:60] + "…")
