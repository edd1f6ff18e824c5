"""`stepfast show`, and how a run is shown elsewhere."""

from typing import TYPE_CHECKING
from uuid import UUID

import click

from app.cli import embedding, output, system
from app.cli.embedding import Embedding
from app.errors import Misuse
from app.redaction import redact
from app.runs.explain import explain, stale_reads
from app.runs.states import RunState

if TYPE_CHECKING:
    from rich.table import Table

    from app.execution.worker import Worker
    from app.pipelines.model import Json
    from app.runs.reads import Reads


@click.command()
@click.argument("run")
@click.option("--follow", is_flag=True, help="Follow the run to its end; exit 1 if it fails.")
@click.option("--agent", metavar="AGENT", help="Show what AGENT was given, what it gave, and what was approved of it.")
@click.option("--attempt", type=click.IntRange(min=1), metavar="N", help="With --agent: its Nth attempt.")
@click.option("--timeline", is_flag=True, help="Draw when each attempt began and ended, and what was waited for.")
@embedding.option
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON: the run with its attempts and outputs.")
def command(
    run: str, follow: bool, agent: str | None, attempt: int | None, timeline: bool, embedded: bool, as_json: bool
) -> int:
    """Show a run: its steps, what they cost, and what went wrong. RUN is the beginning of its id, or `last`."""
    if follow + timeline + bool(agent) > 1 or (attempt and not agent):
        raise Misuse(
            "--follow, --timeline and --agent each show a run in another way; --attempt belongs to --agent.",
            next_step="See: stepfast show --help",
        )
    worker = system.database(embedded=embedded)
    from app.runs.reads import Reads

    reads = Reads(worker.store.engine)
    run_id = reads.run_id(run)
    if follow:
        from app.cli import watch

        fields: Json | None = {} if as_json else None
        return watch.finish(worker, run_id, follow=True, fields=fields, embedding=Embedding() if embedded else None)
    here = Embedding() if embedded else None
    if not (as_json or agent or timeline):
        _show(reads, run_id, here)
        return 0
    document = _document(worker, run_id, agent, attempt, timeline=timeline)
    if as_json:
        output.print_json(document)
    elif agent:
        from app.cli import saw

        saw.show(document)
    else:
        from app.cli import timeline as waterfall

        waterfall.show(document)
        print_ending(reads.run(run_id), reads, here)
    return 0


def _document(worker: "Worker", run_id: UUID, agent: str | None, attempt: int | None, *, timeline: bool) -> "Json":
    from app import operations

    if agent:
        return operations.saw(worker, run_id, agent, attempt)
    if timeline:
        from app.cli import timeline as waterfall

        return waterfall.document(worker, run_id)
    return operations.document(worker, run_id)


def _show(reads: "Reads", run_id: UUID, here: Embedding | None) -> None:
    found = reads.run(run_id)
    output.print_fields(
        {
            "run": found["id"],
            "pipeline": f"{found['pipeline']} {found['version']}",
            "state": state(found),
            **_asked_for(found),
            "started": f"{output.moment(found['started_at'])} UTC" if found["started_at"] else "not yet",
            "time": output.took(found),
            "cost": cost(found["totals"]),
        }
    )
    print()
    output.console().print(steps_table(found))
    print_ending(found, reads, here)


def _asked_for(run: "Json") -> dict[str, str]:
    """What whoever started it asked for beside the default."""
    labels = redact(run["labels"])
    assert isinstance(labels, dict)
    fields = {
        "key": run["key"],
        "tenant": run["tenant"] if run["tenant"] != "default" else "",
        "priority": str(run["priority"]) if run["priority"] else "",
        "labels": ", ".join(f"{name}={value}" for name, value in sorted(labels.items())),
        "deadline": f"{output.moment(run['deadline_at'])} UTC" if run["deadline_at"] else "",
    }
    return {name: value for name, value in fields.items() if value}


def steps_table(run: "Json") -> "Table":
    """A line a step; time, tokens and cost are those of all its attempts. A stale read is marked beside the state."""
    columns = ("agent", "state", "attempts", "time", "tokens in", "out", "cost")
    stale = stale_reads(run)
    return output.table(columns, [_row(step, stale.get(step["agent"])) for step in run["steps"]], right=columns[2:])


def state(run: "Json") -> str:
    return str(run["state"]) + (" (partial)" if run["partial"] else "")


def cost(totals: "Json") -> str:
    if not totals["calls"]:
        return "no calls"
    calls = "1 call" if totals["calls"] == 1 else f"{totals['calls']} calls"
    known = "unknown" if totals["cost_usd"] is None else output.dollars(totals["cost_usd"])
    return f"{known}, {calls}"


def print_ending(run: "Json", reads: "Reads", here: Embedding | None) -> None:
    """What went wrong, or what is waited for, and the one command to type next. Nothing where all is done."""
    if run["state"] == RunState.COMPLETED and not run["partial"]:
        return
    found = explain(run, reads.event_list(UUID(run["id"])))
    print()
    print(output.one_line(found.why))
    if found.command:
        output.print_next(here.extend(found.command) if here else found.command)


def print_now(worker: "Worker", run_id: str, here: Embedding | None) -> None:
    """How a run stands after somebody did something to it: why it rests, or how to follow it."""
    from app.runs.reads import Reads

    reads = Reads(worker.store.engine)
    run = reads.run(UUID(run_id))
    if run["state"] in {RunState.PENDING, RunState.RUNNING, RunState.COMPLETED}:
        follow = f"stepfast show {output.short(run_id)} --follow"
        output.print_next(here.extend(follow) if here else follow)
    else:
        print_ending(run, reads, here)


def _row(step: "Json", stale: list[str] | None) -> tuple[str, ...]:
    tries = step["tries"]
    times = [spent for entry in tries if (spent := output.duration(entry)) is not None]
    used = [entry["usage"] for entry in tries if entry["usage"]]
    costs = [entry["cost_usd"] for entry in tries if entry["cost_usd"] is not None]
    return (
        step["agent"],
        f"{step['state']} (stale read of {', '.join(stale)})" if stale else step["state"],
        str(step["attempts"]),
        output.seconds(sum(times)) if times else "-",
        f"{sum(usage.get('input_tokens', 0) for usage in used):,}" if used else "-",
        f"{sum(usage.get('output_tokens', 0) for usage in used):,}" if used else "-",
        output.dollars(sum(costs) if costs else None),
    )
