"""`stepfast resume --plan`: what a resume would do, agent by agent, and what it would cost."""

from typing import TYPE_CHECKING

from app.cli import embedding, output, system

if TYPE_CHECKING:
    from app.pipelines.model import Json


def show(run: str, from_agent: str | None, *, embedded: bool, as_json: bool) -> None:
    """Prints the plan. Raises NotPossible where the resume would."""
    worker = system.database(embedded=embedded)
    from app import operations
    from app.runs.reads import Reads

    run_id = Reads(worker.store.engine).run_id(run)
    plan = operations.plan_resume(worker, run_id, system.user(), from_agent=from_agent)
    if as_json:
        output.print_json(plan)
        return
    _print(plan)
    agent = f" --from {from_agent}" if from_agent else ""
    command = f"stepfast resume {output.short(str(run_id))}{agent}"
    output.print_next(embedding.following(command, embedded=embedded))


def _print(plan: "Json") -> None:
    from app.runs.resume_plan import sentences

    rows = [
        (
            entry["agent"],
            entry["verdict"],
            entry["reason"],
            ", ".join(entry["changed"]) or "-",
            output.dollars(entry["cost_usd"]),
        )
        for entry in plan["agents"]
    ]
    output.console().print(output.table(("agent", "plan", "because", "changed", "cost"), rows, right=("cost",)))
    print()
    for sentence in sentences(plan):
        print(output.one_line(sentence))
