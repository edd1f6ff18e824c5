"""The host's connections, of whatever library, behind one small shape.

Statements use `%s` and cast every parameter and result to text, so that no adapter of the host's changes them. A read
leaves a connection as it found it; a write joins the host's transaction, which the host commits.
"""

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

from stepfast.errors import Misuse, NotReady, translated

if TYPE_CHECKING:
    import psycopg
    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

Rows = Sequence[Sequence[Any]]
Parameters = Sequence[object]
Call = Callable[[], None]

CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_MS = 10_000
_INFO = "stepfast_after_commit"


class Database(Protocol):
    def read(self, statement: str, parameters: Parameters = ()) -> Rows: ...

    def write(self, statement: str, parameters: Parameters = ()) -> Rows: ...

    def after_commit(self, call: Call) -> None:
        """Has `call` called once what was written is committed; or never, where the library cannot tell."""


# The URLs of poolers.
_pooled: set[str] = set()


class OwnDatabase:
    """By a URL: a connection and a transaction for each statement."""

    def __init__(self, url: str | None) -> None:
        if not url:
            raise NotReady(
                "No connection was given, and no database is configured.",
                next_step="Pass connection=, set STEPFAST_DATABASE_URL, or call stepfast.configure(database_url=...).",
            )
        self._url = url.replace("+psycopg://", "://", 1)

    def read(self, statement: str, parameters: Parameters = ()) -> Rows:
        import psycopg

        try:
            connection = self._connect()
        except psycopg.OperationalError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no answer"
            raise NotReady(f"Postgres cannot be reached: {reason}") from error
        with connection, translated():
            return connection.execute(statement, parameters).fetchall()

    def _connect(self) -> "psycopg.Connection[Any]":
        import psycopg
        from psycopg.conninfo import conninfo_to_dict

        # Without `options` behind a pooler, which refuses them: then its own limits count. What the URL says wins.
        given: dict[str, Any] = {"autocommit": True, "connect_timeout": CONNECT_TIMEOUT_S}
        if self._url not in _pooled:
            theirs = conninfo_to_dict(self._url).get("options", "")
            options = f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c application_name=stepfast-client {theirs}"
            try:
                return psycopg.connect(self._url, **given, options=options)
            except psycopg.OperationalError as error:
                if "startup parameter" not in str(error):
                    raise
                _pooled.add(self._url)
        return psycopg.connect(self._url, **given)

    write = read

    def after_commit(self, call: Call) -> None:
        call()


class PsycopgDatabase:
    """psycopg tells nobody of a commit: the workers' sweep finds the run."""

    def __init__(self, connection: "psycopg.Connection[Any]") -> None:
        self._connection = connection

    def read(self, statement: str, parameters: Parameters = ()) -> Rows:
        idle = self._is_idle()
        try:
            return self.write(statement, parameters)
        finally:
            if idle and not self._connection.autocommit and not self._connection.closed:
                self._connection.rollback()

    def write(self, statement: str, parameters: Parameters = ()) -> Rows:
        from psycopg.rows import tuple_row

        with translated(), self._connection.cursor(row_factory=tuple_row) as cursor:
            return cursor.execute(statement, parameters).fetchall()

    def after_commit(self, call: Call) -> None:
        if self._connection.autocommit and self._is_idle():
            call()

    def _is_idle(self) -> bool:
        from psycopg.pq import TransactionStatus

        return self._connection.info.transaction_status == TransactionStatus.IDLE


