"""`stepfast runs`."""

import click

from app.cli import embedding, output, show, system
from app.runs.states import RunState


@click.command()
@click.option("--state", type=click.Choice([state.value for state in RunState]), help="Only runs in this state.")
@click.option("--pipeline", metavar="NAME", help="Only runs of this pipeline.")
@click.option("--limit", type=click.IntRange(1, 1_000), default=20, show_default=True, help="At most so many.")
@embedding.option
@click.option("--json", "as_json", is_flag=True, help="Print a list of runs.")
def command(state: str | None, pipeline: str | None, limit: int, embedded: bool, as_json: bool) -> None:
    """List runs, newest first."""
    worker = system.database(embedded=embedded)
    from app.runs.reads import Reads

    found = Reads(worker.store.engine).run_list(limit=limit, state=state, pipeline=pipeline)
    if as_json:
        output.print_json(found)
    elif not found:
        print("There is no such run." if state or pipeline else "There is no run yet.")
        output.print_next("stepfast run SKILL")
    else:
        columns = ("run", "pipeline", "state", "steps", "started", "time", "cost")
        rows = [
            (
                output.short(run["id"]),
                run["pipeline"],
                show.state(run),
                f"{run['completed']}/{run['steps']}",
                output.moment(run["started_at"] or run["created_at"]),
                output.took(run),
                output.dollars(run["cost_usd"]),
            )
            for run in found
        ]
        output.console().print(output.table(columns, rows, right=("steps", "time", "cost")))
