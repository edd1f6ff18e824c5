"""`stepfast audit`."""

from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import click

from app import settings
from app.cli import output, system
from app.errors import InvalidFile

if TYPE_CHECKING:
    from collections.abc import Collection

    from app.errors import Fault


@click.command()
@click.argument("skill", type=click.Path(path_type=Path))
@click.option(
    "--json", "as_json", is_flag=True, help="Print {skill, ok, name, version, hash, canvas, faults}; exit 2 on errors."
)
def command(skill: Path, as_json: bool) -> int:
    """Check a skill file and what lies beside it. Needs no database and no key.

    Reports every fault at once, each with its file, line and column; then prints the canvas that the file compiles to.
    """
    from app.pipelines import loader, plan

    configured = settings.load()
    checked = loader.check(skill, aliases=configured.model_aliases, handler_modules=configured.handler_modules)
    pipeline = checked.pipeline
    if as_json:
        output.print_json(
            {
                "skill": str(loader.find(skill)),
                "ok": pipeline is not None,
                "name": pipeline.name if pipeline else None,
                "version": pipeline.version if pipeline else None,
                "hash": pipeline.hash if pipeline else None,
                "canvas": plan.render(pipeline).splitlines() if pipeline else [],
                "faults": [asdict(fault) for fault in checked.faults],
            }
        )
    else:
        for fault in checked.faults:
            print(output.clean(str(fault)))
        if pipeline:
            print(f"{pipeline.name} {pipeline.version} is valid. Its canvas:")
            print("\n".join(f"  {line}" for line in plan.render(pipeline).splitlines()))
            output.print_next(system.run_command(loader.find(skill), pipeline))
        else:
            output.print_next(_next_command(loader.find(skill), checked.faults))
    return 0 if pipeline else InvalidFile.exit_code


def _next_command(skill: Path, faults: "Collection[Fault]") -> str:
    """What is missing beside a sound file, `new` writes; anything else the author must mend first."""
    if all(fault.message.endswith("is missing.") for fault in faults if fault.severity == "error"):
        return f"stepfast new --from {quote(str(skill))}"
    return f"stepfast audit {quote(str(skill))}"
