"""Reads the typed fields of one map of a skill file. What is wrong is reported, and the field reads as absent."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

from app.pipelines.names import WRITTEN
from app.pipelines.report import Place, Report, cut, nearest
from app.pipelines.yaml_source import Mapping, Node, Scalar, Sequence

_N = TypeVar("_N", int, float)

_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9_]{0,30})")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {"true": True, "false": False}


class Section:
    """One map, whose keys must be among `known`. Every reader returns None for what is absent or wrong."""

    def __init__(self, report: Report, file: Path, node: Mapping, known: Collection[str]) -> None:
        self._report = report
        self._file = file
        self._node = node
        for key, _ in node.entries.values():
            if key.text not in known:
                report.error(file, key.place, f"{cut(key.text)} is no known field.{nearest(key.text, known)}")
        for key in node.duplicates:
            report.error(file, key.place, f"{cut(key.text)} stands here twice.")

    def __contains__(self, key: str) -> bool:
        return key in self._node.entries

    @property
    def begins(self) -> Place:
        return self._node.place

    def place(self, key: str) -> Place:
        """Where a field's value stands; where the map begins, if it has no such field."""
        return self._node.entries[key][1].place if key in self else self._node.place

    def nodes(self, key: str) -> tuple[Node, ...]:
        """The entries of a field's list as they stand, unchecked; none where it is no list."""
        node = self._node.entries[key][1] if key in self else None
        return node.items if isinstance(node, Sequence) else ()

    def place_in(self, key: str, offset: int) -> Place:
        """Where a character of a field's text stands; where the map begins, if it has no such field."""
        node = self._node.entries[key][1] if key in self else self._node
        return node.at(offset) if isinstance(node, Scalar) else node.place

    def error(self, key: str, message: str, rule: str = "") -> None:
        self._report.error(self._file, self.place(key), message, rule)

    def warn(self, key: str, message: str, rule: str = "") -> None:
        self._report.warn(self._file, self.place(key), message, rule)

    def error_at(self, place: Place, message: str) -> None:
        self._report.error(self._file, place, message)

    def require(self, key: str) -> None:
        if key not in self:
            self.error(key, f"the field {key!r} is required.")

    def text(self, key: str, max_chars: int) -> str | None:
        scalar = self._scalar(key)
        if scalar is not None and len(scalar.text) > max_chars:
            self.error(key, f"{key} is longer than {max_chars} characters.")
            return None
        return scalar.text if scalar else None

    def name(self, key: str, pattern: re.Pattern[str]) -> str | None:
        scalar = self._scalar(key)
        return self._named(key, scalar, pattern) if scalar else None

    def names(self, key: str, pattern: re.Pattern[str], max_count: int) -> tuple[Scalar, ...] | None:
        """A list of names, each with its place."""
        items = self.items(key, max_count)
        if items is None:
            return None
        found = []
        for item in items:
            if not isinstance(item, Scalar):
                self.error_at(item.place, f"an entry of {key} is no name.")
            elif self._named(key, item, pattern):
                found.append(item)
        return tuple(found)

    def items(self, key: str, max_count: int) -> tuple[Node, ...] | None:
        """The entries of a list, of any kind."""
        node = self._value(key)
        if node is None:
            return None
        if not isinstance(node, Sequence):
            self.error(key, f"{key} is no list: write [a, b].")
            return None
        if len(node.items) > max_count:
            self.error(key, f"{key} holds more than {max_count} names.")
            return None
        return tuple(node.items)

    def names_or_sections(
        self, key: str, pattern: re.Pattern[str], name_field: str, known: Collection[str], max_count: int
    ) -> "tuple[tuple[Scalar, Section | None], ...]":
        """A list whose entries are names, or maps that have one as `name_field`: each name, with its map if any."""
        found: list[tuple[Scalar, Section | None]] = []
        for item in self.items(key, max_count) or ():
            section = section_of(self._report, self._file, item, known, key) if isinstance(item, Mapping) else None
            if section:
                section.require(name_field)
            name = section._scalar(name_field) if section else item  # noqa: SLF001  # of its own class
            if isinstance(name, Scalar) and self._named(key, name, pattern):
                found.append((name, section))
            elif not isinstance(item, Scalar | Mapping):
                self.error_at(item.place, f"an entry of {key} is neither a name nor a map of fields.")
        return tuple(found)

    def integer(self, key: str, limits: tuple[int, int]) -> int | None:
        scalar = self._plain(key, _INTEGER, "a whole number")
        return self._limited(key, int(scalar.text.replace("_", "")), limits) if scalar else None

    def number(self, key: str, limits: tuple[float, float]) -> float | None:
        scalar = self._plain(key, _NUMBER, "a number")
        return self._limited(key, float(scalar.text), limits) if scalar else None

    def boolean(self, key: str) -> bool | None:
        scalar = self._scalar(key)
        if scalar is None:
            return None
        if scalar.quoted or scalar.text.lower() not in _BOOLEANS:
            self.error(key, f"{key} is {cut(scalar.text)}; write true or false, without quotes.")
            return None
        return _BOOLEANS[scalar.text.lower()]

    def choice(self, key: str, valid: Collection[str]) -> str | None:
        scalar = self._scalar(key)
        if scalar is None or scalar.text in valid:
            return scalar.text if scalar else None
        self.error(key, f"{key} is {cut(scalar.text)}.{nearest(scalar.text, valid)}")
        return None

    def section(self, key: str, known: Collection[str]) -> "Section | None":
        node = self._value(key)
        if node is None:
            return None
        return section_of(self._report, self._file, node, known, key)

    def sections(self, key: str, known: Collection[str], max_count: int) -> "tuple[Section, ...]":
        node = self._value(key)
        if not isinstance(node, Sequence) or not node.items:
            if node is not None:
                self.error(key, f"{key} is no list with at least one entry.")
            return ()
        if len(node.items) > max_count:
            self.error(key, f"{key} has {len(node.items)} entries; the most is {max_count}.")
            return ()
        found = (section_of(self._report, self._file, item, known, f"an entry of {key}") for item in node.items)
        return tuple(section for section in found if section)

    def _value(self, key: str) -> Node | None:
        if key not in self:
            return None
        node = self._node.entries[key][1]
        if isinstance(node, Scalar) and not node.quoted and node.text in _NULLS:
            self.error(key, f"{key} has no value: give one, or remove the line.")
            return None
        return node

    def _scalar(self, key: str) -> Scalar | None:
        node = self._value(key)
        if node is None or isinstance(node, Scalar):
            return node
        hint = ' Put a value that begins with a brace in quotes, "{{…}}".' if isinstance(node, Mapping) else ""
        self.error(key, f"{key} must be a single value.{hint}")
        return None

    def _named(self, key: str, scalar: Scalar, pattern: re.Pattern[str]) -> str | None:
        if pattern.fullmatch(scalar.text):
            return scalar.text
        self.error_at(scalar.place, f"{key} is {cut(scalar.text)}, but is written as {WRITTEN[pattern]}.")
        return None

    def _plain(self, key: str, pattern: re.Pattern[str], what: str) -> Scalar | None:
        scalar = self._scalar(key)
        if scalar is None or (not scalar.quoted and pattern.fullmatch(scalar.text)):
            return scalar
        self.error(key, f"{key} is {cut(scalar.text)}{' in quotes' if scalar.quoted else ''}, which is not {what}.")
        return None

    def _limited(self, key: str, value: _N, limits: tuple[_N, _N]) -> _N | None:
        if limits[0] <= value <= limits[1]:
            return value
        self.error(key, f"{key} is {value}; it must be from {limits[0]} to {limits[1]}.")
        return None


def section_of(report: Report, file: Path, node: Node, known: Collection[str], what: str) -> Section | None:
    """A node as a section; None, with a fault, where it is no map."""
    if isinstance(node, Mapping):
        return Section(report, file, node, known)
    report.error(file, node.place, f"{what} must be a map of fields.")
    return None
