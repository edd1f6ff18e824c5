"""A run, as an application sees it: its state, its result, its events, and what a person may order."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from graphlib import TopologicalSorter
from typing import Any, TypeVar
from uuid import UUID

from stepfast.databases import Database
from stepfast.errors import Misuse, NotEnded, NotPossible, RunFailed, UnknownName, check_text

T = TypeVar("T")
Json = dict[str, Any]

EVENTS_PAGE = 10_000
RESULT_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 10.0
_POLL_FIRST_S = 0.05
_POLL_MAX_S = 1.0
ENDED = frozenset({"completed", "failed", "cancelled"})

_STATUS = """
    select json_build_object(
        'pipeline', r.pipeline, 'state', r.state, 'partial', r.partial, 'cost_usd', r.cost_usd,
        'created_at', r.created_at, 'started_at', r.started_at, 'ended_at', r.ended_at,
        'steps', (select json_object_agg(s.agent, json_build_array(s.state, s.depends_on))
                  from stepfast.v_steps s where s.run_id = r.id),
        'asks', (select coalesce(json_agg(json_build_array(a.agent, a.digest, a.shown) order by a.agent), '[]')
                 from stepfast.v_approvals a where a.run_id = r.id and a.state = 'requested'),
        'error', (select d.agent || ' (' || d.code || '): ' || d.message from stepfast.v_dead_letters d
                  where d.run_id = r.id and d.resolved_at is null order by d.created_at limit 1))::text
    from stepfast.v_runs r where r.id = %s::uuid
"""
_STATE = "select state from stepfast.v_runs where id = %s::uuid"
_OUTPUTS = "select agent, output::text from stepfast.v_outputs where run_id = %s::uuid"
_EVENTS = """
    select json_build_array(seq, name, at, agent, data)::text from stepfast.v_events
    where run_id = %s::uuid and seq > %s::bigint order by seq limit %s::integer
"""
_REQUEST = "select stepfast.request_v1(%s::text, %s::uuid, %s::text, %s::text, %s::text, %s::text)::text"
_ANSWER = "select state, answer::text from stepfast.v_requests where id = %s::uuid"
_WRITING = "select pg_current_xact_id_if_assigned() is not null"


@dataclass(frozen=True, slots=True)
class Ask:
    """What an agent waits to be allowed. `shown` is what it is to work on, redacted; `digest` names exactly that."""

    agent: str
    digest: str
    shown: Any


@dataclass(frozen=True, slots=True)
class Status:
    """`steps` are the agents' states, each after what it depends on; `error` is the oldest that is open."""

    pipeline: str
    state: str
    partial: bool
    steps: Mapping[str, str]
    asks: tuple[Ask, ...]
    error: str | None
    cost_usd: float | None
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True, slots=True)
class Event:
    """One event of a run. `seq` counts from 1."""

    seq: int
    name: str
    at: datetime
    agent: str | None
    data: Json


class Request:
    """What was ordered. A worker carries it out after the commit: at once where a broker is named, else within 2 s."""

    def __init__(self, request_id: UUID, database: Database) -> None:
        self.id = request_id
        self._database = database

    def wait(self, timeout_s: float = REQUEST_TIMEOUT_S) -> Json:
        """Waits until it is carried out: {"agents": […]} or {"decision": …}.

        Raises NotPossible, NotEnded; UnknownName where the order was rolled back.
        """
        state, answer = _wait(
            self._database, self._answer, timeout_s, "The order was not carried out in time.", "See that a worker runs."
        )
        if state == "refused":
            raise NotPossible(answer["message"], next_step=answer["next_step"])
        return answer

    def _answer(self) -> tuple[str, Json] | None:
        rows = self._database.read(_ANSWER, (str(self.id),))
        if not rows:
            raise UnknownName("There is no such order.", next_step="Its transaction was rolled back: give it again.")
        state, answer = rows[0]
        return None if state == "waiting" else (state, json.loads(answer))


