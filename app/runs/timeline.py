"""A run as stretches of time: what each agent waited for, its attempts, and what happened at a moment. Pure.

Attempts are rows. What was waited for in between is told by the events, read from the start: each closes what its step
waited for and may open the next wait, as the database's functions do when they change a step.
"""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

from app.runs.given import gate_seen, tries_by_id
from app.runs.states import AttemptState, StepState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from app.pipelines.model import Json, Pipeline

# What may be waited for, and how it is said.
WAITS = {
    "dependencies": "waited for what it depends on",
    "turn": "waited for its turn: one run at a time of its concurrency key",
    "queue": "waited for a worker",
    "retry": "waited for the time of its retry",
    "key": "waited for another run, which held its key",
    "handler": "waited for a worker that has its handler",
    "person": "waited for a person",
    "rescue": "waited for another worker",
}
_ENDED_BADLY = {StepState.DISCARDED, StepState.CANCELLED}


def timeline(
    run: "Json",
    events: "Sequence[Json]",
    pipeline: "Pipeline",
    *,
    workers: "Mapping[int, str]",
    now: datetime,
) -> "Json":
    """The timeline of a run as `operations.document` gives it. `workers` says where each one was (host:pid).

    Keys: run_id, pipeline, version, state, partial, created_at, started_at, ended_at, now, seconds, totals, marks (of
    the run), steps ({agent, state, generation, segments}, in the pipeline's order) and repeated. totals are those of
    `Reads.run`, with what late commits that were refused had paid for, and wasted (see `wasted`). repeated: {agent,
    generation, executions, commits, because} where one generation of an agent was executed more than once. A segment
    has kind, generation, started_at, ended_at (null while it lasts), seconds and
      wait     for (a key of WAITS), text, and detail (whose key, which retry, …)
      attempt  number, attempt_id, state, worker, where, after (the worker it was rescued from), code, message, reused,
               by (who gave the output by hand), gate, model, input_tokens, output_tokens, cost_usd, maybe_paid (it was
               lost with what it may have been paid for)
      mark     name (what happened, such as `discarded`), by, text, detail; it takes no time
    """
    replay = _Replay(run, events, _iso(now))
    tries = tries_by_id(run)
    fenced = fenced_commits(events)
    steps = []
    for step in run["steps"]:
        agent = pipeline.by_id[step["agent"]]
        gates = {entry["id"]: gate_seen(entry, agent, run, tries) for entry in step["tries"]}
        attempts = list(_attempts(step, gates, fenced, workers, now))
        waits = [_wait(wait, now) for wait in replay.waits[step["agent"]]]
        found = sorted([*waits, *attempts, *replay.marks[step["agent"]]], key=_place)
        steps.append(
            {
                "agent": step["agent"],
                "state": step["state"],
                "generation": step["generation"],
                "segments": found,
            }
        )
    end = run["ended_at"] or _iso(now)
    return {
        **{name: run[name] for name in ("pipeline", "version", "state", "partial")},
        "run_id": run["id"],
        **{name: run[name] for name in ("created_at", "started_at", "ended_at")},
        "now": _iso(now),
        "seconds": _between(run["created_at"], end),
        "totals": {**_totals(run["totals"], fenced), "wasted": wasted(run, fenced)},
        "marks": replay.run_marks,
        "steps": steps,
        "repeated": repeated(run),
    }


# What was paid for and not used, and what was done more than once.


def fenced_commits(events: "Sequence[Json]") -> "dict[str, Json]":
    """What attempts that had lost their step came with, by attempt: code, model, usage, cost_usd."""
    return {event["attempt_id"]: event["data"] for event in events if event["name"] == "step.fenced"}


def _totals(totals: "Json", fenced: "Mapping[str, Json]") -> "Json":
    paid = [data for data in fenced.values() if data["usage"]]
    costs = [totals["cost_usd"], *(data["cost_usd"] for data in paid)]
    tokens = {
        name: totals[name] + sum(data["usage"].get(name, 0) for data in paid)
        for name in ("input_tokens", "output_tokens")
    }
    cost = None if None in costs else round(sum(costs), 6)
    return {"calls": totals["calls"] + len(paid), "cost_usd": cost, **tokens}


