"""`stepfast dead`."""

import json
from typing import TYPE_CHECKING
from uuid import UUID

import click

from app.cli import embedding, output, system
from app.errors import Misuse
from app.redaction import redact
from app.runs.explain import NOT_BY_RESUME

if TYPE_CHECKING:
    from app.pipelines.model import Json
    from app.runs.reads import Reads

_DETAILS_MAX_CHARS = 4_000
_MESSAGE_MAX_CHARS = 200
_ONE = {"show", "discard"}


@click.command()
@click.argument("action", type=click.Choice(["groups", "list", "show", "discard"]), default="groups")
@click.argument("letter", metavar="[ID]", required=False)
@click.option("--all", "include_resolved", is_flag=True, help="With `list`: resolved ones too.")
@click.option("--limit", type=click.IntRange(1, 1_000), default=20, show_default=True, help="At most so many.")
@embedding.option
@click.option("--json", "as_json", is_flag=True, help="Print a list of groups or of dead letters, or the one.")
def command(action: str, letter: str | None, include_resolved: bool, limit: int, embedded: bool, as_json: bool) -> None:
    """Group the dead letters that wait for somebody by what went wrong, the most recent first.

    `dead list` lists them one by one, `dead show ID` says all of one, and `dead discard ID` resolves one without doing
    its step again. ID is the beginning of a dead letter's id.
    """
    if (action in _ONE) != (letter is not None):
        raise Misuse(
            "`dead show` and `dead discard` take the ID of a dead letter; `dead` and `dead list` take none.",
            next_step="See: stepfast dead list",
        )
    if include_resolved and action != "list":
        raise Misuse("--all belongs to `dead list`.", next_step="See: stepfast dead --help")
    worker = system.database(embedded=embedded)
    from app import operations
    from app.runs.reads import Reads

    reads = Reads(worker.store.engine)
    if letter is not None:
        letter_id = reads.dead_letter_id(letter)
        if action == "discard":
            operations.discard_letter(worker, letter_id, by=system.user())
        _show(reads, reads.dead_letter(letter_id), as_json=as_json)
        return
    if action == "groups":
        found = [{**entry, "command": _command(entry)} for entry in reads.dead_letter_groups(limit=limit)]
        columns, rows = ("count", "agent", "code", "newest", "example", "message"), map(_group_row, found)
    else:
        found = reads.dead_letter_list(include_resolved=include_resolved, limit=limit)
        columns, rows = ("id", "run", "agent", "code", "created", "message"), map(_row, found)
    if as_json:
        output.print_json(found)
    elif not found:
        print("There is no dead letter.")
    else:
        output.console().print(output.table(columns, rows, right=("count",)))
        following = found[0]["command"] if action == "groups" else f"stepfast dead show {output.short(found[0]['id'])}"
        output.print_next(embedding.following(following, embedded=embedded))


def _command(group: "Json") -> str:
    """What to type next about a group: what a resume cannot mend is looked at."""
    if group["code"] in NOT_BY_RESUME:
        return f"stepfast dead show {output.short(group['example'])}"
    if group["count"] == 1:
        return f"stepfast resume {output.short(group['run_id'])}"
    return f"stepfast resume --failed --pipeline {group['payload']['pipeline']}"


def _group_row(group: "Json") -> tuple[str, ...]:
    return (
        f"{group['count']:,}",
        f"{group['payload']['pipeline']}.{group['agent']}",
        group["code"],
        output.moment(group["newest"]),
        output.short(group["example"]),
        _message(group),
    )


def _row(entry: "Json") -> tuple[str, ...]:
    return (
        output.short(entry["id"]),
        output.short(entry["run_id"]),
        entry["agent"],
        entry["code"] + (f" ({entry['resolution']})" if entry["resolution"] else ""),
        output.moment(entry["created_at"]),
        _message(entry),
    )


def _message(entry: "Json") -> str:
    return output.cut(str(entry["payload"].get("message", "")), _MESSAGE_MAX_CHARS)


def _show(reads: "Reads", entry: "Json", *, as_json: bool) -> None:
    from app.runs.explain import explain

    payload, run_id = entry["payload"], UUID(entry["run_id"])
    # As it was when the letter was sent; one that no worker has sent yet is explained as it is now.
    explained = payload.get("explanation") or explain(reads.run(run_id), reads.event_list(run_id)).text
    if as_json:
        output.print_json({**entry, "explanation": explained})
        return
    resolved = f"{output.moment(entry['resolved_at'])} UTC, {entry['resolution']} by {entry['resolved_by']}"
    fields = {
        "dead letter": entry["id"],
        "run": entry["run_id"],
        "pipeline": payload["pipeline"],
        "agent": entry["agent"],
        "code": entry["code"],
        "attempts": str(payload["attempts"]),
        "created": f"{output.moment(entry['created_at'])} UTC",
        "resolved": resolved if entry["resolved_at"] else "no",
    }
    output.print_fields(fields)
    print()
    print(output.one_line(explained))
    if payload["details"]:
        print()
        print(output.cut(output.clean(json.dumps(redact(payload["details"]), indent=2)), _DETAILS_MAX_CHARS))
