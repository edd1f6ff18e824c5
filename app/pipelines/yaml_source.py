"""YAML as a tree that remembers its places, read from untrusted text within fixed bounds.

Scalars stay text: the field that reads one decides what it is, so that `version: 1.0` stays "1.0" and `id: no` stays
"no". Only maps with text keys, lists and scalars exist; tags other than the plain ones are refused, and aliases count
as often as they are used.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from app.pipelines.limits import NESTING_MAX_LEVELS, NODES_MAX_COUNT
from app.pipelines.report import Place, Unreadable, cut, place_of

# The C parser is ten times faster; both give the same events.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_PLAIN_TAGS = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map"))
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_BARE_BRACES = re.compile(r"(:|-)\s+\{\{")


@dataclass(frozen=True, slots=True)
class Scalar:
    """`quoted` scalars are text; a plain one may be read as a number, a boolean or nothing.

    `first` is the column of the text's first character where the source shows the text as it is, else None.
    """

    place: Place
    text: str
    quoted: bool
    first: int | None

    def at(self, offset: int) -> Place:
        """The place of a character of the text, as near as the source tells."""
        return self.place if self.first is None else (self.place[0], self.first + offset)


@dataclass(frozen=True, slots=True)
class Sequence:
    place: Place
    items: tuple["Node", ...]


@dataclass(frozen=True, slots=True)
class Mapping:
    """`entries` maps each key to its own place and its value. Of a duplicated key the first value stands."""

    place: Place
    entries: dict[str, tuple[Scalar, "Node"]]
    duplicates: tuple[Scalar, ...]


Node = Scalar | Sequence | Mapping


def parse(text: str) -> Node:
    """The one document of a text. Raises Unreadable."""
    control = _CONTROL.search(text)
    if control:
        message = f"holds the control character {control.group()!r}, which no YAML file may."
        raise Unreadable(place_of(text, control.start()), message)
    try:
        return _Composer(yaml.parse(text, Loader=_LOADER)).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise Unreadable(place, f"is not YAML: {what}.{_hint(text, place)}") from error
    except yaml.YAMLError as error:
        raise Unreadable(place_of(text, getattr(error, "position", 0)), f"is not YAML: {error}.") from error
    except Unreadable as error:
        raise Unreadable(error.place, f"{error}{_hint(text, error.place)}") from error


def unstorable(text: str) -> int | None:
    """The offset of the first character that Postgres cannot store (NUL, half of a surrogate pair), or None."""
    found = _UNSTORABLE.search(text)
    return found.start() if found else None


def _hint(text: str, place: Place) -> str:
    lines = text.split("\n")[max(0, place[0] - 2) : place[0]]
    if any(_BARE_BRACES.search(line) for line in lines):
        return ' Put the value in quotes, "{{…}}": a bare brace begins a mapping.'
    return ""


class _Composer:
    """Builds the tree from the parser's events, and stops where a bound is passed."""

    def __init__(self, events: Iterator[Any]) -> None:
        self._events = events
        self._anchors: dict[str, tuple[Node, int]] = {}
        self._count = 0

    def document(self) -> Node:
        next(self._events)
        event = next(self._events)
        if isinstance(event, yaml.StreamEndEvent):
            raise Unreadable((1, 1), "is empty.")
        node = self._node(next(self._events), 1)
        next(self._events)
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise Unreadable(_place(event), "holds a second document; a file is one document.")
        return node

    def _node(self, event: Any, level: int) -> Node:  # noqa: ANN401  # PyYAML has no common type for events
        place = _place(event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), place)
        if level > NESTING_MAX_LEVELS:
            raise Unreadable(place, f"is nested deeper than {NESTING_MAX_LEVELS} levels.")
        if event.tag and event.tag not in _PLAIN_TAGS and event.tag != "!":
            raise Unreadable(place, f"has the tag {cut(event.tag)}, which is not read: remove it.")
        before = self._count
        self._spend(1, place)
        node: Node
        if isinstance(event, yaml.ScalarEvent):
            node = _scalar(event, place)
        elif isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(child := next(self._events), yaml.SequenceEndEvent):
                items.append(self._node(child, level + 1))
            node = Sequence(place, tuple(items))
        else:
            node = self._mapping(place, level)
        if event.anchor:
            self._anchors[event.anchor] = (node, self._count - before)
        return node

    def _mapping(self, place: Place, level: int) -> Mapping:
        entries: dict[str, tuple[Scalar, Node]] = {}
        duplicates = []
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._node(event, level + 1)
            if not isinstance(key, Scalar):
                raise Unreadable(key.place, "has a key that is no text.")
            value = self._node(next(self._events), level + 1)
            if key.text in entries:
                duplicates.append(key)
            else:
                entries[key.text] = (key, value)
        return Mapping(place, entries, tuple(duplicates))

    def _alias(self, anchor: str, place: Place) -> Node:
        if anchor not in self._anchors:
            raise Unreadable(place, f"uses the alias *{anchor[:60]} before or inside what it names.")
        node, count = self._anchors[anchor]
        self._spend(count, place)
        return node

    def _spend(self, count: int, place: Place) -> None:
        self._count += count
        if self._count > NODES_MAX_COUNT:
            raise Unreadable(place, f"holds more than {NODES_MAX_COUNT} values, aliases unfolded.")


def _place(event: Any) -> Place:  # noqa: ANN401
    return event.start_mark.line + 1, event.start_mark.column + 1


def _scalar(event: Any, place: Place) -> Scalar:  # noqa: ANN401
    text: str = event.value
    if unstorable(text) is not None:
        raise Unreadable(place, "holds a NUL or half of a surrogate pair, which cannot be stored.")
    start, end = event.start_mark, event.end_mark
    quoted = bool(event.style)
    marks = 2 if quoted else 0
    plainly_shown = start.line == end.line and end.column - start.column == len(text) + marks
    return Scalar(place, text, quoted, place[1] + marks // 2 if plainly_shown else None)
