"""What an operator types, for the commands of Django and Flask: list runs, resume the failed ones."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from stepfast.errors import Misuse

if TYPE_CHECKING:
    from stepfast.databases import Database, Rows

LIST_MAX = 1_000
PAGE_RUNS = 500
# Where more failed alike, one goes first, and the others only if it gets past the step that failed.
WITHOUT_CANARY_MAX = 5
CANARY_TIMEOUT_S = 60.0
ANSWERS_TIMEOUT_S = 60.0
_POLL_S = 0.2
_KINDS_MAX = 1_000
_AGO = re.compile(r"(\d{1,6})([smhd])")
# Control characters, and those that turn the direction of writing around.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

_RUNS = """
    select id::text, pipeline, state, completed, steps,
        to_char(created_at at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS'), cost_usd
    from stepfast.v_runs
    where (%s::text is null or state = %s::text) and (%s::text is null or pipeline = %s::text)
    order by created_at desc limit %s::integer
"""
_FAILED = """
    from stepfast.v_failed_runs where ended_at <= %s::timestamptz
        and (%s::timestamptz is null or ended_at >= %s::timestamptz) and (%s::text is null or pipeline = %s::text)
"""
_KINDS = f"""
    select json_build_object('pipeline', pipeline, 'agent', agent, 'code', code, 'fingerprint', error_fingerprint,
        'held', held, 'count', count(*), 'message', min(message))::text
    {_FAILED} group by pipeline, agent, code, error_fingerprint, held
    order by held is not null, count(*) desc, pipeline, agent, error_fingerprint limit %s::integer
"""  # the query is ours
# Of one kind, the oldest first; each is ordered, and its place returned.
_ORDER = f"""
    select stepfast.request_v1('resume', f.id, %s::text)::text, f.id::text, f.created_at::text from (
        select id, created_at {_FAILED} and held is null and pipeline = %s::text
            and error_fingerprint is not distinct from %s::text and (created_at, id) > (%s::timestamptz, %s::uuid)
        order by created_at, id limit %s::integer) f
"""  # noqa: S608
_WAITING = "select count(*) from stepfast.v_requests where id = any (%s::uuid[]) and state = 'waiting'"
_REFUSED = "select answer->>'message' from stepfast.v_requests where id = any (%s::uuid[]) and state = 'refused'"
_PROGRESS = """
    select r.state, (select s.state from stepfast.v_steps s where s.run_id = r.id and s.agent = %s::text limit 1)
    from stepfast.v_runs r where r.id = %s::uuid
"""
_FIRST = ("0001-01-01T00:00:00+00:00", "00000000-0000-0000-0000-000000000000")

Say = Callable[[str], object]


def since(text: str) -> datetime:
    """A time, or an age such as 2h or 3d. Raises Misuse."""
    try:
        if found := _AGO.fullmatch(text.strip()):
            return datetime.now(UTC) - timedelta(**{_UNITS[found[2]]: int(found[1])})
        at = datetime.fromisoformat(text.strip())
    except (ValueError, OverflowError):
        raise Misuse(f"{text!r} is no age such as 2h or 3d, and no time such as 2026-01-31T06:00.") from None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def plain(text: str) -> str:
    """A sentence for a terminal: on one line, with what would command the terminal as visible escapes."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], " ".join(text.splitlines()))


def list_runs(found: "Database", *, state: str | None, pipeline: str | None, limit: int) -> list[dict[str, object]]:
    """The newest first: id, pipeline, state, completed, steps, created_at (UTC), cost_usd."""
    rows = found.read(_RUNS, (state, state, pipeline, pipeline, min(limit, LIST_MAX)))
    names = ("id", "pipeline", "state", "completed", "steps", "created_at", "cost_usd")
    return [{**dict(zip(names, row, strict=True)), "cost_usd": _number(row[6])} for row in rows]


def table(runs: list[dict[str, object]]) -> str:
    """The runs, a line each."""
    rows = [("run", "state", "steps", "created (UTC)", "pipeline")]
    rows += [
        (
            str(run["id"]),
            str(run["state"]),
            f"{run['completed']}/{run['steps']}",
            str(run["created_at"]),
            str(run["pipeline"]),
        )
        for run in runs
    ]
    return "\n".join(f"{row[0]:36}  {row[1]:9}  {row[2]:>7}  {row[3]:19}  {row[4]}" for row in rows)


def _number(value: object) -> float | None:
    return None if value is None else float(str(value))


@dataclass(frozen=True, slots=True)
class Kind:
    """Failed runs of one cause. `held` says why a resume would not help; None where it may."""

    pipeline: str
    agent: str | None
    code: str | None
    fingerprint: str | None
    held: str | None
    count: int
    message: str | None

    def __str__(self) -> str:
        return f"{self.pipeline}, {self.agent or 'no dead letter'}{f' ({self.code})' if self.code else ''}"


@dataclass(slots=True)
class Outcome:
    """What became of a kind. `left` says why not all of it was ordered."""

    ordered: list[str] = field(default_factory=list)
    left: str = ""


class FailedRuns:
    """Those that had failed when this was made. What fails again meanwhile is left out, so that this ends."""

    def __init__(
        self, found: "Database", *, by: str, pipeline: str | None = None, begin: datetime | None = None
    ) -> None:
        self._found = found
        self._by = by
        (until,) = found.read("select clock_timestamp()::text")[0]
        start = begin.isoformat() if begin else None
        self._bounds = (until, start, start, pipeline, pipeline)

    def kinds(self) -> list[Kind]:
        """What went wrong, how often: what a resume may mend first."""
        return [Kind(**json.loads(row[0])) for row in self._found.read(_KINDS, (*self._bounds, _KINDS_MAX))]

    def resume(self, kind: Kind, say: Say) -> Outcome:
        """Orders the resume of a kind's runs, in pages. The sweep of a worker carries them out."""
        outcome, place = Outcome(), _FIRST
        if kind.count > WITHOUT_CANARY_MAX:
            rows = self._order(kind, place, 1)
            for request_id, run_id, created_at in rows:
                outcome.ordered.append(request_id)
                place = (created_at, run_id)
                say(f"{kind}: run {run_id} goes first; it is given {CANARY_TIMEOUT_S:.0f} s.")
                outcome.left = self._watch(kind, run_id, request_id)
        while not outcome.left and (rows := self._order(kind, place, PAGE_RUNS)):
            outcome.ordered += [row[0] for row in rows]
            _, run_id, created_at = max(rows, key=lambda row: (datetime.fromisoformat(row[2]), row[1]))
            place = (created_at, run_id)
        return outcome

    def answers(self, ordered: list[str]) -> tuple[int, Counter[str]]:
        """Waits for a worker: how many orders still wait, and what was refused, with how often."""
        deadline_s = time.monotonic() + ANSWERS_TIMEOUT_S
        while (waiting := self._found.read(_WAITING, (ordered,))[0][0]) and time.monotonic() < deadline_s:
            threading.Event().wait(_POLL_S)
        return waiting, Counter(row[0] for row in self._found.read(_REFUSED, (ordered,)))

    def _order(self, kind: Kind, place: tuple[str, str], limit: int) -> "Rows":
        of_kind = (kind.pipeline, kind.fingerprint, *place, limit)
        return self._found.write(_ORDER, (self._by, *self._bounds, *of_kind))

    def _watch(self, kind: Kind, run_id: str, request_id: str) -> str:
        """Empty once the first is past the step that failed; else why the others are left."""
        if self.answers([request_id])[0]:
            return "no worker carried out the first order"
        deadline_s = time.monotonic() + CANARY_TIMEOUT_S
        while time.monotonic() < deadline_s:
            run, step = self._found.read(_PROGRESS, (kind.agent, run_id))[0]
            if step == "completed" or run == "completed":
                return ""
            if step in {"discarded", "suspended"} or run in {"failed", "cancelled"}:
                return f"the first is {step if step in {'discarded', 'suspended'} else run}: stepfast explain {run_id}"
            threading.Event().wait(_POLL_S)
        return f"the first was not past that step in time: stepfast explain {run_id}"


def resume_failed(
    found: "Database", *, by: str, pipeline: str | None, begin: datetime | None, plan: bool, tell: Say
) -> bool:
    """Resumes what a resume can mend, or says what it would. Returns whether nothing was left or refused."""

    def say(text: str) -> object:
        return tell(plain(text))  # an agent may have written parts of it

    failed = FailedRuns(found, by=by, pipeline=pipeline, begin=begin)
    kinds = failed.kinds()
    good = True
    for kind in (kind for kind in kinds if not kind.held):
        if plan:
            say(f"Would resume {kind.count:,} of {kind}: {kind.message or 'nothing stands against going on'}")
            continue
        outcome = failed.resume(kind, say)
        waiting, refused = failed.answers(outcome.ordered)
        say(f"{kind}: {len(outcome.ordered) - waiting - refused.total():,} of {kind.count:,} resumed.")
        if waiting:
            say(f"  {waiting:,} wait for a worker.")
        if outcome.left:
            say(f"  The others were left, because {outcome.left}.")
        for message, count in refused.most_common(20):
            say(f"  {count:,} refused: {message}")
        good = good and not (waiting or outcome.left or refused)
    for kind in (kind for kind in kinds if kind.held):
        say(f"Left alone, {kind.count:,} of {kind}, because of {kind.held}.")
    if not kinds:
        say("No run has failed.")
    return good
