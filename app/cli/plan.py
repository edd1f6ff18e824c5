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
    for sentence in (*_definition(plan), *_stale(plan), *_consequences(plan), _money(plan)):
        print(output.one_line(sentence))


def _definition(plan: "Json") -> list[str]:
    pinned, published = plan["pinned"], plan["published"]
    if published is None or published["hash"] == pinned["hash"]:
        return []
    said = f"The run stays on the definition that it pinned, {pinned['version']} ({pinned['hash'][:12]})."
    differs = "; ".join(f"{agent}: {', '.join(changes)}" for agent, changes in plan["published_changes"].items())
    told = f" It differs in {differs}." if differs else ""
    return [
        f"{said} {published['version']} ({published['hash'][:12]}) is published now.{told} Only a new run takes it."
    ]


def _stale(plan: "Json") -> list[str]:
    stale = [entry["agent"] for entry in plan["agents"] if entry["verdict"] == "stale"]
    if not stale:
        return []
    name = output.short(plan["run_id"])
    again = f"stepfast resume {name} --from {stale[0]}"
    return [f"Kept, though made from something else than what stands now: {', '.join(stale)}. To redo: {again}"]


def _consequences(plan: "Json") -> list[str]:
    told = []
    if plan["effects"]:
        listed = ", ".join(
            f"{effect['agent']}: {effect['key']} ({effect['state']})"
            if effect["key"] is not None
            else f"{effect['agent']}: whatever it does, which is not on record"
            for effect in plan["effects"]
        )
        told.append(f"Effects that would be repeated: {listed}.")
    if plan["approvals"]:
        told.append(f"Approval will be asked again for {', '.join(plan['approvals'])}.")
    return told


def _money(plan: "Json") -> str:
    unknown = f", and an unknown price for {', '.join(plan['unpriced'])}" if plan["unpriced"] else ""
    return (
        f"Not paid again: {output.dollars(plan['saved_usd'])}. To be spent, as before: "
        f"{output.dollars(plan['estimate_usd'])}{unknown}."
    )
