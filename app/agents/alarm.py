"""Interrupts a handler at its deadline, where that is possible: in the main thread (prefork, solo), by a signal.

No other thread can be interrupted. There a handler overruns, and the fence decides whether its answer still counts.
"""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from app.clock import Deadline


class DeadlinePassed(BaseException):
    """No Exception: a handler that catches every Exception must not catch its own end."""


class Alarm:
    """Between `start` and `stop`, DeadlinePassed is raised at the deadline."""

    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline
        self._works = threading.current_thread() is threading.main_thread()
        self._rung = False
        self._handler_before: Any = None
        self._timer_before = (0.0, 0.0)
        self._started_s = time.monotonic()
        # Set where nothing may be interrupted: the alarm then only notes that it rang.
        self.held = False

    def start(self) -> None:
        if self._works:
            self._handler_before = signal.signal(signal.SIGALRM, self._ring)
            left_s = max(self._deadline.remaining_s(), 0.001)
            self._timer_before = signal.setitimer(signal.ITIMER_REAL, left_s)

    def stop(self) -> None:
        """Gives the timer back to whoever had it."""
        if not self._works:
            return
        delay_s, interval_s = self._timer_before
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._handler_before)
        if delay_s:
            left_s = max(delay_s - (time.monotonic() - self._started_s), 0.001)
            signal.setitimer(signal.ITIMER_REAL, left_s, interval_s)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Not interrupted inside, but right after: what is being recorded is recorded whole."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.held = True
        try:
            yield
        finally:
            self.held = False
        if self._rung:
            raise DeadlinePassed

    def _ring(self, _number: int, _frame: FrameType | None) -> None:
        self._rung = True
        if not self.held:
            raise DeadlinePassed
