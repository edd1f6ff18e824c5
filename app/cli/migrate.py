"""`stepfast migrate`."""

import click

from app.cli import output, system


@click.command()
@click.option(
    "--client",
    "clients",
    multiple=True,
    metavar="ROLE",
    help="Let this role start runs and read the views. Repeatable.",
)
@click.option(
    "--operator",
    "operators",
    multiple=True,
    metavar="ROLE",
    help="Let this role also approve, reject, resume and cancel. Repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print {before, after}: the migrations' numbers.")
def command(clients: tuple[str, ...], operators: tuple[str, ...], as_json: bool) -> None:
    """Bring the database to this version's schema. Safe to repeat, beside running workers too.

    --client and --operator give rights, in this database alone, to roles that exist. Give them at every migration, so
    that they cover what it adds.
    """
    url = system.database_url()
    system.log_to_stderr()
    from app.runs.database import allow, head_revision, migrate

    before, after = migrate(url)
    allow(url, dict.fromkeys(clients, "client") | dict.fromkeys(operators, "operator"))
    if as_json:
        output.print_json({"before": before, "after": after})
    elif before == after:
        newer = after is not None and after > head_revision()
        print(f"The database is at migration {after} already{', which is newer than this version' if newer else ''}.")
    else:
        print(f"The database is at migration {after} now; it was at {before or 'none'}.")
