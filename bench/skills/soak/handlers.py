"""The soak's effect: a line in a file that the whole soak shares, counted at its end."""

from pathlib import Path
from typing import Any

from app.agents import Context, Happened, NotHappened, effects_once


@effects_once
def deploy(ctx: Context) -> dict[str, Any]:
    """Appends the run's id, once; whoever comes after a death looks into the file first."""
    file = Path(ctx.run.input["effects"])
    line = f"{ctx.run.id}\n"

    def append() -> dict[str, Any]:
        with file.open("a") as effects:
            effects.write(line)
        return {"deployed": True}

    def check() -> Happened | NotHappened:
        happened = file.exists() and line in file.read_text()
        return Happened({"deployed": True}) if happened else NotHappened()

    return ctx.once("deploy", append, check=check)
