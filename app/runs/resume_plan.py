"""What a resume would do, agent by agent: what it reuses, does again, or reuses although it is stale. Pure.

The states after the resume come from `Orders.rehearse`, so that the plan is what the resume itself would do.
"""

from dataclasses import asdict
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from app.runs.states import StepState
from app.words import dollars, short

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from app.pipelines.model import Agent, Json, Pipeline

REUSE = "reuse"  # completed; its output is kept
STALE = "stale"  # likewise, though what it was made from has changed, or will
RERUN = "re-run"  # will be executed
UNKNOWN = "outcome unknown"  # executes, and may not be repeated: a person must look afterwards
GOES_ON = "goes on"  # is under way, and is left alone

_OWN_WORD = {"model": "model", "prompt": "prompt", "schema": "schema", "output_schema": "schema", "handler": "handler"}
_ENDED_BADLY = {StepState.DISCARDED, StepState.CANCELLED, StepState.SKIPPED}


def resume_plan(
    run: "Json",
    after: "Mapping[str, tuple[str, int]]",
    pinned: "Pipeline",
    published: "Pipeline | None",
    *,
    now: datetime,
    code_here: "Mapping[str, str | None]",
    effects: "Sequence[Json]",
) -> "Json":
    """The plan, of plain JSON types.

    `run` is as `Reads.run` gives it, `after` each agent's state and generation once resumed, `published` the definition
    that new runs take, `code_here` the hash of each handler's code in this environment (None: not found here).

    Keys: run_id, pipeline, pinned and published ({version, hash}), published_changes (agent: what differs), agents,
    effects and approvals (those of `agents`), loops (agent, rerun, rounds: what a gate that refuses may have done
    again, and how often), saved_usd, estimate_usd, unpriced (agents that never had a price). Each of `agents` has
    agent, verdict (one of those above), reason, past_ttl (kept, though older than the file's ttl),
    generation, changed (input, handler code), published_changes, cost_usd (of what is kept, or what it cost before),
    effects ({key, state}) and approval (None, "asked" or "asked again").
    """
    steps = {step["agent"]: step for step in run["steps"]}
    differs = _published_changes(pinned, published) if published else {}
    agents = []
    for name, step in steps.items():
        verdict, reason = _verdict(step, *after[name])
        kept = verdict == REUSE
        changed = _input_changes(step, steps, after, pinned.by_id[name]) if kept else []
        past_ttl = kept and _past_ttl(step, pinned.checkpointing.ttl_minutes, now)
        if past_ttl:
            reason += f"; older than its ttl of {pinned.checkpointing.ttl_minutes} minutes"
        if _code_changed(step, code_here.get(name)):
            changed.append("handler code")
        refuses = verdict == RERUN and _refuses_again(step, steps, after, pinned.by_id[name])
        if refuses:
            reason += "; its gate would refuse the same values"
        executes = verdict == RERUN and not refuses
        agents.append(
            {
                "agent": name,
                "verdict": STALE if kept and changed else verdict,
                "reason": reason,
                "generation": after[name][1],
                "changed": changed,
                "past_ttl": past_ttl,
                "published_changes": differs.get(name, []),
                "cost_usd": _cost(step, kept=kept),
                "effects": _repeats(step, pinned.by_id[name], effects, after[name][1]) if executes else [],
                "approval": _approval(run, step, after, pinned.by_id[name], changed) if executes else None,
            }
        )
    return {
        "run_id": run["id"],
        "pipeline": run["pipeline"],
        "pinned": _named(pinned),
        "published": _named(published) if published else None,
        "published_changes": differs,
        "agents": agents,
        "loops": _loops(steps, after, pinned, [entry["agent"] for entry in agents if entry["verdict"] == RERUN]),
        **_sums(agents, pinned),
    }


def _verdict(step: "Json", state: str, generation: int) -> tuple[str, str]:
    before = step["state"]
    if generation > step["generation"]:
        return (RERUN, f"again, in generation {generation}") if state in _TO_DO else (before, "")
    if state == StepState.COMPLETED:
        return REUSE, "overridden by hand" if _current(step).get("decided_by") else "completed"
    if before == StepState.EXECUTING and state == StepState.DISCARDED:
        return UNKNOWN, "it executes on an old input, and may not be repeated"
    if before in _ENDED_BADLY and state in _TO_DO:
        return RERUN, f"it was {before}"
    if before == StepState.PENDING:
        return RERUN, "it waits to begin again" if step["tries"] else "it has not begun"
    return (GOES_ON if state == before else state), before


