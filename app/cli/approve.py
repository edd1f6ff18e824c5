"""`stepfast approve`, and what `reject` has in common with it."""

from typing import TYPE_CHECKING
from uuid import UUID

import click

from app.cli import embedding, output, readable, system
from app.errors import Misuse, NotPossible

if TYPE_CHECKING:
    from app.execution.worker import Worker
    from app.pipelines.model import Json, Pipeline


@click.command()
@click.argument("run")
@click.argument("agent")
@click.option("--reason", help="Why, for the record.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@embedding.option
@click.option("--json", "as_json", is_flag=True, help="With --yes: print {run_id, agent, decision, digest, by}.")
def command(run: str, agent: str, reason: str | None, yes: bool, embedded: bool, as_json: bool) -> None:
    """Show what AGENT is about to do, ask, and let it. RUN is the beginning of a run's id, or `last`.

    The approval is bound to what was shown: what changes before it is given, or after, must be approved anew.
    """
    if as_json and not yes:
        raise Misuse("--json asks nobody.", next_step="Read what waits without it, then add --yes.")
    worker = system.database_and_broker(embedded=embedded)
    from app import operations
    from app.runs.reads import Reads

    found, pipeline, approval = operations.waiting(worker, Reads(worker.store.engine).run_id(run), agent)
    if not as_json:
        unseen = _show(found, pipeline, agent, approval)
        if not yes:
            rest = f" ({unseen:,} lines were not shown)" if unseen else ""
            alone = Misuse(
                "Nobody can be asked here, so nothing was decided.", next_step="To approve what is shown: add --yes."
            )
            system.ask(f"Approve {agent}{rest}?", alone, "Nothing was decided: it still waits.")
    decision = decide(worker, found["id"], approval, approved=True, reason=reason, as_json=as_json)
    if decision == "expired":
        raise NotPossible(
            f"The request expired at {output.moment(approval['expires_at'])} UTC, so {agent} counts as rejected.",
            next_step=f"To be asked again: stepfast resume {output.short(found['id'])}",
        )
    if not as_json:
        print(f"{agent} is approved, and goes on.")
        follow = f"stepfast show {output.short(found['id'])} --follow"
        output.print_next(embedding.following(follow, embedded=embedded))


def decide(
    worker: "Worker", run_id: str, approval: "Json", *, approved: bool, reason: str | None, as_json: bool
) -> str:
    """Decides on exactly the request that was read. Returns what it became."""
    from app import operations

    by = system.user()
    decision = operations.decide(
        worker,
        UUID(run_id),
        approval["agent"],
        approved=approved,
        by=by,
        reason=reason,
        digest=approval["digest"],
    )
    if as_json and decision != "expired":
        answer = {"run_id": run_id, "agent": approval["agent"], "decision": decision}
        output.print_json({**answer, "digest": approval["digest"], "by": by})
    return decision


def _show(run: "Json", pipeline: "Pipeline", agent_id: str, approval: "Json") -> int:
    """What will be done, as it was when it was asked for. Returns how many lines were left out."""
    from app.runs.asked import asked

    fields, values = asked(run, pipeline, agent_id, approval)
    output.print_fields(fields)
    unseen = sum(readable.print_value(title, value) for title, value in values.items())
    print()
    return unseen
