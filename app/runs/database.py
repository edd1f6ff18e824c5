"""The connection to Postgres: the engine, readiness, and migration."""

import os
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import bindparam, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError
from sqlalchemy.pool import NullPool
from sqlalchemy.types import Text

from app.errors import NotReady

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from sqlalchemy import Connection, Dialect, Engine

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"

# Raised when code and database stop understanding each other; `stepfast.meta.min_code_version` may not be above it.
CODE_VERSION = 1

# A statement that takes longer is a bug or an outage: the step's own retry is better than a hung worker.
STATEMENT_TIMEOUT_MS = 10_000
# Whoever holds a lock of ours holds it for milliseconds. Every function has this limit in itself, too (limits.sql), for
# connections that we cannot set up: a pooler's, and those of applications that call enqueue_v1.
LOCK_TIMEOUT_MS = 5_000
# Nothing of ours waits inside a transaction: one that does belongs to a process that is frozen, and holds its locks.
IDLE_IN_TRANSACTION_TIMEOUT_MS = 30_000
CONNECT_TIMEOUT_S = 5
# A peer that vanished without a word (a lost host, a cut network) is noticed by the kernel within seconds, not hours.
LIVELINESS = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
# A migration waits this long for a lock that a worker holds, and gives up rather than stand in everybody's way.
MIGRATION_LOCK_TIMEOUT_MS = 10_000
MIGRATION_TIMEOUT_MS = 600_000


def engine(url: str, *, pool_max: int, name: str = "") -> "Engine":
    """An engine in autocommit: each of the store's functions is one statement and so one transaction, one round trip.

    No ping before use, which would be a second round trip: whoever must not fail at a lost connection repeats its call.
    Unless they have a `name`, its sessions carry that of the process: while one of them is there, others know it alive.
    Behind a pooler it works as well, where a connection lasts for one transaction: nothing of it outlives a statement.
    """
    address = make_url(url)
    options = (
        f"-c statement_timeout={STATEMENT_TIMEOUT_MS} -c lock_timeout={LOCK_TIMEOUT_MS} -c timezone=UTC"
        f" -c idle_in_transaction_session_timeout={IDLE_IN_TRANSACTION_TIMEOUT_MS}"
        # A sweep over large tables looks dear to the planner, and touches few rows: compiling it takes longer than it.
        " -c jit=off"
        # The last one counts: what the URL says wins.
        f" {address.query.get('options', '')}"
    )
    made = create_engine(
        address.difference_update_query(["options"]),
        isolation_level="AUTOCOMMIT",
        pool_size=pool_max,
        max_overflow=0,
        pool_timeout=30,
        # The one used last, which has its functions' plans: a session's first sweep takes ten times as long.
        pool_use_lifo=True,
        # An error's text must not carry outputs into the logs.
        hide_parameters=True,
        connect_args={
            **LIVELINESS,
            "options": options,
            # migrations/sql/0001/sweep.sql looks for it.
            "application_name": name or f"stepfast {os.getpid()}@{socket.gethostname()}",
        },
    )
    _without_options_behind_a_pooler(made)
    _prepare_nothing_behind_a_pooler(made)
    return made


def _without_options_behind_a_pooler(made: "Engine") -> None:
    """A pooler refuses `options`, which would set up a session that is not ours: then we connect without."""
    refused: list[str] = []

    @event.listens_for(made, "do_connect")
    def connect(dialect: "Dialect", _record: object, args: "list[Any]", given: "dict[str, Any]") -> "Any":  # noqa: ANN401
        if not refused:
            try:
                return dialect.connect(*args, **given)
            except dialect.loaded_dbapi.OperationalError as error:
                if "startup parameter" not in str(error):
                    raise
                refused.append(str(error))
        return dialect.connect(*args, **{name: value for name, value in given.items() if name != "options"})


def _prepare_nothing_behind_a_pooler(made: "Engine") -> None:
    """Psycopg prepares what a session is asked repeatedly: planning takes a quarter of a claim.

    A pooler gives the session to somebody else meanwhile. It is known by this: the session's process is not the one
    that the connection was told of.
    """

    @event.listens_for(made, "connect")
    def connected(connection: "Any", _record: object) -> None:  # noqa: ANN401  # psycopg's, adapted
        own = connection.execute("select pg_backend_pid()").fetchone()[0] == connection.info.backend_pid
        if not own:
            connection.prepare_threshold = None


