"""`stepfast runs`."""

import click

from app.cli import embedding, inputs, output, show, system
from app.runs.states import RunState


@click.command()
@click.option("--state", type=click.Choice([state.value for state in RunState]), help="Only runs in this state.")
@click.option("--pipeline", metavar="NAME", help="Only runs of this pipeline.")
@click.option("--tenant", help="Only runs of this tenant.")
@click.option("--label", "labels", multiple=True, metavar="K=V", help="Only runs with this label. Repeatable.")
@click.option("--limit", type=click.IntRange(1, 1_000), default=20, show_default=True, help="At most so many.")
@embedding.option
@click.option("--json", "as_json", is_flag=True, help="Print a list of runs.")
def command(
    state: str | None,
    pipeline: str | None,
    tenant: str | None,
    labels: tuple[str, ...],
    limit: int,
    embedded: bool,
    as_json: bool,
) -> None:
    """List runs, newest first."""
    labelled = inputs.labels(labels)
    worker = system.database(embedded=embedded)
    from app.runs.reads import Reads

    reads = Reads(worker.store.engine)
    found = reads.run_list(limit=limit, state=state, pipeline=pipeline, tenant=tenant, labels=labelled)
    if as_json:
        output.print_json(found)
    elif not found:
        narrowed = state or pipeline or tenant or labels
        print("There is no such run." if narrowed else "There is no run yet.")
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
