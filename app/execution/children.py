"""The processes that a worker started to execute steps: which of them live, and which it has seen end.

A child whose handler is in a call into C that keeps the interpreter can say nothing for itself. Its parent can: it
lives. And a parent sees a child's end at once.
"""

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# As in /proc/PID/stat. A stopped process is left to its lease: whether it goes on, nobody knows.
_ENDED = frozenset("ZXx")
_STOPPED = frozenset("Tt")


class Children:
    """Safe for threads. `pool` names the pids of Celery's prefork pool; `add` those of processes for one step."""

    def __init__(self) -> None:
        self.pool: Callable[[], Iterable[int]] = tuple
        self._lock = threading.Lock()
        self._living: set[int] = set()
        self._dead: set[int] = set()

    def add(self, pid: int) -> None:
        with self._lock:
            self._living.add(pid)

    def look(self) -> tuple[list[int], list[int]]:
        """The pids of those that work, and of those that have ended and were not yet named by two looks before."""
        with self._lock:
            self._living.update(self.pool())
            states = {pid: _state(pid) for pid in self._living}
            ended = {pid for pid, state in states.items() if state in _ENDED}
            # Named twice, since the first statement that names them may be lost; no longer, since pids come back.
            dead, self._dead = ended | self._dead, ended
            self._living -= ended
            return [pid for pid in self._living if states[pid] not in _STOPPED], sorted(dead - self._living)


def _state(pid: int) -> str:
    """The letter of a process's state; "Z" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        pass
    except OSError:
        return "Z"  # it ended while we read
    if Path("/proc/self/stat").exists():
        return "Z"
    try:
        os.kill(pid, 0)  # where there is no /proc, what has ended counts as living until its parent has buried it
    except ProcessLookupError:
        return "Z"
    except PermissionError:
        pass
    return "R"
