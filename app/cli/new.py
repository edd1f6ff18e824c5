"""`stepfast new`."""

from pathlib import Path
from shlex import quote

import click

from app import settings
from app.cli.output import clean, print_next
from app.errors import InvalidFile, Misuse


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), required=False)
@click.option("--name", help="The pipeline's name; the folder's by default.")
@click.option("--from", "skill", type=click.Path(path_type=Path), metavar="SKILL", help="Complete this skill file.")
def command(folder: Path | None, name: str | None, skill: Path | None) -> int:
    """Write a starter skill into FOLDER (here by default), or what is missing beside a skill file (--from).

    Nothing is ever overwritten: what is wrong with what exists already is said, with exit code 2.
    """
    from app.pipelines import loader, starter

    configured = settings.load()
    if skill is None:
        target = folder or Path()
        written = starter.create(target, name or target.resolve().name)
        file = written[0]
    elif folder or name:
        raise Misuse("--from completes a skill file where it lies, so it takes no FOLDER and no --name.")
    else:
        written = starter.complete(skill, aliases=configured.model_aliases, handler_modules=configured.handler_modules)
        file = loader.find(skill)
    for path in written:
        print(clean(f"Wrote {path}"))
    # What exists is left alone, also where it lacks something, such as a function in handlers.py.
    checked = loader.check(file, aliases=configured.model_aliases, handler_modules=configured.handler_modules)
    for fault in checked.faults:
        print(clean(str(fault)))
    if not written and not checked.faults:
        print(clean(f"Nothing is missing beside {file}."))
    print_next(f"stepfast audit {quote(str(file))}")
    return 0 if checked.pipeline else InvalidFile.exit_code