def _past_ttl(step: "Json", ttl_minutes: int | None, now: datetime) -> bool:
    """Whether a checkpoint is older than the file wants it. It is kept: nothing that was paid for expires by itself."""
    return ttl_minutes is not None and now - datetime.fromisoformat(step["ended_at"]) > timedelta(minutes=ttl_minutes)


_TO_DO = {StepState.PENDING, StepState.AVAILABLE}


def _current(step: "Json") -> "Json":
    return next((entry for entry in step["tries"] if entry["id"] == step["attempt_id"]), {})


def _input_changes(
    step: "Json", steps: "Mapping[str, Json]", after: "Mapping[str, tuple[str, int]]", agent: "Agent"
) -> "list[str]":
    """Whether what a kept output was made from is no longer what stands there, or will not be."""
    entry = _current(step)
    if not entry or entry["decided_by"]:
        return []
    for name in agent.reads:
        now = _current(steps[name]).get("output_hash") if steps[name]["state"] == StepState.COMPLETED else None
        was = entry["reads"].get(name, {}).get("hash")
        if after[name][0] != StepState.COMPLETED or now != was:
            return ["input"]
    return []


def _code_changed(step: "Json", here: str | None) -> bool:
    past = [entry["code_hash"] for entry in step["tries"] if entry["code_hash"]]
    return bool(past) and here is not None and past[-1] != here


def _cost(step: "Json", *, kept: bool) -> float | None:
    """What the kept output cost; else what the step's last paid attempt cost, as the best guess there is."""
    if kept:
        return _current(step).get("cost_usd")
    return next((entry["cost_usd"] for entry in reversed(step["tries"]) if entry["cost_usd"] is not None), None)


def _refuses_again(
    step: "Json", steps: "Mapping[str, Json]", after: "Mapping[str, tuple[str, int]]", agent: "Agent"
) -> bool:
    """Whether its gate refused, and will read what it has read."""
    code = (_current(step).get("error") or {}).get("code")
    return code == "gate_refused" and not _input_changes(step, steps, after, agent)


def _executed(entry: "Json") -> bool:
    """Whether an attempt passed its key, its gate and its approval, so that it may have had an effect."""
    refused = (entry["error"] or {}).get("code") == "gate_refused"
    return bool(entry["key"]) and entry["state"] != "suspended" and not entry["reused_from"] and not refused


def _repeats(step: "Json", agent: "Agent", effects: "Sequence[Json]", generation: int) -> "list[Json]":
    """The effects that are done again: those on record, or that there may be some off the record.

    Within their generation what is recorded as happened is not done again.
    """
    recorded = [
        {"key": effect["key"], "state": effect["state"]}
        for effect in effects
        if effect["agent"] == step["agent"] and (effect["generation"] < generation or effect["state"] != "happened")
    ]
    off_record = agent.handler and not agent.idempotent
    unrecorded = off_record and any(_executed(entry) and not entry["repeatable"] for entry in step["tries"])
    return recorded or ([{"key": None, "state": "unrecorded"}] if unrecorded else [])


def _approval(
    run: "Json",
    step: "Json",
    after: "Mapping[str, tuple[str, int]]",
    agent: "Agent",
    changed: "Sequence[str]",
) -> str | None:
    """How approval will be asked. One that was given holds for what was approved: generation, inputs and code."""
    if not agent.requires_human_approval:
        return None
    asked = [entry["state"] for entry in run["approvals"] if entry["agent"] == agent.id]
    same = all(after[name] == (StepState.COMPLETED, _generation_of(run, name)) for name in agent.reads)
    if "approved" in asked and after[agent.id][1] == step["generation"] and not changed and same:
        return None
    return "asked again" if asked else "asked"


def _loops(
    steps: "Mapping[str, Json]",
    after: "Mapping[str, tuple[str, int]]",
    pinned: "Pipeline",
    again: "Sequence[str]",
) -> "list[Json]":
    """The review loops that what is done again may begin, with the rounds that they have left."""
    found = []
    for name in again:
        loop = pinned.by_id[name].on_refused
        used = steps[name]["rounds"] if after[name][1] == steps[name]["generation"] else 0
        if loop and loop.max_rounds > used:
            found.append({"agent": name, "rerun": loop.rerun, "rounds": loop.max_rounds - used})
    return found


def _generation_of(run: "Json", agent: str) -> int:
    return next(int(step["generation"]) for step in run["steps"] if step["agent"] == agent)


