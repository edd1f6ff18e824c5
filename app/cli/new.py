"""`stepfast new`."""

from pathlib import Path
from shlex import quote

import click

from app import settings
from app.cli.output import clean, print_next
from app.errors import Misuse


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--name", help="The pipeline's name; the folder's by default.")
@click.option("--from", "skill", type=click.Path(path_type=Path), metavar="SKILL", help="Complete this skill file.")
def command(folder: Path | None, name: str | None, skill: Path | None) -> None:
    """Write a starter skill into FOLDER (here by default), or what is missing beside a skill file (--from).

    Nothing is ever overwritten.
    """
    from app.pipelines import loader, starter

    if skill is None:
        target = folder or Path()
        written = starter.create(target, name or target.resolve().name)
        file = written[0]
    elif folder or name:
        raise Misuse("--from completes a skill file where it lies, so it takes no FOLDER and no --name.")
    else:
        configured = settings.load()
        written = starter.complete(skill, aliases=configured.model_aliases, handler_modules=configured.handler_modules)
        file = loader.find(skill)
    for path in written:
        print(clean(f"Wrote {path}"))
    if not written:
        print(clean(f"Nothing is missing beside {file}."))
    print_next(f"stepfast audit {quote(str(file))}")
