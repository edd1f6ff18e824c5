"""What one process that executes steps holds: settings, the store, its presence, and the definitions it has read.

Made on first use, and made anew after a fork: neither connections nor locks survive one.
"""

import os
import threading
from functools import lru_cache
from typing import TYPE_CHECKING

from app import settings
from app.runs.database import check_ready, engine, readiness
from app.runs.presence import Presence
from app.runs.store import Store

if TYPE_CHECKING:
    from app.pipelines.model import Pipeline
    from app.settings import Settings

_DEFINITIONS_MAX = 256


class Worker:
    def __init__(self, configured: "Settings") -> None:
        self.settings = configured
        self.pid = os.getpid()
        url = configured.need_database()
        self.store = Store(engine(url, pool_max=configured.database_pool_max))
        try:
            with readiness(), self.store.engine.connect() as connection:
                check_ready(connection)
        except BaseException:
            self.store.engine.dispose()
            raise
        self._presence = Presence(url, configured.lease_s)
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

    def beat_soon(self) -> None:
        """Registers this process anew at once: it was taken for dead."""
        self._presence.beat_soon()

    def _read_definition(self, pipeline_hash: str) -> "Pipeline":
        return self.store.definition(pipeline_hash)

    def stop(self) -> None:
        if self._present:
            self._presence.stop()
        self.store.engine.dispose()


_current: Worker | None = None
_lock = threading.Lock()


def current() -> Worker:
    """The process's Worker. Raises NotReady."""
    global _current  # noqa: PLW0603  # one a process is what it is
    with _lock:
        if _current is None or _current.pid != os.getpid():
            _current = Worker(settings.load())
        return _current


def stop() -> None:
    """Ends this process's Worker, if it has one."""
    global _current  # noqa: PLW0603
    with _lock:
        if _current is not None and _current.pid == os.getpid():
            _current.stop()
        _current = None
