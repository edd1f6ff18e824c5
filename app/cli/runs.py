"""`stepfast runs`."""

from typing import TYPE_CHECKING

import click

from app.cli import embedding, inputs, output, show, system
from app.errors import Misuse
from app.runs.states import RunState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from app.pipelines.model import Json
    from app.runs.reads import Reads

# Whatever goes on by itself does something within it.
STILL_S = 60
WHY_MAX_CHARS = 300


@click.command()
@click.option("--state", type=click.Choice([state.value for state in RunState]), help="Only runs in this state.")
@click.option("--pipeline", metavar="NAME", help="Only runs of this pipeline.")
@click.option("--tenant", help="Only runs of this tenant.")
@click.option("--label", "labels", multiple=True, metavar="K=V", help="Only runs with this label. Repeatable.")
@click.option(
    "--stuck", is_flag=True, help="Only unfinished runs that do not go on: since when, and what they wait for."
)
@click.option("--limit", type=click.IntRange(1, 1_000), default=20, show_default=True, help="At most so many.")
@embedding.option
@click.option("--json", "as_json", is_flag=True, help="Print a list of runs.")
def command(
    state: str | None,
    pipeline: str | None,
    tenant: str | None,
    labels: tuple[str, ...],
    stuck: bool,
    limit: int,
    embedded: bool,
    as_json: bool,
) -> None:
    """List runs, newest first.

    With --stuck: unfinished runs in which nothing has happened for a minute, the longest first, such as those that wait
    for a person, for a worker that nobody started, or for another run; not those in a backlog that workers work off.
    """
    if stuck and (state or tenant or labels):
        raise Misuse("--stuck goes with --pipeline, --limit and --json.", next_step="See: stepfast runs --help")
    labelled = inputs.labels(labels)
    worker = system.database(embedded=embedded)
    from app.runs.health import Health
    from app.runs.reads import Reads

    reads = Reads(worker.store.engine)
    if stuck:
        _stuck(
            reads, Health(worker.store.engine).still(still_s=STILL_S, pipeline=pipeline, limit=limit), as_json=as_json
        )
        return
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


def _stuck(reads: "Reads", found: "Sequence[Json]", *, as_json: bool) -> None:
    """Each with what it waits for, and the command that may help, as `explain` says them."""
    from app.runs.explain import explain

    rows = []
    for entry in found:
        told = explain(reads.run(entry["run_id"]), reads.event_list(entry["run_id"]))
        times = {name: entry[name].isoformat(timespec="milliseconds") for name in ("since", "created_at")}
        rows.append({**entry, "run_id": str(entry["run_id"]), **times, "why": told.why, "command": told.command})
    if as_json:
        output.print_json(rows)
        return
    if not rows:
        print("No run is stuck.")
        return
    columns = ("run", "pipeline", "state", "since", "waits for")
    cells = [
        (
            output.short(row["run_id"]),
            row["pipeline"],
            row["state"],
            output.moment(row["since"]),
            output.cut(output.one_line(row["why"]), WHY_MAX_CHARS),
        )
        for row in rows
    ]
    output.console().print(output.table(columns, cells))
    output.print_next(rows[0]["command"])
