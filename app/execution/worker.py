"""What one process that executes steps holds: settings, the store, its presence, and the definitions it has read.

Made on first use, and made anew after a fork: neither connections nor locks survive one.
"""

import os
import threading
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from app import settings
from app.errors import NotReady
from app.execution.children import Children
from app.runs.database import check_ready, engine, readiness
from app.runs.presence import Presence
from app.runs.store import Family, Store

if TYPE_CHECKING:
    from app.pipelines.model import Pipeline
    from app.runs.output_cache import OutputCache
    from app.settings import Settings

_DEFINITIONS_MAX = 256
# As many as a sweep rescues in one transaction, and as often.
_HANDED_OVER_AT_ONCE_MAX = 5
_HAND_OVER_ROUNDS_MAX = 200


class Worker:
    """`parent_id` is the worker that started this process for one step at a time."""

    def __init__(self, configured: "Settings", parent_id: int | None = None) -> None:
        self.settings = configured
        self.pid = os.getpid()
        self.alone = parent_id is not None
        self.children = Children()
        url = configured.need_database()
        self.cache = _cache(configured)
        self.store = Store(engine(url, pool_max=configured.database_pool_max))
        try:
            with readiness(), self.store.engine.connect() as connection:
                check_ready(connection)
        except BaseException:
            self.store.engine.dispose()
            raise
        self._presence = Presence(configured.need_session_database(), configured.lease_s, parent_id)
        self._lock = threading.Lock()
        self._present = False
        # Definitions are immutable: what was read once stays true.
        self.definition = lru_cache(_DEFINITIONS_MAX)(self._read_definition)

    @property
    def worker_id(self) -> int:
        """The process's id in `stepfast.workers`; the first call registers it."""
        with self._lock:
            if not self._present:
                self._presence.start()
                self._present = True
        return self._presence.worker_id

    @property
    def registered_id(self) -> int | None:
        """The same, where it is registered already."""
        return self._presence.worker_id if self._present else None

    def family(self) -> Family | None:
        """What the sweep must know of the processes that this one started."""
        if not self._present:
            return None
        living, dead = self.children.look()
        return Family(self._presence.worker_id, living, dead)

    def beat_soon(self) -> None:
        """Registers this process anew at once: it was taken for dead."""
        self._presence.beat_soon()

    def hand_over(self) -> int:
        """Gives away what this process and its children execute and may be repeated. Returns how many are left."""
        if not self._present:
            return 0
        left = 0
        for _ in range(_HAND_OVER_ROUNDS_MAX):
            before, left = left, self.store.hand_over(self._presence.worker_id, _HANDED_OVER_AT_ONCE_MAX)
            if left in {0, before}:
                break
        return left

    def _read_definition(self, pipeline_hash: str) -> "Pipeline":
        return self.store.definition(pipeline_hash)

    def stop(self) -> None:
        if self._present:
            # Where it is interrupted in the midst of a step, that is no loss, either.
            with suppress(SQLAlchemyError):
                self.hand_over()
            self._presence.stop()
        if self.cache:
            self.cache.close()
        self.store.engine.dispose()


def _cache(configured: "Settings") -> "OutputCache | None":
    if not configured.redis_url:
        return None
    from app.runs.output_cache import OutputCache

    # A jsonb's text has a space after each comma and colon.
    try:
        return OutputCache(configured.redis_url, 2 * configured.output_max_bytes)
    except ValueError as error:
        raise NotReady("STEPFAST_REDIS_URL is not a Redis URL.", next_step="Write redis://host/0.") from error


_current: Worker | None = None
_lock = threading.Lock()


def current() -> Worker:
    """The process's Worker. Raises NotReady."""
    global _current  # noqa: PLW0603  # one a process is what it is
    with _lock:
        if _current is None or _current.pid != os.getpid():
            # After a fork: a prefork worker's child, which executes one step at a time.
            _current = Worker(settings.load(), _current.registered_id if _current else None)
        return _current


def start_child(parent_id: int) -> Worker:
    """Makes this process, which was started for one step, the child of a worker."""
    global _current  # noqa: PLW0603
    with _lock:
        _current = Worker(settings.load(), parent_id)
        return _current


def stop() -> None:
    """Ends this process's Worker, if it has one."""
    global _current  # noqa: PLW0603
    with _lock:
        if _current is not None and _current.pid == os.getpid():
            _current.stop()
        _current = None