def wasted(run: "Json", fenced: "Mapping[str, Json]") -> "Json":
    """What was paid for calls whose answer was not used.

    Keys: calls (that are known to have been paid for), cost_usd (null where the price of one is unknown), and
    unknown_calls: attempts of models that were lost, and may have been paid for: nobody is left to tell.
    """
    tries = tries_by_id(run).values()
    paid = [entry["cost_usd"] for entry in tries if entry["state"] == AttemptState.FAILED and entry["usage"]]
    paid += [data["cost_usd"] for data in fenced.values() if data["usage"]]
    lost = [entry for entry in tries if entry["state"] == AttemptState.LOST and _is_call(entry)]
    known = [cost for cost in paid if cost is not None]
    return {
        "calls": len(paid),
        "cost_usd": round(sum(known), 6) if len(known) == len(paid) else None,
        "unknown_calls": sum(entry["id"] not in fenced for entry in lost),
    }


def _is_call(entry: "Json") -> bool:
    """Whether an attempt called a model: a handler's has the hash of its code."""
    return entry["code_hash"] is None and entry["decided_by"] is None


def repeated(run: "Json") -> "list[Json]":
    """The generations of agents that were executed more than once, and with what the other executions ended."""
    found = []
    for step in run["steps"]:
        by_generation: dict[int, list[Json]] = {}
        for entry in step["tries"]:
            if _executed(entry):
                by_generation.setdefault(entry["generation"], []).append(entry)
        found += [
            {
                "agent": step["agent"],
                "generation": generation,
                "executions": len(entries),
                "commits": sum(entry["state"] == AttemptState.COMPLETED for entry in entries),
                "because": [entry["error"]["code"] for entry in entries if entry["error"]],
            }
            for generation, entries in sorted(by_generation.items())
            if len(entries) > 1
        ]
    return found


def _executed(entry: "Json") -> bool:
    """Whether an attempt came as far as its agent."""
    before = entry["state"] == AttemptState.SUSPENDED or entry["decided_by"] or entry["reused_from"]
    return not before and (entry["error"] or {}).get("code") not in {"gate_refused", "invalid_input"}


# Attempts: from their rows.


def _attempts(
    step: "Json",
    gates: "Mapping[str, Json | None]",
    fenced: "Mapping[str, Json]",
    workers: "Mapping[int, str]",
    now: datetime,
) -> "Iterator[Json]":
    lost_on: int | None = None
    for entry in step["tries"]:
        paid = fenced.get(entry["id"], entry)
        error, usage = entry["error"] or {}, paid["usage"] or {}
        worker = entry["worker_id"]
        yield {
            "kind": "attempt",
            "generation": entry["generation"],
            "started_at": entry["started_at"],
            "ended_at": entry["ended_at"],
            "seconds": _between(entry["started_at"], entry["ended_at"] or _iso(now)),
            "number": entry["number"],
            "attempt_id": entry["id"],
            "state": entry["state"],
            "worker": worker,
            "where": workers.get(worker) if worker is not None else None,
            "after": lost_on if worker is not None else None,
            "code": error.get("code"),
            "message": error.get("message"),
            "reused": entry["reused_from"] is not None,
            "by": entry["decided_by"],
            "gate": gates[entry["id"]],
            "model": paid["model"],
            "input_tokens": usage.get("input_tokens"),
            "output_tokens": usage.get("output_tokens"),
            "cost_usd": paid["cost_usd"],
            "maybe_paid": paid is entry and entry["state"] == AttemptState.LOST and _is_call(entry),
        }
        lost_on = worker if entry["state"] == AttemptState.LOST else None


# Waits and marks: from the events.


@dataclass(slots=True)
class _Wait:
    """What a step waits for since `since`; a retry's time comes at `due`."""

    reason: str
    since: str
    generation: int
    detail: "Json" = field(default_factory=dict)
    due: str | None = None
    until: str | None = None