def is_outage(error: DBAPIError) -> bool:
    """Whether the server or the connection is gone or overloaded, rather than the statement wrong.

    By the classes of SQLSTATE: connection, rollback by the server, resources, shutdown; lock and statement timeouts.
    """
    state = getattr(error.orig, "sqlstate", None)
    if state is None:
        return isinstance(error, OperationalError) or error.connection_invalidated
    return state[:2] in {"08", "40", "53"} or state.startswith("57P") or state in {"55P03", "57014", "25006"}


@contextmanager
def readiness() -> "Iterator[None]":
    """Turns what goes wrong with the server itself into NotReady, in a sentence."""
    try:
        yield
    except ProgrammingError as error:
        if getattr(error.orig, "sqlstate", "") in {"3F000", "42P01", "42883"}:
            raise NotReady("The database has no Stepfast tables.", next_step="Run: stepfast migrate") from error
        raise
    except DBAPIError as error:
        if not is_outage(error):
            raise
        reason = next(iter(str(error.orig).strip().splitlines()), "no answer").rstrip(".")
        raise NotReady(
            f"Postgres cannot be used: {reason}.", next_step="Check STEPFAST_DATABASE_URL and that the server runs."
        ) from error


def check_ready(connection: "Connection") -> None:
    """Raises NotReady where the database is not migrated, behind this code's migrations, or too new for this code."""
    with readiness():
        revision = connection.execute(text("select version_num from stepfast.alembic_version")).scalar_one_or_none()
        minimum = connection.execute(text("select min_code_version from stepfast.meta")).scalar_one()
    if minimum > CODE_VERSION:
        raise NotReady(
            f"The database asks for code version {minimum}, and this is {CODE_VERSION}.", next_step="Upgrade Stepfast."
        )
    # A newer revision than ours is fine: migrations are compatible with running workers.
    if revision is None or revision < head_revision():
        raise NotReady(
            f"The database is at migration {revision}, and this code needs {head_revision()}.",
            next_step="Run: stepfast migrate",
        )


def head_revision() -> str:
    """The newest migration of this code. They are numbered, so that text order is their order."""
    return max(path.name.split("_")[0] for path in (MIGRATIONS / "versions").glob("[0-9]*.py"))


def migrate(url: str, *, revision: str = "head") -> tuple[str | None, str | None]:
    """Brings the schema to a revision ("base" removes it). Returns the revisions before and after.

    Several may call at once: one migrates, the others wait and find nothing to do. So does an older version of the code
    that the newer schema still admits. Raises NotReady where it does not, or where the schema is of unknown age.
    """
    from alembic import command
    from alembic.config import Config
    from alembic.migration import MigrationContext

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.set_main_option("path_separator", "os")
    once = create_engine(url, poolclass=NullPool, connect_args={**LIVELINESS, "prepare_threshold": None})
    with readiness(), once.connect() as connection:
        connection.execute(text(f"set local lock_timeout = {MIGRATION_LOCK_TIMEOUT_MS}"))
        connection.execute(text(f"set local statement_timeout = {MIGRATION_TIMEOUT_MS}"))
        # (7083, -1): beside the workers' ids, which are positive, and the sweeper's 0.
        connection.execute(text("select pg_advisory_xact_lock(7083, -1)"))
        connection.execute(text("create schema if not exists stepfast"))
        config.attributes["connection"] = connection
        state = MigrationContext.configure(connection, opts={"version_table_schema": "stepfast"})
        before = state.get_current_revision()
        if before is None and connection.execute(text("select to_regclass('stepfast.runs')")).scalar():
            raise NotReady(
                "The database has Stepfast's tables, and does not say at which migration they are.",
                next_step="Restore stepfast.alembic_version from a backup.",
            )
        if before is not None and before > head_revision():
            check_ready(connection)
        elif revision == "base":
            command.downgrade(config, revision)
        else:
            command.upgrade(config, revision)
            check_ready(connection)
        after = state.get_current_revision()
        connection.commit()
    return before, after


def allow(url: str, rights: "Mapping[str, str]") -> None:
    """Gives roles their rights (`client` or `operator`) in this database. Raises NotReady where a role is missing."""
    if not rights:
        return
    once = engine(url, pool_max=1)
    try:
        with readiness(), once.connect() as connection:
            for role, right in rights.items():
                connection.execute(
                    text("select stepfast.allow_v1(:role, :right)").bindparams(bindparam("role", type_=Text())),
                    {"role": role, "right": right},
                )
    except ProgrammingError as error:
        if getattr(error.orig, "sqlstate", "") != "42704":
            raise
        raise NotReady(
            f"There is no role {role} on this server.", next_step="Make it first: create role NAME login."
        ) from error
    finally:
        once.dispose()
