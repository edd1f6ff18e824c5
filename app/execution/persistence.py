"""Repeating a statement through an outage of Postgres: what was paid for is not dropped because a socket closed."""

import threading
from typing import TYPE_CHECKING, TypeVar

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app import events
from app.clock import Deadline
from app.errors import NotReady
from app.events import Event
from app.runs.database import is_outage

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

# An answer that was paid for is held for as long as an outage may last; the fence refuses it, if somebody else took the
# step meanwhile. A claim is repeated as long: its first try may have been committed.
OUTAGE_MAX_S = 3_600
_PAUSE_FIRST_S = 0.05
_PAUSE_MAX_S = 2.0


def through_outage(call: "Callable[[], T]", *, max_s: int, wait: "Callable[[float], object] | None" = None) -> T:
    """Calls until Postgres answers, for at most `max_s`; then raises what it raised. `call` must be safe to repeat."""
    deadline = Deadline.after_ms(max_s * 1000)
    pause_s = _PAUSE_FIRST_S
    wait = wait or threading.Event().wait
    while True:
        try:
            return call()
        except (DBAPIError, PoolTimeout, NotReady) as error:
            if not _is_outage(error) or deadline.passed:
                raise
            events.emit(Event.COMMIT_RETRIED, error=str(error).splitlines()[0], pause_s=pause_s)
        wait(pause_s)
        pause_s = min(pause_s * 2, _PAUSE_MAX_S)


def _is_outage(error: Exception) -> bool:
    cause = error.__cause__ if isinstance(error, NotReady) else error
    return isinstance(cause, PoolTimeout) or (isinstance(cause, DBAPIError) and is_outage(cause))
