"""What is promised of a run under a cell, and whether it was kept: a pure decision over what was seen."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from app.crashpoints import CrashPoint, Note
from app.crashtest import world
from app.crashtest.cells import EFFECT_IS_OPEN, REPEATS_A_CALL, TAKES_AWAY, Answers, Cell, Fault
from app.pipelines.model import Json, Pipeline

PLACES_SHOWN_MAX = 5


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of one run. `calls` are the simulator's count, `left` the files; `problems` came up on the way."""

    run: Json
    events: list[Json]
    notes: list[Note]
    calls: dict[str, int]
    left: dict[str, str]
    struck: bool
    died: str  # what was killed or stopped, in words
    recovered_s: float | None
    violations: list[str]
    problems: list[str]


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """What undisturbed runs on the same lane came to, and where they differ among themselves."""

    calls: dict[str, int]
    effects: Counter[str]
    outputs: dict[str, object]
    left: dict[str, object]
    differing: frozenset[str]
    attempts: dict[str, int]

    @property
    def not_compared(self) -> list[str]:
        return sorted(self.differing)


class Verdict(StrEnum):
    OK = "ok"  # as if nothing had happened
    UNKNOWN = "outcome_unknown"  # as promised where nobody can know whether an effect happened: a person is asked
    BROKEN = "BROKEN"


@dataclass(frozen=True, slots=True)
class Judged:
    """One row of the matrix. `why` says which promises were broken."""

    cell: Cell
    verdict: Verdict
    died: str = ""
    recovered_s: float | None = None
    calls_repeated: int = 0
    effects_repeated: int = 0
    same_outputs: bool | None = None
    rules_hold: bool = True
    why: list[str] = field(default_factory=list)


def undisturbed(pipeline: Pipeline, one: Seen, other: Seen) -> Undisturbed:
    outputs, left = world.outputs(one.run), dict[str, object](one.left)
    differing = world.differing(outputs, world.outputs(other.run)) | world.differing(left, dict(other.left))
    attempts = {step["agent"]: len(step["tries"]) for step in one.run["steps"]}
    return Undisturbed(one.calls, _effects(pipeline, one), outputs, left, differing, attempts)


def judge(pipeline: Pipeline, cell: Cell, seen: Seen, normal: Undisturbed) -> Judged:
    """Compares a run with an undisturbed one."""
    why = [*seen.problems]
    if not seen.struck:
        why.append("the worker did not come to this point")
    why += [f"rule {sentence}" for sentence in seen.violations]
    unknown = [event["agent"] for event in seen.events if event["data"].get("code") == "outcome_unknown"]
    why += _ending(pipeline, cell, seen, unknown)

    failed_call = {cell.agent: 1} if cell.answers != Answers.GOOD else {}
    repeated = _more(seen.calls, Counter(normal.calls) + Counter(failed_call))
    allowed = _calls_in_hands(pipeline, cell, seen)
    if repeated > allowed:
        why.append(f"{repeated} calls were repeated, and {allowed} were in flight where a worker was lost")
    effects = _more(_effects(pipeline, seen), normal.effects)
    if effects:
        why.append(f"{effects} effects were repeated")
    if cell.fault in TAKES_AWAY and not unknown and not _lost(seen, cell.agent):
        why.append("nobody took the step from the worker that was away")
    if cell.fault == Fault.MESSAGE_DOUBLED:
        attempts = {step["agent"]: len(step["tries"]) for step in seen.run["steps"]}
        why += [f"{agent} was attempted {n} times" for agent, n in attempts.items() if n != normal.attempts[agent]]

    same = None
    if not unknown:
        differing = world.differing(world.outputs(seen.run), normal.outputs) - normal.differing
        same = not differing
        if differing:
            why.append(f"outputs differ: {_listed(differing)}")
        if differing := world.differing(dict(seen.left), normal.left) - normal.differing:
            why.append(f"what the handlers left behind differs: {_listed(differing)}")
    verdict = Verdict.BROKEN if why else Verdict.UNKNOWN if unknown else Verdict.OK
    return Judged(cell, verdict, seen.died, seen.recovered_s, repeated, effects, same, not seen.violations, why)


def _ending(pipeline: Pipeline, cell: Cell, seen: Seen, unknown: list[str]) -> list[str]:
    """Why the run should not have ended as it did."""
    if not unknown:
        whole = seen.run["state"] == "completed" and all(step["state"] == "completed" for step in seen.run["steps"])
        return [] if whole else [f"the run ended {seen.run['state']}"]
    told = {step["agent"]: step["tries"] for step in seen.run["steps"]}
    found = [] if _takes_a_step_away(cell) else ["nothing died, and a step ended as outcome_unknown"]
    for agent in unknown:
        if pipeline.by_id[agent].repeatable:
            found.append(f"{agent} may be repeated, and ended as outcome_unknown")
        elif all(entry["repeatable"] for entry in told[agent]) and not EFFECT_IS_OPEN & set(cell.strikes):
            found.append(f"{agent} had begun no effect, and ended as outcome_unknown")
    return found


def _takes_a_step_away(cell: Cell) -> bool:
    return cell.fault in TAKES_AWAY if cell.fault else bool(cell.strikes)


def _calls_in_hands(pipeline: Pipeline, cell: Cell, seen: Seen) -> int:
    """How many calls may be repeated: one for each attempt at a model that was lost when it may have called it."""
    if not _takes_a_step_away(cell):
        return 0
    lost = Counter({agent.id: _lost(seen, agent.id) for agent in pipeline.agents if agent.model})
    for point in cell.strikes:
        if point not in REPEATS_A_CALL and cell.fault not in TAKES_AWAY and lost[cell.agent]:
            lost[cell.agent] -= 1
    return lost.total()


def _lost(seen: Seen, agent: str) -> int:
    """How many attempts at an agent were taken from a worker that was gone."""
    tries = [entry for step in seen.run["steps"] if step["agent"] == agent for entry in step["tries"]]
    return sum(entry["state"] == "lost" for entry in tries)


def _effects(pipeline: Pipeline, seen: Seen) -> Counter[str]:
    """How often an effect in ctx.once was done, by agent; and how often a handler ran that may not be repeated."""
    strict = {
        step["agent"]
        for step in seen.run["steps"]
        if pipeline.by_id[step["agent"]].handler and not all(entry["repeatable"] for entry in step["tries"])
    }
    return Counter(note.agent for note in seen.notes if note.point == CrashPoint.EFFECT_DONE) + Counter(
        f"{note.agent} itself" for note in seen.notes if note.point == CrashPoint.CALL_BEFORE and note.agent in strict
    )


def _more(found: Mapping[str, int], normal: Mapping[str, int]) -> int:
    return sum(max(0, count - normal.get(name, 0)) for name, count in found.items())


def _listed(places: frozenset[str]) -> str:
    shown = sorted(places)[:PLACES_SHOWN_MAX]
    return ", ".join(shown) + (f" and {len(places) - len(shown)} more" if len(places) > len(shown) else "")
