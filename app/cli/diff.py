"""`stepfast diff`."""

from typing import TYPE_CHECKING

import click

from app.cli import embedding, output, system
from app.cli.timeline import lasting

if TYPE_CHECKING:
    from app.pipelines.model import Json

VALUE_MAX_CHARS = 200
LINE_MAX_CHARS = 400
_STYLES = {"+": "green", "-": "red", "@": "cyan"}


@click.command()
@click.argument("first", metavar="RUN")
@click.argument("second", metavar="RUN")
@embedding.option
@click.option("--json", "as_json", is_flag=True, help="Print {first, second, same, changes, agents}.")
def command(first: str, second: str, embedded: bool, as_json: bool) -> None:
    """Say what differs between two runs, agent by agent: inputs, prompt, output, gate, model, code, time and cost.

    A RUN is the beginning of its id, or `last`. Compared are the attempts that count. Long texts are shown as a unified
    diff, bounded and redacted.
    """
    worker = system.database(embedded=embedded)
    from app import operations
    from app.runs.diff import diff
    from app.runs.reads import Reads

    reads = Reads(worker.store.engine)
    documents = [operations.document(worker, reads.run_id(name)) for name in (first, second)]
    one, other = ((document, worker.definition(document["pipeline_hash"])) for document in documents)
    found = diff(one, other)
    if as_json:
        output.print_json(found)
        return
    _print(found)


def _print(found: "Json") -> None:
    for side in ("first", "second"):
        run = found[side]
        partial = " (partial)" if run["partial"] else ""
        spent = output.dollars(run["totals"]["cost_usd"]) if run["totals"]["calls"] else "no paid call"
        took = "not begun" if run["seconds"] is None else lasting(run["seconds"])
        what = f"{run['pipeline']} {run['version']}, {run['state']}{partial}, {took}, {spent}"
        created = f"{output.moment(run['created_at'])} UTC"
        print(output.one_line(f"{side:<6}  {output.short(run['run_id'])}  {created}  {what}"))
    print()
    columns = ("agent", "ended", "generation", "attempts", "time", "cost")
    output.console().print(output.table(columns, [_row(entry) for entry in found["agents"]]))
    for change in found["changes"]:
        _print_change("run", change)
    for entry in found["agents"]:
        for change in entry["changes"]:
            _print_change(entry["agent"], change)
    if found["same"]:
        print("\nThey differ in nothing but time and cost.")


def _row(entry: "Json") -> tuple[str, ...]:
    if entry["only_in"]:
        return (entry["agent"], f"only in the {entry['only_in']}", "", "", "", "")
    facts = entry["facts"]
    return (
        entry["agent"],
        _both(*facts["state"]),
        _both(*map(str, facts["generation"])),
        _both(*map(str, facts["attempts"])),
        _both(*map(lasting, facts["seconds"])),
        _both(*map(output.dollars, facts["cost_usd"])),
    )


def _both(one: str, other: str) -> str:
    return one if one == other else f"{one} -> {other}"


def _print_change(where: str, change: "Json") -> None:
    from rich.text import Text

    console = output.console()
    title = f"\n{output.one_line(where)}: {output.one_line(change['what'])}"
    if change.get("redacted"):
        console.print(Text.assemble((title, "bold"), "\n  differs in what is redacted"), soft_wrap=True)
        return
    console.print(Text(title, style="bold"))
    if "diff" not in change:
        for sign, value in (("-", change["first"]), ("+", change["second"])):
            text = "nothing" if value is None else output.cut(output.one_line(str(value)), VALUE_MAX_CHARS)
            console.print(Text(f"  {sign} {text}", style=_STYLES[sign]), soft_wrap=True)
        return
    for line in change["diff"]:
        shown = output.cut(output.clean(line).replace("\n", "\\n"), LINE_MAX_CHARS)
        console.print(Text(f"  {shown}", style=_STYLES.get(line[:1], "")), soft_wrap=True)
    if change["left_out"]:
        print(f"  ... {change['left_out']:,} more lines: stepfast show RUN --json has them")
