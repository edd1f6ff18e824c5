"""Migrations: forward, backward, and the schema that they make."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from app.errors import NotReady
from app.runs.database import LOCK_TIMEOUT_MS, check_ready, engine, head_revision, migrate
from app.runs.tables import metadata


@contextmanager
def connected(url):
    opened = engine(url, pool_max=1)
    with opened.connect() as connection:
        yield connection
    opened.dispose()


def test_migrations_make_the_declared_columns(database_url):
    """tables.py and the migrations declare the same tables, columns, types and nullability."""
    with connected(database_url) as connection:
        context = MigrationContext.configure(
            connection,
            opts={
                "include_schemas": True,
                "version_table_schema": "stepfast",
                "compare_type": True,
                "include_name": lambda name, kind, _: kind != "schema" or name == "stepfast",
            },
        )
        found = compare_metadata(context, metadata)
    # Indexes and foreign keys stand in SQL alone, with their reasons.
    differences = [entry for entry in found if entry[0] not in {"remove_index", "remove_fk", "remove_constraint"}]
    assert differences == []


def test_migrations_go_back_and_forth(empty_database_url):
    """Down removes everything that up made, and up works again."""
    assert migrate(empty_database_url) == (None, head_revision())
    assert migrate(empty_database_url, revision="base") == (head_revision(), None)
    with connected(empty_database_url) as connection:
        left = connection.execute(
            text("select count(*) from pg_proc where pronamespace = 'stepfast'::regnamespace")
        ).scalar_one()
    assert left == 0
    assert migrate(empty_database_url) == (None, head_revision())


def test_newer_schema_is_left_as_it_is(database_url):
    """An older version that the schema still admits finds nothing to migrate: rolling code back must not fail."""
    with connected(database_url) as connection:
        connection.execute(text("update stepfast.alembic_version set version_num = '0099'"))
    assert migrate(database_url) == ("0099", "0099")


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("update stepfast.meta set min_code_version = 99", "asks for code version 99"),
        ("update stepfast.meta set min_code_version = 99; update stepfast.alembic_version set version_num = '0099'", "asks for code version 99"),
        ("delete from stepfast.alembic_version", "does not say at which migration"),
    ],
)  # fmt: skip
def test_schema_that_cannot_be_migrated_is_refused(database_url, statement, said):
    """Too new for this code, or of unknown age: one sentence, and nothing is changed."""
    with connected(database_url) as connection:
        connection.execute(text(statement))
    with pytest.raises(NotReady, match=said):
        migrate(database_url)


def test_several_may_migrate_at_once(empty_database_url):
    """One migrates; the others wait and find nothing to do."""
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: migrate(empty_database_url), range(4)))
    assert sorted(before is None for before, _ in results) == [False, False, False, True]
    assert {after for _, after in results} == {head_revision()}


def test_unmigrated_database_is_not_ready(empty_database_url):
    """The sentence names the command that mends it."""
    with (
        connected(empty_database_url) as connection,
        pytest.raises(NotReady, match="stepfast migrate"),
    ):
        check_ready(connection)


def test_database_that_is_too_new_is_not_ready(database_url):
    """Only `min_code_version` above ours stops us: newer migrations run beside older code."""
    with connected(database_url) as connection:
        connection.execute(text("update stepfast.alembic_version set version_num = '9999'"))
        check_ready(connection)
        connection.execute(text("update stepfast.meta set min_code_version = 99"))
        with pytest.raises(NotReady, match="Upgrade Stepfast"):
            check_ready(connection)


def test_unreachable_database_is_not_ready():
    """No traceback, and the variable to look at."""
    with pytest.raises(NotReady, match="STEPFAST_DATABASE_URL"):
        migrate("postgresql+psycopg://nobody@127.0.0.1:1/none")


def test_every_function_limits_its_waits_for_locks(database_url):
    """Also where no session is set up by us: behind a pooler, and in an application's own transaction."""
    with connected(database_url) as connection:
        found = connection.exec_driver_sql(
            "select proname, proconfig from pg_proc where pronamespace = 'stepfast'::regnamespace and proname ~ '_v1$'"
        ).all()
    assert len(found) > 10
    assert [name for name, limits in found if f"lock_timeout={LOCK_TIMEOUT_MS // 1000}s" not in (limits or ())] == []
