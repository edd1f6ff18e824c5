"""The tables, the functions that change them, and the triggers that hold whoever writes."""

from pathlib import Path

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

SQL = Path(__file__).parent.parent / "sql" / "0001"
# In the order in which they need each other.
FILES = (
    *("tables", "core", "guards", "consistency", "settle", "enqueue", "claim", "complete", "fail"),
    *("effects", "approve", "operate", "requests", "sweep", "metrics", "prune", "views", "rights", "limits"),
)


def upgrade() -> None:
    # The driver's own execute: the files hold `%` and `:` that are no parameters.
    cursor = op.get_bind().connection.cursor()
    for name in FILES:
        cursor.execute((SQL / f"{name}.sql").read_text())


def downgrade() -> None:
    """Removes everything but Alembic's own table, which stands in the same schema."""
    op.execute("""
        do $$ declare r record; begin
            for r in select format('drop table if exists stepfast.%I cascade', tablename) as statement
                     from pg_tables where schemaname = 'stepfast' and tablename <> 'alembic_version'
            loop execute r.statement; end loop;
            for r in select format('drop function if exists %s cascade', oid::regprocedure) as statement
                     from pg_proc where pronamespace = 'stepfast'::regnamespace
            loop execute r.statement; end loop;
        end $$
    """)