class _Replay:
    """The events of a run, read once. `waits` and `marks` are by agent, in order."""

    def __init__(self, run: "Json", events: "Sequence[Json]", now: str) -> None:
        self._steps = {step["agent"]: step for step in run["steps"]}
        self._first = "turn" if run["concurrency_key"] is not None else "queue"
        self._state = dict.fromkeys(self._steps, StepState.PENDING)
        self._generation = dict.fromkeys(self._steps, 1)
        self._committed: dict[str, str] = {}  # when the last output of an agent was
        self._open: dict[str, _Wait] = {}
        self._halted = False
        self.waits: dict[str, list[_Wait]] = {agent: [] for agent in self._steps}
        self.marks: dict[str, list[Json]] = {agent: [] for agent in self._steps}
        self.run_marks: list[Json] = []
        # What is written together has one time, and means something only as a whole.
        for at, together in groupby(events, key=itemgetter("at")):
            for event in together:
                if event["agent"] is None:
                    self._of_run(event["name"], at, event["data"])
                elif event["agent"] in self._steps:
                    self._of_step(event)
            self._follow(at)
        for agent in list(self._open):
            self._close(agent, None, now)

    # Of the whole run.

    def _of_run(self, name: str, at: str, data: "Json") -> None:
        match name:
            case "run.enqueued":
                self._begin(at, self._steps, self._first)
            case "run.resumed":
                self._halted = False
                for agent in data["agents"]:
                    self._state[agent] = StepState.PENDING
                again = [agent for agent, state in self._state.items() if state == StepState.PENDING]
                self._begin(at, again, "turn" if "waits_for" in data else "queue")
            case "run.failed" | "run.cancelled" | "run.completed":
                self._halted = True
                for agent in self._steps:
                    self._close(agent, at)
                    # What executes goes on, and is recorded; of a cancelled run it is fenced.
                    if name == "run.cancelled" and self._state[agent] != StepState.COMPLETED:
                        self._state[agent] = StepState.CANCELLED
        self.run_marks.append(_mark(name.partition(".")[2], at, None, data))

    def _begin(self, at: str, agents: "Sequence[str] | Mapping[str, Json]", first: str) -> None:
        for agent in agents:
            self._close(agent, at)
            self._wait(agent, at, "dependencies" if self._unmet(agent, at) else first)

    # Of one step.

    def _of_step(self, event: "Json") -> None:
        agent, at, data, name = event["agent"], event["at"], event["data"], event["name"].partition(".")[2]
        if name not in {"fenced", "dismissed"}:
            self._generation[agent] = event["generation"]
        if name in _BECOMES:
            self._close(agent, at)
            self._state[agent] = _BECOMES[name]
            if _BECOMES[name] == StepState.COMPLETED:
                # What another run put out is as old as it is there.
                self._committed[agent] = _iso(_moment(at) - timedelta(milliseconds=data.get("age_ms", 0)))
        match name:
            case "deferred":
                self._defer(agent, at, data)
            case "retry_scheduled":
                due = _iso(_moment(at) + timedelta(milliseconds=data["retry_ms"] or 0))
                self._wait(agent, at, "retry", {"code": data["code"]}, due)
            case "rescued":
                self._wait(agent, at, "rescue", {"from": data["worker"], "reason": data["reason"]})
            case "suspended" | "approved" | "reopened" | "stale_input":
                self._wait(agent, at, _WAITS_AFTER[name])
        if name in _MARKED:
            self.marks[agent].append(_mark(name, at, event["generation"], data))

    def _defer(self, agent: str, at: str, data: "Json") -> None:
        """A step that is put off again for the same reason waits on."""
        reason = "key" if str(data.get("reason", "")).startswith("key_") else "handler"
        detail = {name: data[name] for name in ("reason", "held_by") if data.get(name)}
        now = self._open.get(agent)
        if now is None or now.reason != reason:
            self._close(agent, at)
            self._wait(agent, at, reason, detail)

    # Waits.

    def _unmet(self, agent: str, at: str) -> bool:
        """Whether something that a step depends on has yet to give it an output."""
        return any(
            not self._met(other) and not self._serves(other, self._steps[agent]["snapshots"].get(other), at)
            for other in self._steps[agent]["depends_on"]
        )

    def _met(self, agent: str) -> bool:
        state = self._state[agent]
        return state == StepState.COMPLETED or (
            state in _ENDED_BADLY and self._steps[agent]["failure_mode"] == "continue"
        )

    def _serves(self, other: str, snapshot: "Json | None", at: str) -> bool:
        """Whether an older output may be read while a newer one is made, as snapshot_serves in the database says."""
        made_at = self._committed.get(other)
        if not snapshot or made_at is None or self._state[other] in {StepState.SKIPPED, *_ENDED_BADLY}:
            return False
        return snapshot["on_stale"] != "rerun" or 1000 * _between(made_at, at) <= int(snapshot["max_staleness_ms"])

    def _follow(self, at: str) -> None:
        """What an event means for the steps that wait for others: each may begin now, or is skipped."""
        changed = True
        while changed:
            changed = False
            for agent, state in self._state.items():
                wait = self._open.get(agent)
                if state != StepState.PENDING or wait is None or wait.reason != "dependencies":
                    continue
                others = self._steps[agent]["depends_on"]
                if any(self._skips(other) for other in others):
                    self._close(agent, at)
                    self._state[agent] = StepState.SKIPPED
                    self.marks[agent].append(_mark("skipped", at, wait.generation, {}))
                    changed = True
                elif not self._unmet(agent, at):
                    self._close(agent, at)
                    self._wait(agent, at, "queue")

    def _skips(self, agent: str) -> bool:
        """Whether what depends on a step is skipped."""
        state = self._state[agent]
        skips = self._steps[agent]["failure_mode"] == "skip_dependents"
        return state == StepState.SKIPPED or (state in _ENDED_BADLY and skips)

    def _wait(self, agent: str, at: str, reason: str, detail: "Json | None" = None, due: str | None = None) -> None:
        """In a run that has ended nothing waits but for the resume, which is the run's."""
        if not self._halted:
            self._open[agent] = _Wait(reason, at, self._generation[agent], detail or {}, due)

    def _close(self, agent: str, at: str | None, now: str = "") -> None:
        """Ends what a step waits for; `at` is None where it waits on. After a retry's time it waits for a worker."""
        wait = self._open.pop(agent, None)
        if wait is None:
            return
        wait.until = at
        if wait.due is not None and wait.due < (at or now):
            self._keep(agent, replace(wait, until=wait.due))
            wait = _Wait("queue", wait.due, wait.generation, until=at)
        self._keep(agent, wait)

    def _keep(self, agent: str, wait: _Wait) -> None:
        if wait.until != wait.since:
            self.waits[agent].append(wait)


