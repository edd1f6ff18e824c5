"""What differs between two runs, agent by agent: what each was given, was told to do, did, and cost. Pure.

Both as `operations.document` gives them, so that nothing is shown that a schema calls sensitive; that such a value
differs is told by its hash.
"""

from dataclasses import asdict, dataclass
from difflib import unified_diff
from itertools import islice
from typing import TYPE_CHECKING

from app.runs.given import gate_seen, outputs_read, tries_by_id
from app.words import duration, lines

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from app.pipelines.model import Agent, Json, Pipeline

# Of a value so many lines are compared, so long, and of what differs so many are shown.
COMPARED_MAX_LINES = 2_000
LINE_MAX_CHARS = 2_000
SHOWN_MAX_LINES = 120
CONTEXT_LINES = 2
# Said on its own; what the rest of a definition says is compared field by field.
_OWN = {"id", "model", "handler", "gate", "prompt", "schema"}
# Derived from the file's own fields.
_DERIVED = {"inputs", "reads", "key_parts", "key_inputs"}


@dataclass(frozen=True, slots=True)
class Side:
    """A run, its definition, and its attempts by id."""

    run: "Json"
    pipeline: "Pipeline"
    tries: "Mapping[str, Json]"


def diff(first: "tuple[Json, Pipeline]", second: "tuple[Json, Pipeline]") -> "Json":
    """What differs, of plain JSON types. Times, costs and counts are facts that differ always, and are no changes.

    Keys: first and second (run_id, pipeline, version, state, partial, created_at, seconds, totals), same, changes (of
    the runs: input, state, version, …) and agents. Each of `agents` has agent, only_in (null, first or second), facts
    ({state, generation, attempts, seconds, cost_usd}: [first, second]) and changes. A change has what, and either
    first and second, or diff: the lines of a unified diff, with left_out (how many more there were). `redacted` is true
    where only what is not shown differs.
    """
    sides = tuple(Side(run, pipeline, tries_by_id(run)) for run, pipeline in (first, second))
    one, other = sides
    names = list(dict.fromkeys(agent.id for side in sides for agent in side.pipeline.agents))
    agents = [_agent(name, one, other) for name in names]
    changes = [
        *_changed("pipeline", one.run["pipeline"], other.run["pipeline"]),
        *_changed("version", one.run["version"], other.run["version"]),
        *_changed("state", _state(one.run), _state(other.run)),
        *_changed("input", one.run["input"], other.run["input"]),
    ]
    return {
        "first": _named(one.run),
        "second": _named(other.run),
        "same": not changes and not any(entry["changes"] or entry["only_in"] for entry in agents),
        "changes": changes,
        "agents": agents,
    }


def _named(run: "Json") -> "Json":
    kept = ("pipeline", "version", "state", "partial", "created_at", "totals")
    return {"run_id": run["id"], **{name: run[name] for name in kept}, "seconds": duration(run)}


def _state(run: "Json") -> str:
    return str(run["state"]) + (" (partial)" if run["partial"] else "")


def _agent(name: str, one: Side, other: Side) -> "Json":
    before, after = _step(one, name), _step(other, name)
    if before is None or after is None:
        return {"agent": name, "only_in": "second" if before is None else "first", "facts": {}, "changes": []}
    steps = (before, after)
    facts = {
        "state": [step["state"] for step in steps],
        "generation": [step["generation"] for step in steps],
        "attempts": [step["attempts"] for step in steps],
        "seconds": [_seconds(step) for step in steps],
        "cost_usd": [_cost(step) for step in steps],
    }
    changes = [
        *_definition(one.pipeline.by_id[name], other.pipeline.by_id[name]),
        *_executed(name, one, other),
    ]
    return {"agent": name, "only_in": None, "facts": facts, "changes": changes}


def _step(side: Side, name: str) -> "Json | None":
    return next((step for step in side.run["steps"] if step["agent"] == name), None)


