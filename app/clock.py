"""Time inside one process. What is scheduled or leased is timed by `stepfast.now()` in the database instead."""

import time
from collections.abc import Callable
from dataclasses import dataclass

monotonic_s: Callable[[], float] = time.monotonic


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in monotonic time by which an attempt must have ended."""

    at_s: float

    @classmethod
    def after_ms(cls, timeout_ms: int) -> "Deadline":
        assert timeout_ms > 0
        return cls(monotonic_s() + timeout_ms / 1000)

    def remaining_s(self) -> float:
        """Seconds left; never below zero."""
        return max(0.0, self.at_s - monotonic_s())

    @property
    def passed(self) -> bool:
        return self.remaining_s() == 0.0
