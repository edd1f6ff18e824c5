"""`stepfast prune`."""

import re
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

import click

from app.cli import embedding, output, system
from app.cli.embedding import say
from app.errors import Misuse

if TYPE_CHECKING:
    from app.runs.prune import Pruning

DEFAULT_DAYS = 30
PROGRESS_EVERY_S = 2.0
_AGE = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def _age(_ctx: click.Context, _param: click.Parameter, text: str) -> timedelta:
    found = _AGE.fullmatch(text.strip())
    if not found:
        raise click.BadParameter(f"{text!r} is no age such as 30d, 12h or 90m.")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


@dataclass(slots=True)
class _Total:
    looked_at: int = 0
    pruned: int = 0
    workers: int = 0
    definitions: int = 0
    kept: Counter[str] = field(default_factory=Counter)


@click.command()
@click.option(
    "--older-than",
    "age",
    metavar="AGE",
    default=f"{DEFAULT_DAYS}d",
    show_default=True,
    callback=_age,
    help="As 30d or 12h.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, and delete nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@embedding.option
@click.option("--json", "as_json", is_flag=True, help="Print {before, dry_run, pruned, kept: {why: runs}, …}.")
def command(age: timedelta, dry_run: bool, yes: bool, embedded: bool, as_json: bool) -> None:
    """Delete runs that ended long ago, with all that is recorded of them: bounded batches, which may be interrupted.

    A run stays that has not ended, that has an open dead letter, a key that is reserved or of unknown outcome, or to
    which something happened since. Idempotency keys that runs share keep their outputs, and start keys their runs' ids;
    counts of metrics stay. Rows of workers that ended so long ago go, too, and definitions so old that no run has any
    more, but for each pipeline's newest. Started again after an interruption, it goes on.
    """
    worker = system.database(embedded=embedded)
    from app.runs.prune import Pruning

    pruning = Pruning(worker.store.engine, age)
    for left_s in pruning.count_events():
        say(f"Counting for the metrics what is about to go: {output.seconds(left_s)} of events are left.")
    if not dry_run and not yes:
        found = _through(pruning, dry_run=True)
        if found.pruned:
            alone = Misuse(
                f"{found.pruned:,} runs would be deleted, and nobody can be asked here.",
                next_step="To delete them: add --yes. To see them counted: add --dry-run.",
            )
            question = (
                f"Delete {found.pruned:,} runs that ended before {output.moment(pruning.before.isoformat())} UTC?"
            )
            system.ask(question, alone, "Nothing was deleted.", as_json=as_json)
    total = _through(pruning, dry_run=dry_run)
    for workers, definitions in pruning.rest() if not dry_run else ():
        total.workers += workers
        total.definitions += definitions
    if as_json:
        output.print_json(
            {
                "before": pruning.before.isoformat(),
                "dry_run": dry_run,
                "looked_at": total.looked_at,
                "pruned": total.pruned,
                "kept": dict(total.kept),
                "workers": total.workers,
                "definitions": total.definitions,
            }
        )
    else:
        _say(pruning, total, dry_run=dry_run)


def _through(pruning: "Pruning", *, dry_run: bool) -> _Total:
    """All batches, with progress."""
    total, said_s = _Total(), time.monotonic()
    for batch in pruning.batches(dry_run=dry_run):
        total.looked_at += batch.looked_at
        total.pruned += batch.pruned
        total.kept.update(batch.kept)
        if time.monotonic() - said_s >= PROGRESS_EVERY_S:
            said_s = time.monotonic()
            say(f"{total.looked_at:,} runs looked at, {total.pruned:,} {'may go' if dry_run else 'deleted'}.")
    return total


def _say(pruning: "Pruning", total: _Total, *, dry_run: bool) -> None:
    from app.runs.prune import KEPT

    would = "would be" if dry_run else "were" if total.pruned != 1 else "was"
    runs = "1 run" if total.pruned == 1 else f"{total.pruned:,} runs"
    print(f"{runs} that ended before {output.moment(pruning.before.isoformat())} UTC {would} deleted.")
    for why, count in total.kept.most_common():
        print(f"  {count:,} stay: {KEPT[why]}")
    if total.workers or total.definitions:
        print(f"  With them went: ended workers {total.workers:,}, definitions without a run {total.definitions:,}.")
    if dry_run and total.pruned:
        output.print_next("stepfast prune")
    elif total.kept["dead_letter"]:
        output.print_next("stepfast dead")
