"""`stepfast audit --run`: the checklist, asked of what happened."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from app import settings
from app.cli import embedding, output, system

if TYPE_CHECKING:
    from app.runs.promises import Promise

_STYLES = {"kept": "green", "broken": "red", "not applicable": "dim"}


def show(name: str, *, embedded: bool, as_json: bool) -> int:
    """Prints each promise with its evidence. Returns 1 where one is broken."""
    worker = system.database(embedded=embedded)
    from app.runs.invariants import check
    from app.runs.promises import History, judge
    from app.runs.reads import Reads

    reads = Reads(worker.store.engine)
    run_id = reads.run_id(name)
    with worker.store.engine.connect() as connection:
        violations = check(connection, run_id)
    run = reads.run(run_id)
    pipeline = worker.definition(run["pipeline_hash"])
    aliases = settings.load().model_aliases
    promises = judge(History(run, reads.event_list(run_id), reads.effect_list(run_id), violations, pipeline, aliases))
    broken = any(promise.verdict == "broken" for promise in promises)
    if as_json:
        listed = [asdict(promise) for promise in promises]
        output.print_json({"run": str(run_id), "ok": not broken, "promises": listed})
    else:
        for promise in promises:
            _print(promise)
        if broken:
            output.print_next(embedding.following(f"stepfast explain {output.short(str(run_id))}", embedded=embedded))
    return 1 if broken else 0


def _print(promise: "Promise") -> None:
    from rich.text import Text

    verdict = Text(f"{promise.verdict:<14}  ", style=_STYLES[promise.verdict])
    first, *others = promise.evidence
    console = output.console()
    console.print(verdict + Text(f"{promise.rule:<25}  {output.one_line(first)}"), soft_wrap=True)
    for evidence in others:
        console.print(Text(f"{'':<43}{output.one_line(evidence)}"), soft_wrap=True)
