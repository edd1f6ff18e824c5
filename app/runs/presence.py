"""How a process that executes steps is known to be alive.

It has a row in `stepfast.workers`, and holds the advisory lock (7083, its id) on a session of its own: the kernel
closes that session within milliseconds of its death, so others see it at once. One statement, three times a lease,
keeps the lease of the whole process for what no socket reports: a frozen process, a lost host, a cut network.

Behind a pooler there is no session of its own. A lock would be held by whoever the pooler lends the connection to, and
be let go when it likes: the lease alone counts then.
"""

import os
import select
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app import events
from app.events import Event
from app.runs.database import CODE_VERSION, CONNECT_TIMEOUT_S, engine

if TYPE_CHECKING:
    from typing import Any

    from psycopg import Connection as DriverConnection
    from sqlalchemy import Connection

# A session that was cut, and its lock, must be back well within the grace.
_RECONNECT_S = 0.1
_STOP, _BEAT_NOW = b"s", b"b"

_REGISTER = text("""
    with worker as (
        insert into stepfast.workers (host, pid, code_version, started_at, lease_until, parent_id, has_session)
        values (:host, :pid, :code_version, stepfast.now(), stepfast.now() + :lease_s * interval '1 s', :parent,
                :backend_pid = pg_backend_pid())
        returning id, has_session),
    -- Of a process that was taken for dead, and whose children live.
    children as (
        update stepfast.workers set parent_id = worker.id from worker where parent_id = :before and ended_at is null)
    select id, has_session, case when has_session then pg_advisory_lock(7083, id::int) end from worker
""")
_LOCK = text("select pg_try_advisory_lock(7083, :id)")
_BEAT = text("""
    update stepfast.workers
    set lease_until = stepfast.now() + :lease_s * interval '1 s', suspect_since = null,
        has_session = :backend_pid = pg_backend_pid()
    where id = :id and ended_at is null returning has_session
""")
_LEAVE = text("update stepfast.workers set ended_at = stepfast.now() where id = :id and ended_at is null")


class Presence:
    """One process's row, lock and heartbeat. `start` blocks until it is registered; `stop` gives the row back."""

    def __init__(self, url: str, lease_s: float, parent_id: int | None = None) -> None:
        self._engine = engine(url, pool_max=1, name="stepfast-presence")
        self._lease_s = lease_s
        self._parent_id = parent_id
        self._wake_reader, self._wake_writer = os.pipe()
        self._locked = False
        self._connection: Connection | None = None
        self._thread: threading.Thread | None = None
        self.worker_id = 0

    def start(self) -> None:
        """Registers this process, and begins its heartbeat. Raises DBAPIError where Postgres is away."""
        self._register()
        os.register_at_fork(after_in_child=self._let_go_in_child)
        self._thread = threading.Thread(target=self._beat_until_stopped, name="stepfast-presence", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the row, so that nobody waits for a lease. Executing attempts of this process are rescued at once."""
        os.write(self._wake_writer, _STOP)
        if self._thread:
            self._thread.join(timeout=CONNECT_TIMEOUT_S)
        if self._connection:
            with suppress(DBAPIError):
                self._connection.execute(_LEAVE, {"id": self.worker_id})
        self._drop_session()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _register(self) -> None:
        connection = self._connection = self._engine.connect()
        parameters = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "code_version": CODE_VERSION,
            "lease_s": self._lease_s,
            "parent": self._parent_id,
            "before": self.worker_id,
            "backend_pid": self._backend_pid(),
        }
        # In one transaction: the row becomes visible when its lock is held.
        registered = connection.execute(_REGISTER, parameters).one()
        self.worker_id = registered.id
        self._locked = registered.has_session
        events.emit(Event.WORKER_STARTED, worker=self.worker_id, pid=os.getpid(), has_session=registered.has_session)

    def beat_soon(self) -> None:
        """Wakes the heartbeat: somebody learned that this process was taken for dead."""
        os.write(self._wake_writer, _BEAT_NOW)

    def _beat_until_stopped(self) -> None:
        pause_s = self._lease_s / 3
        while True:
            try:
                if self._stopped_within(pause_s):
                    return
                all_is_well = self._beat()
                # A sweeper that looks just now may hold the lock: again soon. So may a session that died unseen: later.
                pause_s = self._lease_s / 3 if all_is_well else min(2 * pause_s or _RECONNECT_S, self._lease_s / 3)
            except Exception as error:  # noqa: BLE001  # whatever it was: a thread that ends here is a false death
                # Postgres or the network is away: the session and its lock are gone. Be back before the grace is over.
                events.emit(Event.HEARTBEAT_FAILED, error=str(error).splitlines()[0] if str(error) else repr(error))
                self._drop_session()
                # At once where it had one until now.
                pause_s = 0.0 if pause_s > _RECONNECT_S else min(_RECONNECT_S, self._lease_s / 3)

    def _stopped_within(self, pause_s: float) -> bool:
        """Waits for the next beat; awake at once when the server closes the session, to take the lock anew."""
        poll = select.poll()  # unlike select.select, of any number of open files
        poll.register(self._wake_reader, select.POLLIN)
        if self._connection:
            poll.register(self._socket(), select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(pause_s * 1000)}
        return self._wake_reader in ready and os.read(self._wake_reader, 1) != _BEAT_NOW

    def _driver(self) -> "DriverConnection[Any]":
        assert self._connection is not None
        return cast("DriverConnection[Any]", self._connection.connection.driver_connection)

    def _socket(self) -> int:
        return self._driver().fileno()

    def _backend_pid(self) -> int:
        """As the server told it when we connected. A pooler tells its clients another one than its backend's."""
        return self._driver().info.backend_pid

    def _beat(self) -> bool:
        """The lease first, then the lock, which the server may still hold for a session that is dead.

        Returns whether all is as it should be.
        """
        if self._connection is None:
            self._connection = self._engine.connect()
            self._locked = False
        parameters = {"id": self.worker_id, "lease_s": self._lease_s, "backend_pid": self._backend_pid()}
        beaten = self._connection.execute(_BEAT, parameters).one_or_none()
        if beaten is None:
            # Somebody took this process for dead (it was frozen, or cut off). Its attempts are fenced; begin anew.
            events.emit(Event.WORKER_LOST, worker=self.worker_id, pid=os.getpid())
            self._drop_session()
            self._register()
        elif beaten.has_session and not self._locked:
            self._locked = bool(self._connection.execute(_LOCK, {"id": self.worker_id}).scalar())
            return self._locked
        return True

    def _drop_session(self) -> None:
        """Closes it for good: a connection that went back to the engine's pool would keep the lock."""
        if self._connection:
            with suppress(DBAPIError):
                self._connection.invalidate()
                self._connection.close()
        self._connection = None

    def _let_go_in_child(self) -> None:
        """A handler's fork inherits the session's socket: it would keep the lock of its dead parent alive."""
        if self._connection is None or self._connection.closed:
            return
        with suppress(Exception), open(os.devnull, "rb") as null:  # noqa: PTH123  # a file descriptor is wanted
            os.dup2(null.fileno(), self._socket())
