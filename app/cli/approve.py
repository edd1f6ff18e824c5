"""`stepfast approve`, and what `reject` has in common with it."""

from typing import TYPE_CHECKING
from uuid import UUID

import click

from app.cli import embedding, output, readable, system
from app.errors import Misuse, NotPossible
from app.pipelines.feedback import redacted_feedback
from app.redaction import redact
from app.runs.states import StepState

if TYPE_CHECKING:
    from app.execution.worker import Worker
    from app.pipelines.model import Json, Pipeline

DIGEST_SHOWN_CHARS = 12


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
    found, pipeline, approval = waiting(worker, run, agent)
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


def waiting(worker: "Worker", run: str, agent: str) -> "tuple[Json, Pipeline, Json]":
    """A run, its definition, and the open request of an agent. Raises UnknownName; NotPossible where none is open."""
    from app.runs.reads import Reads

    reads = Reads(worker.store.engine)
    found = reads.run(reads.run_id(run))
    pipeline = worker.definition(found["pipeline_hash"])
    from app import operations

    operations.known_agent(pipeline, agent)
    of_agent = [entry for entry in found["approvals"] if entry["agent"] == agent]
    step = next(step for step in found["steps"] if step["agent"] == agent)
    if step["state"] == StepState.SUSPENDED and of_agent and of_agent[-1]["state"] == "requested":
        return found, pipeline, of_agent[-1]
    decided = [entry for entry in of_agent if entry["decided_by"]]
    known = _decided(decided[-1]) if decided else ""
    others = [other["agent"] for other in found["steps"] if other["state"] == StepState.SUSPENDED]
    name = output.short(found["id"])
    raise NotPossible(
        f"{agent} waits for no decision: it is {step['state']}.{known}",
        next_step=f"{others[0]} waits: stepfast approve {name} {others[0]}" if others else f"See: stepfast show {name}",
    )


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


def _decided(approval: "Json") -> str:
    return f" It was {approval['state']} by {approval['decided_by']} at {output.moment(approval['decided_at'])} UTC."


def _show(run: "Json", pipeline: "Pipeline", agent_id: str, approval: "Json") -> int:
    """What will be done, as it was when it was asked for. Returns how many lines were left out."""
    agent = pipeline.by_id[agent_id]
    step = next(step for step in run["steps"] if step["agent"] == agent_id)
    asking = next(entry for entry in step["tries"] if entry["id"] == approval["attempt_id"])
    expires = approval["expires_at"]
    fields = {
        "agent": f"{agent_id} of {pipeline.name} {pipeline.version}, run {output.short(run['id'])}",
        "does": f"asks {agent.model}" if agent.model else f"calls {agent.handler}",
        "code": (asking["code_hash"] or "")[:DIGEST_SHOWN_CHARS],
        "gate": f"{agent.gate}, which held" if agent.gate else "",
        "reads": ", ".join(["input", *asking["reads"]]),
        "digest": approval["digest"][:DIGEST_SHOWN_CHARS],
        "requested": f"{output.moment(approval['requested_at'])} UTC",
        "expires": f"{output.moment(expires)} UTC" if expires else "never",
    }
    output.print_fields({name: value for name, value in fields.items() if value})
    unseen = readable.print_value("input", _redacted(run["input"], pipeline.input_schema))
    by_id = {entry["id"]: entry for other in run["steps"] for entry in other["tries"]}
    for name, read in asking["reads"].items():
        shown = _redacted(by_id[read["attempt"]]["output"], pipeline.by_id[name].schema)
        unseen += readable.print_value(f"output of {name}", shown)
    if step["feedback"]:
        unseen += readable.print_value("sent back with", redacted_feedback(step["feedback"], pipeline) or {})
    print()
    return unseen


def _redacted(value: "Json", schema: "Json | None") -> "Json":
    shown = redact(value, schema)
    assert isinstance(shown, dict)
    return shown
