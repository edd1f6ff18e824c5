"""The audit's checklist, asked of what happened: which promise did a run keep? Pure: from what is recorded of it.

What the checker of the rules says already (invariants.py) is taken from there; what a skill file promises beyond these
rules is judged here. A promise that a run never came near is not applicable, which is no praise.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from app.pipelines import expressions, plan
from app.pipelines.model import FailureMode, canonical_json

if TYPE_CHECKING:
    from app.pipelines.model import Agent, Json, Pipeline
    from app.runs.invariants import Violation

Verdict = Literal["kept", "broken", "not applicable"]
Said = tuple[Verdict, str]

EVIDENCE_MAX = 20  # breaches that are listed of one rule
# A deadline is seen by a sweep, which comes twice a second, or every few seconds where workers are busy.
DEADLINE_GRACE_S = 5


@dataclass(frozen=True, slots=True)
class Promise:
    """A rule of the checklist (its id), whether this run kept it, and what shows it."""

    rule: str
    verdict: Verdict
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class History:
    """A run as `Reads.run` gives it, its events and effects, what contradicts the rules, and what it ran on."""

    run: "Json"
    events: "list[Json]"
    effects: "list[Json]"
    violations: "Collection[Violation]"
    pipeline: "Pipeline"
    aliases: Mapping[str, str]

    @cached_property
    def tries(self) -> "list[Json]":
        return [entry for step in self.run["steps"] for entry in step["tries"]]

    @cached_property
    def completed(self) -> "list[Json]":
        return [entry for entry in self.tries if entry["state"] == "completed"]

    def agent(self, entry: "Json") -> "Agent":
        return self.pipeline.by_id[entry["agent"]]

    def named(self, *names: str) -> "list[Json]":
        return [event for event in self.events if event["name"] in names]

    def breaches(self, *rules: int) -> list[str]:
        """What contradicts these of the rules that always hold."""
        return [f"{found.agent or 'the run'}: {found.sentence}" for found in self.violations if found.rule in rules]

    def stretch(self, entry: "Json") -> int:
        """How often the run had been resumed when an attempt began: each time its budget of failures is new."""
        return sum(event["at"] <= entry["started_at"] for event in self.named("run.resumed"))


def judge(history: History) -> tuple[Promise, ...]:
    """Each rule of the checklist, in its order."""
    promises = []
    for rule, look in _LOOKS.items():
        said = list(look(history))
        broken = [evidence for verdict, evidence in said if verdict == "broken"]
        kept = [evidence for verdict, evidence in said if verdict == "kept"]
        if broken:
            promises.append(Promise(rule, "broken", tuple(broken[:EVIDENCE_MAX])))
        elif kept:
            promises.append(Promise(rule, "kept", tuple(kept)))
        else:
            promises.append(Promise(rule, "not applicable", tuple(evidence for _, evidence in said)))
    return tuple(promises)


# Each yields what it saw. One breach breaks the promise; with nothing but "not applicable" it was never tested.


def _breaches(history: History, *rules: int) -> Iterator[Said]:
    return (("broken", sentence) for sentence in history.breaches(*rules))


def _consistency(history: History) -> Iterator[Said]:
    yield from _breaches(history, 9)
    by_id = {entry["id"]: entry for entry in history.tries}
    reads = [(entry, other, read) for entry in history.tries for other, read in entry["reads"].items()]
    for entry, other, read in reads:
        if by_id.get(read["attempt"], {}).get("output_hash") != read["hash"]:
            yield "broken", f"{_name(entry)} read an output of {other} that is not recorded."
    stale = [f"{_name(entry)} of {other}" for entry in history.tries for other in entry.get("stale_reads") or {}]
    if stale:
        yield "kept", f"Stale reads, each marked: {', '.join(stale[:EVIDENCE_MAX])}."
    if reads:
        yield "kept", f"{_count(reads, 'read')} pinned by attempt and hash, each a recorded output."
    else:
        yield "not applicable", "No attempt read another agent's output."


def _failure_boundary(history: History) -> Iterator[Said]:
    yield from _breaches(history, 2, 3)
    gated = [entry for entry in history.completed if history.agent(entry).gate and not entry["decided_by"]]
    refused = [entry for entry in history.tries if (entry["error"] or {}).get("code") == "gate_refused"]
    if gated or refused:
        yield "kept", f"{_count(gated, 'output')} behind a gate that held; {_count(refused, 'attempt')} refused by one."
    elif any(step["depends_on"] and step["tries"] for step in history.run["steps"]):
        yield "kept", "Nothing began before what it depends on had ended."
    else:
        yield "not applicable", "Nothing was executed that depends on another agent."


def _failure_mode(history: History) -> Iterator[Said]:
    yield from _breaches(history, 5)
    failed = [step for step in history.run["steps"] if step["state"] in {"discarded", "cancelled"}]
    for step in failed:
        yield (
            "kept",
            f"{step['agent']} is {step['state']} under {step['failure_mode']}: the run is {_run_state(history)}.",
        )
    if not failed:
        yield "not applicable", "No agent was given up."


def _join(history: History) -> Iterator[Said]:
    joins = {agent.id for agent in history.pipeline.agents if len(agent.depends_on) > 1}
    for found in history.violations:
        if found.rule == 2 and found.agent in joins:
            yield "broken", f"{found.agent}: {found.sentence}"
    for step in history.run["steps"]:
        if step["agent"] in joins and step["tries"]:
            modes = {history.pipeline.by_id[other].failure_mode for other in step["depends_on"]}
            ended = "had ended, however it did" if FailureMode.CONTINUE in modes else "was completed"
            yield "kept", f"{step['agent']} began once each of its {len(step['depends_on'])} branches {ended}."
    yield "not applicable", "No join began."


def _once(history: History) -> Iterator[Said]:
    yield from _breaches(history, 1, 7)
    if history.completed:
        others = [entry for entry in history.tries if entry["state"] != "completed"]
        once = f"{_count(history.completed, 'output')} committed, each once a generation"
        yield "kept", f"{once}; {_count(others, 'other attempt')}."
    else:
        yield "not applicable", "No output was committed."


def _effects(history: History) -> Iterator[Said]:
    done = {(entry["agent"], entry["generation"]) for entry in history.completed if not entry["decided_by"]}
    begun_in = {entry["id"]: entry["generation"] for entry in history.tries}
    for effect in history.effects:
        if effect["state"] == "begun" and (effect["agent"], begun_in.get(effect["attempt_id"])) in done:
            yield (
                "broken",
                f"{effect['agent']} is completed, and its effect {effect['key']!r} was never seen to happen.",
            )
    yield from _breaches(history, 7)
    happened = [effect for effect in history.effects if effect["state"] == "happened"]
    if history.effects:
        yield (
            "kept",
            f"{_count(happened, 'effect')} by ctx.once, each once; {len(history.effects) - len(happened)} open.",
        )
    else:
        yield "not applicable", "No effect was recorded by ctx.once."


def _key(history: History) -> Iterator[Said]:
    yield from _breaches(history, 4)
    mine = {entry["id"] for entry in history.tries}
    foreign = [entry for entry in history.completed if entry["reused_from"] and entry["reused_from"] not in mine]
    for entry in foreign:
        yield "kept", f"{_name(entry)} took another run's output by its key, made from the same inputs."
    if history.tries and not foreign:
        yield "kept", "No output came from another run."
    elif not history.tries:
        yield "not applicable", "No key was used."


def _stable_key(history: History) -> Iterator[Said]:
    keys: dict[tuple[str, int], set[str]] = {}
    again: Counter[tuple[str, int]] = Counter()
    for entry in history.tries:
        if entry["key"] and not entry["decided_by"]:
            keys.setdefault((entry["agent"], entry["generation"]), set()).add(entry["key"])
            again[entry["agent"], entry["generation"]] += 1
    for (agent, generation), found in keys.items():
        if len(found) > 1:
            yield "broken", f"The attempts of {agent} in generation {generation} have {len(found)} different keys."
    repeated = [place for place, count in again.items() if count > 1]
    if repeated:
        yield "kept", f"{_count(repeated, 'step')} attempted more than once, each time with the same key."
    else:
        yield "not applicable", "Nothing was attempted twice."


def _trace(history: History) -> Iterator[Said]:
    yield from _breaches(history, 8)
    on = "on" if history.pipeline.tracing.enabled else "off, so that only these show it"
    yield "kept", f"{_count(history.events, 'event')}, gapless; each attempt has its start and end. Tracing is {on}."


def _resume(history: History) -> Iterator[Said]:
    yield from _breaches(history, 1, 5)
    resumed, rescued = history.named("run.resumed"), history.named("step.rescued")
    if resumed or rescued:
        counts = f"Resumed {len(resumed)} times, rescued {len(rescued)} times"
        yield "kept", f"{counts}: no output that was committed was made again but on purpose."
    else:
        yield "not applicable", "Nothing had to go on from a checkpoint."


def _dead_letter(history: History) -> Iterator[Said]:
    yield from _breaches(history, 6)
    discarded = history.named("step.discarded")
    if discarded:
        yield "kept", f"{_count(discarded, 'step')} given up, each with its dead letter."
    else:
        yield "not applicable", "Nothing was given up."


def _retries(history: History) -> Iterator[Said]:
    failures: Counter[tuple[str, int, int]] = Counter()
    for entry in history.tries:
        if entry["state"] == "failed" and (entry["error"] or {}).get("code") != "rate_limited":
            failures[entry["agent"], entry["generation"], history.stretch(entry)] += 1
    for (agent, generation, _), count in failures.items():
        most = history.pipeline.by_id[agent].retry_policy.max_attempts
        if count > most:
            yield "broken", f"{agent} failed {count} times in generation {generation}; max_attempts is {most}."
    for step in history.run["steps"]:
        most = history.pipeline.by_id[step["agent"]].retry_policy.max_worker_losses
        if step["worker_losses"] > most:
            yield "broken", f"{step['worker_losses']} workers died under {step['agent']}; max_worker_losses is {most}."
    yield from _after_deadline(history)
    if history.tries:
        yield (
            "kept",
            f"{_count(history.tries, 'attempt')}, of which {sum(failures.values())} failed: within their limits.",
        )
    else:
        yield "not applicable", "Nothing was attempted."


def _after_deadline(history: History) -> Iterator[Said]:
    """A resume after the deadline lifts it: then the run has none any more."""
    if history.run["deadline_at"] is None:
        return
    last = datetime.fromisoformat(history.run["deadline_at"]) + timedelta(seconds=DEADLINE_GRACE_S)
    for entry in history.tries:
        if datetime.fromisoformat(entry["started_at"]) > last and not entry["decided_by"]:
            yield "broken", f"{_name(entry)} began after the run's deadline."


def _approval(history: History) -> Iterator[Said]:
    asking = {agent.id for agent in history.pipeline.agents if agent.requires_human_approval}
    for found in history.violations:
        if found.rule == 3 and found.agent in asking:
            yield "broken", f"{found.agent}: {found.sentence}"
    for approval in history.run["approvals"]:
        agent, digest = approval["agent"], approval["digest"][:12]
        late = approval["expires_at"] and approval["decided_at"] and approval["decided_at"] > approval["expires_at"]
        if approval["state"] == "approved" and late:
            yield "broken", f"{agent} was approved after the question had expired."
        elif approval["state"] == "requested" and approval["expires_at"] is None:
            yield "broken", f"{agent} waits for a person since {approval['requested_at']}, without an end."
        elif approval["decided_by"]:
            yield "kept", f"{agent}: {approval['state']} by {approval['decided_by']}, of the digest {digest}."
        else:
            yield "kept", f"{agent}: {approval['state']}, of the digest {digest}."
    yield "not applicable", "Nobody was asked."


def _schemas(history: History) -> Iterator[Said]:
    from jsonschema import Draft202012Validator

    checked = [entry for entry in history.completed if history.agent(entry).schema is not None]
    for entry in checked:
        if not Draft202012Validator(history.agent(entry).schema or {}).is_valid(entry["output"]):
            yield "broken", f"The output of {_name(entry)} is not in its schema."
    for entry in history.tries:
        error = entry["error"] or {}
        if error.get("code") == "author_mistake" and "has no value" in error.get("message", ""):
            yield "broken", f"{_name(entry)} read a field that was not there: {error['message']}"
    if checked:
        yield "kept", f"{_count(checked, 'output')} fit their schemas."
    else:
        yield "not applicable", "No output has a schema."


def _bounded(history: History) -> Iterator[Said]:
    for entry in history.tries:
        if (entry["error"] or {}).get("code") == "max_tokens":
            yield (
                "broken",
                f"{_name(entry)} was cut at its max_tokens, {history.agent(entry).max_tokens:,}, and paid for.",
            )
    sizes = {_name(entry): len(canonical_json(entry["output"]).encode()) for entry in history.completed}
    if sizes:
        largest = max(sizes, key=lambda name: sizes[name])
        yield "kept", f"The largest output has {sizes[largest]:,} bytes, {largest}."
    else:
        yield "not applicable", "No output was committed."


def _untrusted(history: History) -> Iterator[Said]:
    """A file that asks for no approval promises none: what was done without one is said, and no breach."""
    approved = {
        (entry["agent"], entry["generation"]) for entry in history.run["approvals"] if entry["state"] == "approved"
    }
    acted = {(effect["agent"], effect["generation"]) for effect in history.effects}
    for entry in history.completed:
        agent = history.agent(entry)
        upstream = plan.ancestors(plan.dependencies(history.pipeline), agent.id) - {agent.id}
        models = {name for name in upstream if history.pipeline.by_id[name].model is not None}
        if agent.handler is None or not models or entry["decided_by"]:
            continue
        place = (entry["agent"], entry["generation"])
        asked = {path[0] for path in expressions.parse(agent.gate).references} if agent.gate else set()
        if place in approved:
            yield "kept", f"{_name(entry)} was approved by a person."
        elif asked - models:
            yield "kept", f"{_name(entry)} stood behind a gate that no model wrote."
        else:
            effects = ", and had effects" if place in acted else ""
            yield "not applicable", f"{_name(entry)} was executed on what models wrote{effects}; nobody was asked."
    yield "not applicable", "No handler was executed behind a model, and approved."


def _model(history: History) -> Iterator[Said]:
    answered = [entry for entry in history.tries if entry["model"] and history.agent(entry).model]
    for entry in answered:
        named = history.agent(entry).model or ""
        expected = history.aliases.get(named, named)
        # The API answers with a dated name of the same model.
        if not entry["model"].startswith(expected):
            yield "broken", f"{_name(entry)} names {named}, and {entry['model']} answered."
        elif expected != named:
            yield (
                "kept",
                f"{_name(entry)} names {named}, which is retired; {entry['model']} answered, as its alias says.",
            )
    if answered:
        yield "kept", f"{_count(answered, 'answer')} of the models that were meant."
    else:
        yield "not applicable", "No model answered."


def _name(entry: "Json") -> str:
    return f"attempt {entry['number']} of {entry['agent']}"


def _count(found: Collection[object], what: str) -> str:
    return f"{len(found):,} {what}{'' if len(found) == 1 else 's'}"


def _run_state(history: History) -> str:
    return f"{history.run['state']}{', in part' if history.run['partial'] else ''}"


_LOOKS: dict[str, Callable[[History], Iterator[Said]]] = {
    "consistency-undeclared": _consistency,
    "no-failure-boundary": _failure_boundary,
    "failure-mode-undeclared": _failure_mode,
    "join-without-failure-mode": _join,
    "not-idempotent": _once,
    "effect-without-check": _effects,
    "key-without-run": _key,
    "key-not-stable": _stable_key,
    "no-trace": _trace,
    "no-resume": _resume,
    "no-dead-letter": _dead_letter,
    "retries-beyond-deadline": _retries,
    "approval-without-expiry": _approval,
    "schema-lacks-field": _schemas,
    "unbounded-output": _bounded,
    "untrusted-output": _untrusted,
    "retired-model": _model,
}