def _published_changes(pinned: "Pipeline", published: "Pipeline") -> "dict[str, list[str]]":
    """By agent, what the published definition has that the run's own has not."""
    found: dict[str, list[str]] = {}
    for agent in pinned.agents:
        other = published.by_id.get(agent.id)
        if other is None:
            found[agent.id] = ["it is gone"]
        elif changes := _differences(asdict(agent), asdict(other)):
            found[agent.id] = changes
    return found | {agent.id: ["it is new"] for agent in published.agents if agent.id not in pinned.by_id}


def _differences(old: "Json", new: "Json") -> "list[str]":
    names = [name for name in old if old[name] != new[name]]
    words = sorted({_OWN_WORD[name] for name in names if name in _OWN_WORD})
    rest = [name for name in names if name not in _OWN_WORD]
    return words + ([f"definition ({', '.join(rest)})"] if rest else [])


def _named(pipeline: "Pipeline") -> "Json":
    return {"version": pipeline.version, "hash": pipeline.hash}


def _sums(agents: "Sequence[Json]", pinned: "Pipeline") -> "Json":
    kept = [entry for entry in agents if entry["verdict"] in {REUSE, STALE}]
    again = [entry for entry in agents if entry["verdict"] == RERUN]
    return {
        "effects": [{"agent": entry["agent"], **effect} for entry in agents for effect in entry["effects"]],
        "approvals": [entry["agent"] for entry in agents if entry["approval"]],
        "saved_usd": round(sum(entry["cost_usd"] or 0.0 for entry in kept), 6),
        "estimate_usd": round(sum(entry["cost_usd"] or 0.0 for entry in again), 6),
        "unpriced": [
            entry["agent"] for entry in again if entry["cost_usd"] is None and pinned.by_id[entry["agent"]].model
        ],
    }


def sentences(plan: "Json") -> list[str]:
    """What a plan means, for whoever decides on it."""
    return [*_definition(plan), *_stale(plan), *_old(plan), *_consequences(plan), _money(plan)]


def _definition(plan: "Json") -> list[str]:
    pinned, published = plan["pinned"], plan["published"]
    if published is None or published["hash"] == pinned["hash"]:
        return []
    said = f"The run stays on the definition that it pinned, {pinned['version']} ({pinned['hash'][:12]})."
    differs = "; ".join(f"{agent}: {', '.join(changes)}" for agent, changes in plan["published_changes"].items())
    told = f" It differs in {differs}." if differs else ""
    return [
        f"{said} {published['version']} ({published['hash'][:12]}) is published now.{told} Only a new run takes it."
    ]


def _stale(plan: "Json") -> list[str]:
    stale = [entry["agent"] for entry in plan["agents"] if entry["verdict"] == "stale"]
    if not stale:
        return []
    name = short(plan["run_id"])
    again = f"stepfast resume {name} --from {stale[0]}"
    return [f"Kept, though made from something else than what stands now: {', '.join(stale)}. To redo: {again}"]


def _old(plan: "Json") -> list[str]:
    old = [entry["agent"] for entry in plan["agents"] if entry["past_ttl"]]
    if not old:
        return []
    again = f"stepfast resume {short(plan['run_id'])} --from {old[0]}"
    return [f"Kept, though older than the checkpoints' ttl: {', '.join(old)}. To redo: {again}"]


def _consequences(plan: "Json") -> list[str]:
    told = []
    if plan["effects"]:
        listed = ", ".join(
            f"{effect['agent']}: {effect['key']} ({effect['state']})"
            if effect["key"] is not None
            else f"{effect['agent']}: whatever it does, which is not on record"
            for effect in plan["effects"]
        )
        told.append(f"Effects that would be repeated: {listed}.")
    asked: dict[str, list[str]] = {}
    for entry in plan["agents"]:
        if entry["approval"]:
            asked.setdefault(entry["approval"], []).append(entry["agent"])
    told += [f"Approval will be {how} for {', '.join(names)}." for how, names in asked.items()]
    told += [
        f"Where the gate of {loop['agent']} refuses, {loop['rerun']} and what depends on it are done again, at most "
        f"{loop['rounds']} more {'time' if loop['rounds'] == 1 else 'times'}."
        for loop in plan["loops"]
    ]
    return told


def _money(plan: "Json") -> str:
    unknown = f", and an unknown price for {', '.join(plan['unpriced'])}" if plan["unpriced"] else ""
    return (
        f"Not paid again: {dollars(plan['saved_usd'])}. To be spent, as before: "
        f"{dollars(plan['estimate_usd'])}{unknown}."
    )
