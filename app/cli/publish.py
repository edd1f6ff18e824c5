"""`stepfast publish`."""

from pathlib import Path

import click

from app.cli import output, system


@click.command()
@click.argument("skill", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print {name, version, hash, new}.")
def command(skill: Path, as_json: bool) -> None:
    """Store a skill's definition, prompts and schemas by their hash, and move its name to it.

    Runs that have started keep the definition they started with. A version, once published, does not change.
    """
    pipeline = system.load_skill(skill)
    worker = system.database()
    from app import operations

    new = operations.publish(worker, pipeline)
    if as_json:
        output.print_json({"name": pipeline.name, "version": pipeline.version, "hash": pipeline.hash, "new": new})
        return
    print(f"{pipeline.name} {pipeline.version} is published{'' if new else ' already'}, as {pipeline.hash[:12]}.")
    output.print_next(system.run_command(pipeline.name, pipeline))
