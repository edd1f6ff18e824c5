"""Following a run until it ends: a table that is redrawn on a terminal, else a line a change."""

import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from app.cli import output, show
from app.runs.explain import explain
from app.runs.states import RUN_ENDED, RunState

if TYPE_CHECKING:
    from uuid import UUID

    from app.cli.embedding import Embedding
    from app.execution.worker import Worker
    from app.pipelines.model import Json
    from app.runs.reads import Reads

POLL_S = 0.2
# After so long without any change, it is said once what is waited for.
QUIET_S = 10.0
RUN_FAILED = 1
_DETAIL_MAX_CHARS = 300

# Takes the run as it is now, and its new events.
OnChange = Callable[["Json", "list[Json]"], None]


def finish(
    worker: "Worker",
    run_id: "UUID",
    *,
    follow: bool,
    fields: "Json | None",
    embedding: "Embedding | None",
    after_seq: int = 0,
) -> int:
    """Ends a command that made a run go: follows it if asked to, prints what is next, and returns the exit code.

    `fields` are added to the run's document, which is then all that is printed; None prints for people. `after_seq`
    leaves earlier events out.
    """
    from app.runs.reads import Reads

    reads = Reads(worker.store.engine)
    following = f"stepfast show {output.short(str(run_id))}{' --embedded' if embedding else ''}"
    try:
        run = to_the_end(reads, run_id, after_seq, quietly=fields is not None) if follow else None
    except KeyboardInterrupt:
        rest = "stops here, and goes on with the next workers" if embedding else "goes on"
        print(f"\nNo longer watching: run {run_id} {rest}.", file=sys.stderr)
        output.print_next(embedding.going_on if embedding else following, sys.stderr)
        raise
    if fields is not None:
        from app import operations

        output.print_json({**operations.document(worker, run_id), **fields})
    elif run:
        simulated = " (simulated)" if embedding and embedding.simulate else ""
        print(f"Run {run_id} {show.state(run)} after {output.took(run)}: {show.cost(run['totals'])}{simulated}.")
        show.print_ending(run, reads, embedding)
    if fields is None and (run is None or (run["state"] == RunState.COMPLETED and not run["partial"])):
        output.print_next(following)
    return 0 if run is None or run["state"] == RunState.COMPLETED else RUN_FAILED


def to_the_end(reads: "Reads", run_id: "UUID", after_seq: int, *, quietly: bool) -> "Json":
    if quietly:
        return follow(reads, run_id, after_seq, lambda _run, _events: None)
    return (_on_terminal if sys.stdout.isatty() else _by_lines)(reads, run_id, after_seq)


def follow(reads: "Reads", run_id: "UUID", after_seq: int, on_change: OnChange) -> "Json":
    """Calls `on_change` until the run has ended, and returns it then."""
    pause = threading.Event()
    seq, changed_s = after_seq, time.monotonic()
    while True:
        new = reads.event_list(run_id, seq)
        if new:
            run = reads.run(run_id)
            if run["state"] in RUN_ENDED:
                # The end's own events may have come between the two questions.
                on_change(run, reads.event_list(run_id, seq))
                return run
            on_change(run, new)
            seq, changed_s = new[-1]["seq"], time.monotonic()
            if run["state"] == RunState.SUSPENDED:
                _say_what_is_waited_for(reads, run_id)
                changed_s = float("inf")
        elif time.monotonic() - changed_s > QUIET_S:
            _say_what_is_waited_for(reads, run_id)
            changed_s = float("inf")
        pause.wait(POLL_S)


def _say_what_is_waited_for(reads: "Reads", run_id: "UUID") -> None:
    found = explain(reads.run(run_id), reads.event_list(run_id))
    print(output.one_line(found.why), file=sys.stderr)
    if not found.command.endswith(" --follow"):  # which is what is done here
        output.print_next(found.command, sys.stderr)


def _on_terminal(reads: "Reads", run_id: "UUID", after_seq: int) -> "Json":
    from rich.live import Live

    shown = reads.run(run_id)

    def keep(run: "Json", _events: "list[Json]") -> None:
        nonlocal shown
        shown = run

    # Drawn anew by Rich's own thread, so that the times of what executes go on.
    with Live(console=output.console(), refresh_per_second=4, get_renderable=lambda: show.steps_table(shown)):
        return follow(reads, run_id, after_seq, keep)


def _by_lines(reads: "Reads", run_id: "UUID", after_seq: int) -> "Json":
    return follow(reads, run_id, after_seq, _print)


def _print(_run: "Json", events: "list[Json]") -> None:
    for event in events:
        subject, _, verb = event["name"].partition(".")
        data = event["data"]
        said = [str(data[name]) for name in ("code", "message", "reason") if data.get(name)]
        if "number" in data:
            said.append(f"attempt {data['number']}")
        detail = output.cut(output.one_line(": ".join(said)), _DETAIL_MAX_CHARS)
        print(f"{event['at'][11:19]}  {event['agent'] or subject:<16}  {verb.replace('_', ' '):<15}  {detail}".rstrip())
    sys.stdout.flush()
