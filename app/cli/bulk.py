"""`stepfast resume --failed`: all failed runs that a resume can mend, with a canary where many failed alike."""

import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from app.cli import output, system
from app.cli.embedding import say
from app.clock import Deadline
from app.errors import Misuse, NotPossible, UnknownName
from app.runs.explain import NOT_BY_RESUME
from app.runs.states import RunState, StepState

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime, timedelta
    from uuid import UUID

    from app.execution.worker import Worker
    from app.pipelines.model import Json
    from app.runs.failed import FailedRuns, Kind

# So many may fail alike again without one of them going first.
WITHOUT_CANARY_MAX = 5
# Longer than three attempts of an agent at the default timeout, with their backoff.
CANARY_MAX_MS = 300_000
CANARIES_MAX = 10
POLL_S = 0.2
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LISTED_MAX = 20
_MESSAGE_MAX_CHARS = 160
_HELD = NOT_BY_RESUME | {
    "rejected": "a person rejected it, or nobody approved it in time",
    "letter_discarded": "a person discarded its dead letter",
}


@dataclass(slots=True)
class Outcome:
    """What became of the runs of one kind. `canary` is the run that went first, `left` why the others were left."""

    kind: "Kind"
    resumed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    canary: "UUID | None" = None
    left: str = ""

    @property
    def done(self) -> bool:
        return not self.left and not self.refused


def resume_failed(
    pipeline: str | None, since: "datetime | timedelta | None", *, only_plan: bool, yes: bool, as_json: bool
) -> int:
    """Resumes them, and says what was left alone and why. Returns 1 where something that should go on does not."""
    worker = system.database() if only_plan else system.database_and_broker()
    from app.runs.failed import FailedRuns
    from app.runs.reads import Reads

    if pipeline is not None and Reads(worker.store.engine).current_hash(pipeline) is None:
        raise UnknownName(f"No pipeline is published as {pipeline}.", next_step="See: stepfast runs")
    failed = FailedRuns(worker.store.engine, pipeline=pipeline, since=since)
    kinds = failed.kinds()
    held = [kind for kind in kinds if kind.held]
    outcomes = [Outcome(kind) for kind in kinds if not kind.held]
    if not as_json:
        _say_kinds(outcomes)
    if outcomes and not only_plan:
        if not yes:
            count = sum(outcome.kind.count for outcome in outcomes)
            alone = Misuse(
                f"{count:,} failed runs would be resumed, and nobody can be asked here.",
                next_step="To resume them: add --yes. To see them: add --plan.",
            )
            system.ask(f"Resume {count:,} runs?", alone, "Nothing was resumed.", as_json=as_json)
        # Every canary before any backlog, behind which it would wait.
        for outcome in outcomes:
            if outcome.kind.count > WITHOUT_CANARY_MAX:
                _send_canary(worker, failed, outcome)
        for outcome in outcomes:
            if not outcome.left:
                _resume_kind(worker, failed, outcome)
    if as_json:
        output.print_json({"kinds": [_plain(outcome) for outcome in outcomes], "held": [_held(kind) for kind in held]})
    else:
        _say_outcomes(outcomes if not only_plan else [])
        _say_held(held)
        _say_next(outcomes, held, only_plan=only_plan)
    return 0 if all(outcome.done for outcome in outcomes) else 1


def _resume_kind(worker: "Worker", failed: "FailedRuns", outcome: Outcome) -> None:
    kind = outcome.kind
    for page in failed.pages(kind):
        for run_id in page:
            _resume(worker, run_id, outcome)
        say(f"{_what(kind)}: {outcome.resumed:,} of {kind.count:,} resumed.")


def _resume(worker: "Worker", run_id: "UUID", outcome: Outcome) -> bool:
    from app import operations

    try:
        operations.resume(worker, run_id, by=system.user())
    except NotPossible as error:
        # Somebody else was faster, or it waits for its turn: one line for all that were refused alike.
        outcome.refused[_ID.sub("...", error.message)] += 1
        return False
    outcome.resumed += 1
    return True


