"""`stepfast migrate`."""

import click

from app.cli import output, system


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print {before, after}: the migrations' numbers.")
def command(as_json: bool) -> None:
    """Bring the database to this version's schema. Safe to repeat, beside running workers too."""
    url = system.database_url()
    system.log_to_stderr()
    from app.runs.database import head_revision, migrate

    before, after = migrate(url)
    if as_json:
        output.print_json({"before": before, "after": after})
    elif before == after:
        newer = after is not None and after > head_revision()
        print(f"The database is at migration {after} already{', which is newer than this version' if newer else ''}.")
    else:
        print(f"The database is at migration {after} now; it was at {before or 'none'}.")