_BECOMES = {
    "claimed": StepState.EXECUTING,
    "completed": StepState.COMPLETED,
    "reused": StepState.COMPLETED,
    "settled": StepState.COMPLETED,
    "overridden": StepState.COMPLETED,
    "retry_scheduled": StepState.PENDING,
    "rescued": StepState.PENDING,
    "rerun": StepState.PENDING,
    "reopened": StepState.PENDING,
    "stale_input": StepState.PENDING,
    "suspended": StepState.SUSPENDED,
    "approved": StepState.AVAILABLE,
    "rejected": StepState.CANCELLED,
    "expired": StepState.CANCELLED,
    "cancelled": StepState.CANCELLED,
    "discarded": StepState.DISCARDED,
}
_WAITS_AFTER = {"suspended": "person", "approved": "queue", "reopened": "dependencies", "stale_input": "dependencies"}
# What is not the beginning or the end of an attempt, and worth a word of its own.
_MARKED = {
    *("discarded", "rejected", "expired", "approved", "reopened", "rerun", "fenced", "settled", "dismissed"),
    *("stale_input", "stale_read"),
}
_DETAILS = ("rerun", "dead_letter", "cost_usd", "agents", "from", "waits_for", "partial", "digest")


def _mark(name: str, at: str, generation: int | None, data: "Json") -> "Json":
    said = [str(data[key]) for key in ("code", "message", "reason") if data.get(key)]
    return {
        "kind": "mark",
        "name": name,
        "generation": generation,
        "started_at": at,
        "ended_at": at,
        "seconds": 0.0,
        "by": data.get("by"),
        "text": ": ".join(said),
        "detail": {key: data[key] for key in _DETAILS if data.get(key) is not None},
    }


def _wait(wait: _Wait, now: datetime) -> "Json":
    return {
        "kind": "wait",
        "for": wait.reason,
        "text": WAITS[wait.reason],
        "detail": wait.detail,
        "generation": wait.generation,
        "started_at": wait.since,
        "ended_at": wait.until,
        "seconds": _between(wait.since, wait.until or _iso(now)),
    }


# Of what has one time: an attempt, its end, what was done to the step then, and what it waits for since.
_ORDER = {"attempt": 0, "mark": 2, "wait": 3}
_ENDS = {"discarded", "rerun"}


def _place(segment: "Json") -> tuple[str, int]:
    return segment["started_at"], 1 if segment.get("name") in _ENDS else _ORDER[segment["kind"]]


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _iso(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds")


def _between(start: str, end: str) -> float:
    """Seconds, to the millisecond, and never less than none: the clocks of Postgres and this machine may differ."""
    return round(max(0.0, (_moment(end) - _moment(start)).total_seconds()), 3)
