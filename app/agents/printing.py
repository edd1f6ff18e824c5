"""What handlers print becomes events, a line each, so that JSON logs stay JSON.

`sys.stdout` and `sys.stderr` belong to the whole process, where other threads run other handlers: so who prints is told
by a context variable. What a handler's own threads and child processes print goes where the worker's output goes.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO

from app import events
from app.events import Event

LINES_MAX_COUNT = 100
LINE_MAX_CHARS = 2_000
_NAMES = ("stdout", "stderr")


@contextmanager
def printing_as_events() -> Iterator[None]:
    """Each line printed inside is a HANDLER_PRINTED; after LINES_MAX_COUNT they are only counted."""
    for name in _NAMES:
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Routed):
            setattr(sys, name, _Routed(name, stream))
    lines = _Lines()
    token = _current.set(lines)
    try:
        yield
    finally:
        _current.reset(token)
        lines.end()


class _Lines:
    def __init__(self) -> None:
        self._rests = dict.fromkeys(_NAMES, "")
        self._count = 0

    def write(self, name: str, text: str) -> None:
        *lines, rest = (self._rests[name] + text).split("\n")
        if len(rest) > LINE_MAX_CHARS:
            lines, rest = [*lines, rest], ""
        self._rests[name] = rest
        for line in lines:
            self._emit(name, line)

    def end(self) -> None:
        for name, rest in self._rests.items():
            if rest:
                self._emit(name, rest)
        if self._count > LINES_MAX_COUNT:
            more = self._count - LINES_MAX_COUNT
            events.emit(Event.HANDLER_PRINTED, message=f"… and {more} more lines")

    def _emit(self, name: str, line: str) -> None:
        self._count += 1
        if self._count > LINES_MAX_COUNT:
            return
        token = _current.set(None)  # a subscriber that prints must not come back here
        try:
            events.emit(Event.HANDLER_PRINTED, stream=name, message=line[:LINE_MAX_CHARS])
        finally:
            _current.reset(token)


_current: ContextVar[_Lines | None] = ContextVar("stepfast_printing", default=None)


class _Routed:
    """Stands for a stream of the process, and is that stream for everybody but a handler."""

    def __init__(self, name: str, stream: TextIO) -> None:
        self._name = name
        self._stream = stream

    def write(self, text: str) -> int:
        lines = _current.get()
        if lines is None:
            return self._stream.write(text)
        lines.write(self._name, text)
        return len(text)

    def writelines(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.write(text)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # whatever else the stream has
        return getattr(self._stream, name)