class ConnectionDatabase:
    """A SQLAlchemy Connection."""

    def __init__(self, connection: "Connection") -> None:
        if connection.dialect.name != "postgresql":
            raise Misuse(f"Stepfast stands in Postgres, and this connection is to {connection.dialect.name}.")
        if connection.dialect.driver != "psycopg":
            raise Misuse(
                f"Stepfast joins SQLAlchemy on psycopg, and this connection's driver is {connection.dialect.driver}.",
                next_step="Use a URL of postgresql+psycopg://, or pass no connection.",
            )
        self._connection = connection

    def read(self, statement: str, parameters: Parameters = ()) -> Rows:
        idle = not self._connection.in_transaction()
        try:
            return self.write(statement, parameters)
        finally:
            if idle:
                self._connection.rollback()

    def write(self, statement: str, parameters: Parameters = ()) -> Rows:
        with translated():
            return self._connection.exec_driver_sql(statement, tuple(parameters)).all()

    def after_commit(self, call: Call) -> None:
        """SQLAlchemy tells as the COMMIT leaves. Where a message overtakes it, the sweep starts the run."""
        from sqlalchemy import event

        if is_autocommit(self._connection):
            call()
        else:
            if self._connection not in _waiting:
                _waiting[self._connection] = []
                event.listen(self._connection, "commit", _commit_left)
                event.listen(self._connection, "rollback", lambda connection: _waiting[connection].clear())
            _waiting[self._connection].append(call)


def _commit_left(connection: "Connection") -> None:
    calls, _waiting[connection] = _waiting[connection], []
    for call in calls:
        call()


_waiting: "WeakKeyDictionary[Connection, list[Call]]" = WeakKeyDictionary()


class SessionDatabase:
    """A SQLAlchemy Session."""

    def __init__(self, session: "Session") -> None:
        self._session = session

    def read(self, statement: str, parameters: Parameters = ()) -> Rows:
        from sqlalchemy import Engine

        bind = self._session.get_bind()
        if self._session.in_transaction() or not isinstance(bind, Engine):
            return self.write(statement, parameters)
        with bind.connect() as connection:
            return ConnectionDatabase(connection).write(statement, parameters)

    def write(self, statement: str, parameters: Parameters = ()) -> Rows:
        return ConnectionDatabase(self._session.connection()).write(statement, parameters)

    def after_commit(self, call: Call) -> None:
        if is_autocommit(self._session.connection()):
            call()
            return
        _listen_to_sessions()
        self._session.info.setdefault(_INFO, []).append(call)


def is_autocommit(connection: "Connection") -> bool:
    return bool(getattr(connection.connection.driver_connection, "autocommit", False))


_listening = False


def _listen_to_sessions() -> None:
    """Once for all sessions: a listener for each call would stay on a session that lives long."""
    global _listening  # noqa: PLW0603
    if _listening:
        return
    _listening = True
    from sqlalchemy import event
    from sqlalchemy.orm import Session

    @event.listens_for(Session, "after_commit")
    def _committed(session: Session) -> None:
        if not session.in_nested_transaction():
            for call in session.info.pop(_INFO, ()):
                call()

    # After a commit nothing is left; else it was rolled back, also by a mere `close`, of which no other event tells.
    @event.listens_for(Session, "after_transaction_end")
    def _ended(session: Session, transaction: Any) -> None:  # noqa: ANN401  # SQLAlchemy's
        if transaction.parent is None:
            session.info.pop(_INFO, None)


def database(connection: object) -> Database:
    """The shape of a host's connection. Raises Misuse for what is none."""
    if "psycopg" in sys.modules:
        import psycopg

        if isinstance(connection, psycopg.Connection):
            return PsycopgDatabase(connection)
    if all(hasattr(connection, name) for name in ("read", "write", "after_commit")):
        return connection  # type: ignore[return-value]
    if hasattr(connection, "vendor") and hasattr(connection, "alias"):
        from stepfast.django.databases import DjangoDatabase

        return DjangoDatabase(str(connection.alias))
    if "sqlalchemy" in sys.modules:
        from sqlalchemy import Connection
        from sqlalchemy.orm import Session, scoped_session

        if isinstance(connection, scoped_session):
            return SessionDatabase(connection())
        if isinstance(connection, Session):
            return SessionDatabase(connection)
        if isinstance(connection, Connection):
            return ConnectionDatabase(connection)
    raise Misuse(
        f"{type(connection).__name__} is no connection that Stepfast can join.",
        next_step="Pass a Django connection, a SQLAlchemy Session or Connection, or a psycopg Connection; "
        "of an AsyncSession, call this inside its run_sync.",
    )