def _seconds(step: "Json") -> float:
    return round(sum(duration(entry) or 0.0 for entry in step["tries"]), 3)


def _cost(step: "Json") -> float | None:
    costs = [entry["cost_usd"] for entry in step["tries"] if entry["cost_usd"] is not None]
    return round(sum(costs), 6) if costs else None


def _definition(one: "Agent", other: "Agent") -> "Iterator[Json]":
    """What the files say."""
    for name in ("model", "handler", "gate", "schema"):
        yield from _changed(name, getattr(one, name), getattr(other, name))
    prompts = [asdict(agent.prompt) if agent.prompt else None for agent in (one, other)]
    yield from _changed("prompt", *prompts)
    fields = [asdict(agent) for agent in (one, other)]
    for name in fields[0].keys() - _OWN - _DERIVED:
        yield from _changed(f"definition: {name}", fields[0][name], fields[1][name])


def _executed(name: str, one: Side, other: Side) -> "Iterator[Json]":
    """What the attempts that count were given, saw and gave."""
    entries = [_current(side, name) for side in (one, other)]
    yield from _changed("state", *(_ended(side, name) for side in (one, other)))
    if entries[0] is None or entries[1] is None:
        return
    yield from _changed("handler code", entries[0]["code_hash"], entries[1]["code_hash"])
    if entries[0]["model"] and entries[1]["model"]:
        yield from _changed("model that answered", entries[0]["model"], entries[1]["model"])
    given = [outputs_read(entry, side.tries) for entry, side in zip(entries, (one, other), strict=True) if entry]
    hashes = [{agent: read["hash"] for agent, read in entry["reads"].items()} for entry in entries if entry]
    for agent in dict.fromkeys([*hashes[0], *hashes[1]]):
        differs = hashes[0].get(agent) != hashes[1].get(agent)
        yield from _changed(f"input: output of {agent}", given[0].get(agent), given[1].get(agent), differs=differs)
    gates = [
        gate_seen(entry, side.pipeline.by_id[name], side.run, side.tries)
        for entry, side in zip(entries, (one, other), strict=True)
        if entry
    ]
    seen = [{"verdict": gate["verdict"], **gate["values"]} if gate else None for gate in gates]
    yield from _changed("gate saw", *seen)
    errors = [{key: (entry["error"] or {}).get(key) for key in ("code", "message")} for entry in entries if entry]
    yield from _changed("error", *(error if error["code"] else None for error in errors))
    differs = entries[0]["output_hash"] != entries[1]["output_hash"]
    yield from _changed("output", entries[0]["output"], entries[1]["output"], differs=differs)


def _current(side: Side, name: str) -> "Json | None":
    """The attempt that counts, or the last one."""
    step = _step(side, name)
    if step is None or not step["tries"]:
        return None
    last: Json = step["tries"][-1]
    return side.tries.get(step["attempt_id"], last)


def _ended(side: Side, name: str) -> str | None:
    step = _step(side, name)
    return step["state"] if step else None


def _changed(what: str, one: object, other: object, *, differs: bool | None = None) -> "Iterator[Json]":
    """A change, if it is one. `differs` says it of what is behind redacted values."""
    if one == other:
        if differs:
            yield {"what": what, "redacted": True}
        return
    before, after = list(_lines(one)), list(_lines(other))
    if max(len(before), len(after)) <= 1:
        yield {"what": what, "first": one, "second": other}
        return
    found = unified_diff(before, after, "first", "second", n=CONTEXT_LINES, lineterm="")
    shown = list(islice(found, SHOWN_MAX_LINES))
    yield {"what": what, "diff": shown[2:], "left_out": sum(1 for _ in found)}


def _lines(value: object) -> "Iterator[str]":
    """A value as the lines that are compared."""
    if value is None:
        return
    for line, _ in islice(lines("", value), COMPARED_MAX_LINES):
        yield line[:LINE_MAX_CHARS]