def _send_canary(worker: "Worker", failed: "FailedRuns", outcome: Outcome) -> None:
    """Lets one run go first, and sets `left` unless it gets past the step at which all failed."""
    first = next(failed.pages(outcome.kind), [])[:CANARIES_MAX]
    outcome.canary = next((run_id for run_id in first if _resume(worker, run_id, outcome)), None)
    if outcome.canary is None:
        outcome.left = "none of the first could be resumed"
        return
    agent = outcome.kind.agent
    at_most = output.seconds(CANARY_MAX_MS / 1000)
    say(f"{_what(outcome.kind)}: run {output.short(str(outcome.canary))} goes first; it is given {at_most}.")
    deadline, pause = Deadline.after_ms(CANARY_MAX_MS), threading.Event()
    while not deadline.passed:
        now = failed.progress(outcome.canary, agent)
        if now["state"] == StepState.SUSPENDED:
            outcome.left = "the first waits for a person"
            return
        if now["state"] == StepState.DISCARDED or now["run_state"] in {RunState.FAILED, RunState.CANCELLED}:
            same = now["error_fingerprint"] == outcome.kind.error_fingerprint
            outcome.left = (
                f"the first failed {'in the same way' if same else 'again'} ({now['code']}: {now['message']})"
            )
            return
        if now["state"] == StepState.COMPLETED or now["run_state"] == RunState.COMPLETED:
            return
        pause.wait(POLL_S)
    outcome.left = "the first was not past that step in time"


def _what(kind: "Kind") -> str:
    return f"{kind.pipeline}, {kind.agent or 'no dead letter'}{f' ({kind.code})' if kind.code else ''}"


def _say_kinds(outcomes: "Sequence[Outcome]") -> None:
    rows = [
        (
            kind.pipeline,
            kind.agent or "-",
            kind.code or "-",
            f"{kind.count:,}",
            output.short(str(kind.example)),
            output.cut(kind.message or "nothing stands against going on", _MESSAGE_MAX_CHARS),
        )
        for kind in (outcome.kind for outcome in outcomes[:_LISTED_MAX])
    ]
    if rows:
        columns = ("pipeline", "agent", "code", "runs", "example", "message")
        output.console().print(output.table(columns, rows, right=("runs",)))
        _say_more(outcomes)
    else:
        print("No failed run can be mended by a resume.")


def _say_outcomes(outcomes: "Iterable[Outcome]") -> None:
    for outcome in outcomes:
        kind = outcome.kind
        print(output.one_line(f"{_what(kind)}: {outcome.resumed:,} of {kind.count:,} resumed."))
        if outcome.left:
            print(output.one_line(f"  The others were left, because {outcome.left}."))
        for message, count in outcome.refused.most_common(_LISTED_MAX):
            print(output.one_line(f"  {count:,} refused: {message}"))


def _say_held(held: "Sequence[Kind]") -> None:
    for kind in held[:_LISTED_MAX]:
        assert kind.held is not None
        runs = "1 run" if kind.count == 1 else f"{kind.count:,} runs"
        look = f"stepfast explain {output.short(str(kind.example))}"
        print(output.one_line(f"Left alone, {runs} of {_what(kind)}: {_HELD[kind.held]}. See: {look}"))
    _say_more(held)


def _say_more(listed: "Sequence[object]") -> None:
    if len(listed) > _LISTED_MAX:
        print(f"... and {len(listed) - _LISTED_MAX:,} more kinds: --json lists all.")


def _say_next(outcomes: "Sequence[Outcome]", held: "Sequence[Kind]", *, only_plan: bool) -> None:
    left = [outcome.canary for outcome in outcomes if outcome.left and outcome.canary]
    if left:
        output.print_next(f"stepfast explain {output.short(str(left[0]))}")
    elif outcomes:
        output.print_next("stepfast resume --failed" if only_plan else "stepfast runs")
    elif held:
        output.print_next(f"stepfast explain {output.short(str(held[0].example))}")


def _held(kind: "Kind") -> "Json":
    assert kind.held is not None
    next_step = f"stepfast explain {output.short(str(kind.example))}"
    return {**_named(kind), "held": kind.held, "reason": _HELD[kind.held], "next": next_step}


def _plain(outcome: Outcome) -> "Json":
    return {
        **_named(outcome.kind),
        "resumed": outcome.resumed,
        "canary": str(outcome.canary) if outcome.canary else None,
        "left": outcome.left or None,
        "refused": dict(outcome.refused.most_common(_LISTED_MAX)),
    }


def _named(kind: "Kind") -> "Json":
    names = ("pipeline", "agent", "code", "error_fingerprint", "count", "message")
    return {name: getattr(kind, name) for name in names} | {"example": str(kind.example)}