class RunHandle:
    """A run by its id. `created` is False where its key had started it before, and None where it was only looked up.

    It reads and orders over the connection that it was made with, in whatever transaction that is in.
    """

    def __init__(
        self, run_id: UUID, database: Database, looked_after: Callable[[str], None], *, created: bool | None = None
    ) -> None:
        self.id = run_id
        self.created = created
        self._database = database
        self._looked_after = looked_after

    def __repr__(self) -> str:
        return f"RunHandle({str(self.id)!r})"

    def status(self) -> Status:
        """How the run stands. Raises UnknownName."""
        rows = self._database.read(_STATUS, (str(self.id),))
        if not rows:
            raise self._unknown()
        found = json.loads(rows[0][0])
        steps = found["steps"] or {}
        order = TopologicalSorter({agent: entry[1] for agent, entry in sorted(steps.items())}).static_order()
        times = {name: _time(found[name]) for name in ("created_at", "started_at", "ended_at")}
        return Status(
            steps={agent: steps[agent][0] for agent in order},
            asks=tuple(Ask(*ask) for ask in found["asks"]),
            **{name: found[name] for name in ("pipeline", "state", "partial", "error", "cost_usd")},
            **times,
        )

    def result(self, timeout_s: float = RESULT_TIMEOUT_S) -> dict[str, Json]:
        """Waits for the end: the output of each agent that completed. Raises RunFailed, NotEnded, UnknownName.

        A run that waits for a person is waited for, too.
        """
        state = _wait(
            self._database, self._ended, timeout_s, f"Run {self.id} has not ended.", "Ask again later, by its id."
        )
        if state != "completed":
            status = self.status()
            raise RunFailed(
                f"Run {self.id} is {state}: {status.error or 'no dead letter is open'}",
                state=state,
                next_step=f"See: stepfast explain {self.id}",
            )
        return {agent: json.loads(output) for agent, output in self._database.read(_OUTPUTS, (str(self.id),))}

    def events(self, after_seq: int = 0) -> list[Event]:
        """The run's events after a sequence number, oldest first."""
        found: list[Event] = []
        while True:
            rows = self._database.read(_EVENTS, (str(self.id), after_seq, EVENTS_PAGE))
            for seq, name, at, agent, data in (json.loads(row[0]) for row in rows):
                found.append(Event(seq, name, datetime.fromisoformat(at), agent, data))
                after_seq = seq
            if len(rows) < EVENTS_PAGE:
                return found

    def approve(self, agent: str, *, by: str, reason: str | None = None, digest: str | None = None) -> Request:
        """Lets an agent do what it waits for. `digest` (`Ask.digest`) binds that to what was seen."""
        return self._order("approve", by, agent, reason, digest)

    def reject(self, agent: str, *, by: str, reason: str | None = None, digest: str | None = None) -> Request:
        """Refuses it."""
        return self._order("reject", by, agent, reason, digest)

    def resume(self, *, by: str, from_agent: str | None = None, reason: str | None = None) -> Request:
        """Continues a failed, cancelled or partial run; from an agent on, again, where one is named."""
        return self._order("resume", by, from_agent, reason, None)

    def cancel(self, *, by: str, reason: str | None = None) -> Request:
        """Ends a run that has not ended."""
        return self._order("cancel", by, None, reason, None)

    def _order(self, action: str, by: str, agent: str | None, reason: str | None, digest: str | None) -> Request:
        for what, value in (
            ("name of who orders", by),
            ("agent's name", agent),
            ("reason", reason),
            ("digest", digest),
        ):
            check_text(what, value)
        values = (action, str(self.id), by, agent, reason, digest)
        request_id = UUID(self._database.write(_REQUEST, values)[0][0])
        self._database.after_commit(lambda: self._looked_after(str(self.id)))
        return Request(request_id, self._database)

    def _ended(self) -> str | None:
        rows = self._database.read(_STATE, (str(self.id),))
        if not rows:
            raise self._unknown()
        state: str = rows[0][0]
        return state if state in ENDED else None

    def _unknown(self) -> UnknownName:
        return UnknownName(f"There is no run {self.id}.")


def _wait(database: Database, look: Callable[[], T | None], timeout_s: float, late: str, next_step: str) -> T:
    """Polls, ever less often, until there is an answer."""
    if database.read(_WRITING)[0][0]:
        raise Misuse(
            "This waits for a worker, which sees nothing of a transaction that is not committed.",
            next_step="Commit first.",
        )
    deadline_s, pause_s, pause = time.monotonic() + timeout_s, _POLL_FIRST_S, threading.Event()
    while (found := look()) is None:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise NotEnded(late, next_step=next_step)
        pause.wait(min(pause_s, left_s))
        pause_s = min(pause_s * 2, _POLL_MAX_S)
    return found


def _time(text: str | None) -> Any:  # noqa: ANN401  # a datetime, or None where there is none
    return datetime.fromisoformat(text) if text else None
