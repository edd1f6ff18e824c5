"""The rules that always hold (RULES), proved from the tables and the event log of each run."""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING
from uuid import UUID

from app.errors import AuthorMistake
from app.runs.evidence import COMMITS, ENDS, LOST_KEYS, OUTPUTS, STARTS, Facts, read_facts, replay, strong_ancestors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sqlalchemy import Connection

    from app.pipelines.model import Json

    # The agent, or None for the whole run, and what contradicts the rule.
    _Found = Iterator[tuple[str | None, str]]

RULES = {
    1: "A step's output is committed once a generation, by whoever holds its claim (or settles its unknown key).",
    2: "No attempt starts before its dependencies are completed (or ended discarded or cancelled under `continue`, or "
    "have an output of which it reads a snapshot).",
    3: "No step is executed whose gate is not true of the recorded outputs that it pinned, nor before its approval.",
    4: "One key in one generation has one recorded outcome; the same key with other inputs is refused.",
    5: "Every unfinished run has a claim, a retry or a message on its way, or a person, key or run that it waits for; "
    "of a concurrency key one run at a time is under way.",
    6: "Every discarded step has exactly one open dead letter until it is resolved; resuming it resolves it.",
    7: "An effect whose outcome is unknown is never repeated by itself, and no gate repeats one that happened.",
    8: "Every attempt has a start and an end in the events, and the events tell the same as the tables.",
    9: "What an attempt reads strongly is what stands there, from its claim to its commit and after; any other read is "
    "of the last committed output, within its age or marked as stale.",
}
# A database that is broken throughout need not be listed throughout.
VIOLATIONS_MAX = 1_000


@dataclass(frozen=True, slots=True)
class Violation:
    """What contradicts rule `rule` (1 to 9). `agent` is None where the whole run, or a key without a run, is meant."""

    rule: int
    run: UUID
    agent: str | None
    sentence: str


def check(connection: "Connection", run_id: UUID | None = None) -> list[Violation]:
    """What contradicts the rules in one run, or in all: at most VIOLATIONS_MAX. Reads RUNS_A_READ runs at a time."""
    found = []
    if run_id is None:
        found += [
            Violation(4, row.run_id, row.agent, f"The key {row.key!r} is {row.state}, and nothing can settle it.")
            for row in connection.execute(LOST_KEYS, {"limit": VIOLATIONS_MAX})
        ]
    for facts in read_facts(connection, run_id):
        if len(found) >= VIOLATIONS_MAX:
            break
        run = UUID(facts.run["id"])
        for rule, checks in _RULES.items():
            found += [Violation(rule, run, agent, sentence) for holds in checks for agent, sentence in holds(facts)]
        found += [Violation(3, run, agent, sentence) for agent, sentence in _gates_held(connection, facts)]
    return found[:VIOLATIONS_MAX]


# The rules. Each check yields the agent (None: the run) and a sentence for everything that contradicts its own.


def _one_output_a_generation(facts: Facts) -> "_Found":
    """1: no two completed attempts of a generation; a step is completed exactly if its own attempt is."""
    completed = Counter((a["agent"], a["generation"]) for a in facts.attempts.values() if a["state"] == "completed")
    for (agent, generation), count in completed.items():
        if count > 1:
            yield agent, f"Generation {generation} has {count} outputs."
    for agent, step in facts.steps.items():
        attempt = facts.attempts.get(step["attempt_id"], {})
        owned = attempt.get("state") == "completed" and attempt["generation"] == step["generation"]
        if (step["state"] == "completed") != owned:
            yield agent, f"The step is {step['state']}, and its attempt {attempt.get('state', 'missing')}."
        if step["state"] != "completed" and completed[agent, step["generation"]]:
            yield agent, f"The step is {step['state']}, and its generation has an output."


def _commits_hold_the_claim(facts: Facts) -> "_Found":
    """1: each commit in the log is by the attempt that executes at that time, or settles its discarded step."""
    for event, told, _ in replay(facts):
        if event["name"] in {"step.completed", "step.reused", "step.settled"}:
            step = told[event["agent"]]
            expected = "discarded" if event["name"] == "step.settled" else "executing"
            if (step.state, step.attempt, step.generation) != (expected, event["attempt_id"], event["generation"]):
                yield event["agent"], f"{event['name']} of {event['attempt_id']} while {step.attempt} was {step.state}."


def _dependencies_ended(facts: Facts) -> "_Found":
    """2: at each claim in the log every dependency is completed, or given up under `continue`; the run goes on."""
    for event, told, run_state in replay(facts):
        if event["name"] != "step.claimed":
            continue
        if run_state not in {"pending", "running"}:
            yield event["agent"], f"It was claimed in a run that was {run_state}."
        for other in facts.agents[event["agent"]]["depends_on"]:
            given_up = (
                told[other].state in {"discarded", "cancelled"} and facts.agents[other]["failure_mode"] == "continue"
            )
            snapshot = other in facts.agents[event["agent"]]["snapshots"] and told[other].last_commit
            if told[other].state != "completed" and not given_up and not snapshot:
                yield event["agent"], f"It was claimed while {other} was {told[other].state}."


def _executed(attempt: "Json") -> bool:
    """Whether the attempt certainly passed its gate: it gave an output of its own, was paid for, or asked a person."""
    by_itself = attempt["state"] == "completed" and not attempt["reused_from"] and not attempt["decided_by"]
    return by_itself or attempt["paid"] or attempt["state"] == "suspended"


def _approved_first(facts: Facts) -> "_Found":
    """3: an agent that asks for approval gives no output before its generation was approved."""
    for event, told, _ in replay(facts):
        agent = event["agent"]
        executed = event["name"] == "step.completed" and facts.agents[agent]["asks"]
        if executed and event["generation"] not in told[agent].approved:
            yield agent, "It was executed before a person approved it."


def _gates_held(connection: "Connection", facts: Facts) -> "_Found":
    """3: the gate of whatever was executed is true of the outputs that its attempt pinned, and these are unchanged."""
    from app.pipelines import expressions

    for attempt in facts.attempts.values():
        agent, gate = attempt["agent"], facts.agents[attempt["agent"]]["gate"]
        if not gate or not _executed(attempt):
            continue
        pinned = [read["attempt"] for read in attempt["reads"].values()]
        rows = connection.execute(OUTPUTS, {"run": facts.run["id"], "ids": pinned}).all()
        values = {row.agent: row.output for row in rows if row.agent} | {"input": rows[0].input}
        try:
            held = expressions.parse(gate).evaluate(values).held
        except AuthorMistake as error:
            yield agent, f"Attempt {attempt['number']} was executed, and {error.message}"
        else:
            if not held:
                yield agent, f"Attempt {attempt['number']} was executed, and its gate {gate} does not hold."


def _pins_are_outputs(facts: Facts) -> "_Found":
    """3: what an attempt pinned are completed attempts of its run, with the hashes that it wrote down."""
    for attempt in facts.attempts.values():
        for agent, read in attempt["reads"].items():
            source = facts.attempts.get(read["attempt"], {})
            if (source.get("agent"), source.get("output_hash")) != (agent, read["hash"]) or not read["hash"]:
                yield attempt["agent"], f"Attempt {attempt['number']} pins an output of {agent} that is not recorded."


def _key_agrees(facts: Facts) -> "_Found":
    """4: an attempt's key is recorded as the attempt ended: with its output, or one that it took, unknown, or freed."""
    for attempt in facts.attempts.values():
        if attempt["decided_by"]:
            continue
        record = attempt["record"] or {}
        found = record.get("state", "free")
        mine = record.get("attempt_id") == attempt["id"]
        if attempt["state"] == "completed":
            problem = _completed_key_problem(attempt, record)
        elif attempt["state"] == "executing" and attempt["key"]:
            taken = found == "completed" and record["inputs_hash"] == attempt["inputs_hash"]
            problem = "" if taken or (mine and found == "reserved") else f"its key is {found}"
        else:
            left = mine and not (found == "unknown" and attempt["code"] == "outcome_unknown")
            problem = f"its key is still {found}" if left else ""
        if problem:
            yield attempt["agent"], f"Attempt {attempt['number']} is {attempt['state']}, and {problem}."


def _completed_key_problem(attempt: "Json", record: "Json") -> str:
    if not attempt["key"]:
        return "its key was refused"
    if record.get("state") != "completed":
        return f"its key is {record.get('state', 'free')}"
    if record["attempt_id"] != (attempt["reused_from"] or attempt["id"]):
        return "its key is another attempt's"
    same = record["inputs_hash"] == attempt["inputs_hash"] and record["output_hash"] == attempt["output_hash"]
    return "" if same else "its key has other inputs or another output"


def _generations_follow(facts: Facts) -> "_Found":
    """4: a generation of a key, of whatever run, begins once the one before it was completed."""
    for before, after in pairwise(facts.keys):
        if (before["agent"], before["key"]) != (after["agent"], after["key"]):
            continue
        if before["state"] != "completed" or after["reserved_at"] < before["ended_at"]:
            which = f"Generation {after['generation']} of the key {after['key']!r}"
            yield after["agent"], f"{which} began before generation {before['generation']} was completed."


def _step_and_attempt_agree(facts: Facts) -> "_Found":
    """5: a step is executing exactly while its attempt is, and suspended exactly while a person is asked."""
    running = {a["id"]: a["agent"] for a in facts.attempts.values() if a["state"] == "executing"}
    claimed = {s["attempt_id"]: agent for agent, s in facts.steps.items() if s["state"] == "executing"}
    for attempt_id in running.keys() ^ claimed.keys():
        agent = running.get(attempt_id) or claimed[attempt_id]
        yield (
            agent,
            f"Attempt {attempt_id} is {'' if attempt_id in running else 'not '}executing, and its step differs.",
        )
    asked = Counter(v["agent"] for v in facts.approvals if v["state"] == "requested")
    for agent, step in facts.steps.items():
        if asked[agent] != (step["state"] == "suspended"):
            yield agent, f"The step is {step['state']}, and {asked[agent]} approvals are requested."


_STATES_OF_RUN = {
    "pending": {"pending", "available", "retryable", "completed", "skipped", "discarded", "cancelled"},
    "failed": {"pending", "executing", "completed", "skipped", "discarded", "cancelled"},
    "completed": {"completed", "skipped", "discarded", "cancelled"},
    "cancelled": {"pending", "completed", "skipped", "discarded", "cancelled"},
}


def _run_goes_on(facts: Facts) -> "_Found":
    """5: an unfinished run has what moves it; an ended one has nothing that waits to be moved."""
    states = {step["state"] for step in facts.steps.values()}
    run_state = facts.run["state"]
    if unfit := states - _STATES_OF_RUN.get(run_state, states):
        yield None, f"The run is {run_state}, and has steps that are {', '.join(sorted(unfit))}."
    moving = states & {"available", "executing", "retryable"}
    if run_state == "running" and not moving:
        yield None, f"The run is running, and nothing of it moves: its steps are {', '.join(sorted(states))}."
    if run_state == "suspended" and (moving or "suspended" not in states):
        yield None, f"The run is suspended, and its steps are {', '.join(sorted(states))}."
    if run_state == "pending" and not moving and not facts.others:
        yield None, "The run waits for another one of its concurrency key, and there is none."
    if moving or "suspended" in states:
        for other in facts.others:
            yield None, f"Run {other} of the same concurrency key is under way too."
    whole = states <= {"completed"} and not any(_ran_without(facts, agent) for agent in facts.steps)
    if run_state == "completed" and facts.run["partial"] == whole:
        yield None, f"The run is marked partial={facts.run['partial']}, and its steps are {', '.join(sorted(states))}."


def _ran_without(facts: Facts, agent: str) -> bool:
    """Whether the attempt that counts began before something on which it depends had ended as it stands now."""
    attempt = facts.attempts.get(facts.steps[agent]["attempt_id"], {"decided_by": "nobody", "reads": {}})
    snapshots = facts.agents[agent]["snapshots"]
    ended = [
        facts.steps[other]["ended_at"]
        for other in facts.agents[agent]["depends_on"]
        if other not in snapshots
        or (facts.agents[other]["failure_mode"] == "continue" and other not in attempt["reads"])
    ]
    return not attempt["decided_by"] and any(attempt["started_at"] < at for at in ended)


def _nothing_forgotten(facts: Facts) -> "_Found":
    """5: in a run that goes on, what is pending waits for a dependency that may still end well."""
    if facts.run["state"] not in {"running", "suspended"}:
        return
    for agent, step in facts.steps.items():
        if step["state"] != "pending":
            continue
        waits = False
        for other in facts.agents[agent]["depends_on"]:
            state, mode = facts.steps[other]["state"], facts.agents[other]["failure_mode"]
            ended = state in {"discarded", "cancelled"}
            if state == "skipped" or (ended and mode != "continue"):
                yield agent, f"It is pending, and {other}, on which it depends, is {state} under {mode}."
            waits = waits or not (state == "completed" or ended)
        if not waits:
            yield agent, "It is pending, and everything on which it depends has ended."


def _key_can_be_settled(facts: Facts) -> "_Found":
    """5: a step that waits for a key waits for an attempt that executes, or for a step that a person may settle."""
    for attempt in facts.attempts.values():
        record = attempt["record"] or {}
        if record.get("state") == "reserved" and record["owner_state"] != "executing":
            yield attempt["agent"], f"The key {attempt['key']!r} is reserved, by an attempt that has ended."
        if record.get("state") == "unknown" and not record["waits_for_a_person"]:
            yield attempt["agent"], f"The key {attempt['key']!r} is unknown, and no discarded step holds it."


def _letters_agree(facts: Facts) -> "_Found":
    """6: a step with an open letter is discarded, by the same attempt; a discarded step's is open or dismissed."""
    by_id = {letter["id"]: letter for letter in facts.letters}
    last = {e["agent"]: e["data"]["dead_letter"] for e in facts.events if e["name"] == "step.discarded"}
    opened = Counter(letter["agent"] for letter in facts.letters if letter["resolved_at"] is None)
    for agent, step in facts.steps.items():
        letter = by_id.get(last.get(agent, ""))
        if step["state"] != "discarded":
            if opened[agent]:
                yield agent, f"The step is {step['state']}, and {opened[agent]} dead letters are open."
        elif not letter:
            yield agent, "The step is discarded, and has no dead letter."
        elif (letter["attempt_id"], letter["generation"]) != (step["attempt_id"], step["generation"]):
            yield agent, "The step is discarded, and its dead letter names another attempt."
        elif opened[agent] != (letter["resolution"] is None) or letter["resolution"] not in {None, "discarded"}:
            yield agent, f"The step is discarded, and its dead letter is {letter['resolution']}."


def _unknown(attempt: "Json") -> bool:
    """Whether nobody knows what the attempt did: it was taken back, and dying under it is not harmless."""
    return attempt["code"] == "outcome_unknown" or (attempt["state"] == "lost" and not attempt["repeatable"])


def _unknown_is_not_repeated(facts: Facts) -> "_Found":
    """7: after an attempt of unknown outcome its generation is not claimed again, nor reopened but by its own name."""
    unknown = {a["id"]: a for a in facts.attempts.values() if _unknown(a)}
    for attempt in unknown.values():
        if attempt["code"] != "outcome_unknown":
            yield (
                attempt["agent"],
                f"Attempt {attempt['number']} was lost, may have had its effect, and is {attempt['code']}.",
            )
    for event, told, _ in replay(facts):
        step = told.get(event["agent"])
        before = unknown.get(step.attempt or "") if step else None
        if not step or not before or before["generation"] != step.generation:
            continue
        if event["name"] == "step.claimed" and event["generation"] == step.generation:
            yield event["agent"], f"It was claimed after attempt {before['number']}, whose outcome is unknown."
        by_name = f" resumed from {event['agent']}"
        if event["name"] == "step.reopened" and not event["data"]["reason"].endswith(by_name):
            why = event["data"]["reason"]
            yield (
                event["agent"],
                f"It was reopened because {why}; the outcome of attempt {before['number']} is unknown.",
            )


def _only_people_repeat_effects(facts: Facts) -> "_Found":
    """7: only a person has done again what had an effect, or may have had one, and may not be repeated."""
    done = {
        (attempt["agent"], attempt["generation"])
        for attempt in facts.attempts.values()
        if not attempt["repeatable"] and not attempt["reused_from"] and attempt["state"] in {"completed", "lost"}
    }
    by_hand = {(a["agent"], a["generation"]) for a in facts.attempts.values() if a["decided_by"]}
    for event in facts.events:
        why = str(event["data"].get("reason", ""))
        by_itself = why.startswith("the gate of ") or why.endswith(" found it stale")
        if event["name"] != "step.reopened" or not by_itself:
            continue
        # An override begins a generation, and has nothing done again: what was done before it counts on.
        before = event["generation"] - 1
        while (event["agent"], before) in by_hand:
            before -= 1
        if (event["agent"], before) in done:
            yield event["agent"], f"In generation {event['generation']} an effect was repeated because {why}."


def _events_are_whole(facts: Facts) -> "_Found":
    """8: sequences are gapless from 1, and name attempts that exist; a step's attempts are numbered from 1."""
    seqs = [event["seq"] for event in facts.events]
    if seqs != list(range(1, facts.run["event_seq"] + 1)):
        yield None, f"The events are {seqs[:1]} to {seqs[-1:]}, and the run counted {facts.run['event_seq']}."
    for event in facts.events:
        if event["attempt_id"] and event["attempt_id"] not in facts.attempts:
            yield event["agent"], f"Event {event['seq']} names an attempt that is not recorded."
    for agent, step in facts.steps.items():
        numbers = sorted(a["number"] for a in facts.attempts.values() if a["agent"] == agent)
        if numbers != list(range(1, step["attempts"] + 1)):
            yield agent, f"The step counted {step['attempts']} attempts, and they are numbered {numbers}."


def _attempts_start_and_end(facts: Facts) -> "_Found":
    """8: an attempt has one start, with what it pinned, and an end exactly if it ended; an output has its own hash."""
    starts: Counter[str] = Counter()
    ended: set[str] = set()
    committed: set[str] = set()
    for event in facts.events:
        attempt_id, name = event["attempt_id"], event["name"]
        attempt = facts.attempts.get(attempt_id, {})
        starts[attempt_id] += name in STARTS
        if name in ENDS:
            ended.add(attempt_id)
        if name in COMMITS:
            committed.add(attempt_id)
        if name == "step.claimed" and event["data"]["reads"] != attempt.get("reads"):
            yield event["agent"], f"Event {event['seq']} and its attempt tell different inputs."
    for attempt_id, attempt in facts.attempts.items():
        number = f"Attempt {attempt['number']}"
        if starts[attempt_id] != 1:
            yield attempt["agent"], f"{number} has {starts[attempt_id]} starts in the events."
        if (attempt_id in ended) != (attempt["state"] != "executing"):
            yield (
                attempt["agent"],
                f"{number} is {attempt['state']}, and has {'an' if attempt_id in ended else 'no'} end.",
            )
        if (attempt_id in committed) != (attempt["state"] == "completed"):
            yield attempt["agent"], f"{number} is {attempt['state']}, and the events tell otherwise."
        if not attempt["is_hashed"]:
            yield attempt["agent"], f"The output of {number.lower()} is not the one that was hashed."


_TOLD_AS = {"completed": "completed", "executing": "executing", "discarded": "discarded"}


def _events_tell_the_tables(facts: Facts) -> "_Found":
    """8: read from its start to its end, the log arrives at the states and generations of the tables."""
    _, told, run_state = list(replay(facts))[-1]
    if run_state != facts.run["state"]:
        yield None, f"The run is {facts.run['state']}, and by its events {run_state}."
    for agent, step in facts.steps.items():
        # Waiting has several names, and being skipped has no event.
        by_events = told[agent].state if told[agent].state in _TOLD_AS else "waiting"
        if by_events != _TOLD_AS.get(step["state"], "waiting") or told[agent].generation != step["generation"]:
            yield (
                agent,
                (
                    f"It is {step['state']} in generation {step['generation']}, "
                    f"and by the events {told[agent].state} in {told[agent].generation}."
                ),
            )


def _reads_at_the_claim(facts: Facts) -> "_Found":
    """9: a claim reads what stands there; where it may read a snapshot, the last output, and says if that is stale."""
    for event, told, _ in replay(facts):
        if event["name"] != "step.claimed":
            continue
        agent, attempt = event["agent"], facts.attempts[event["attempt_id"]]
        strong = strong_ancestors(facts, agent)
        for other, read in event["data"]["reads"].items():
            commit = told[other].last_commit
            stands = told[other].state == "completed" and read["attempt"] == told[other].attempt
            mark = (attempt["stale_reads"] or {}).get(other, {})
            if not commit or read["attempt"] != commit["attempt_id"] or (other in strong and not stands):
                yield agent, f"Attempt {attempt['number']} read an output of {other} that did not stand there."
            elif mark.get("superseded", False) == stands:
                yield agent, f"Attempt {attempt['number']} read {other}, and its mark of a stale read is wrong."
            elif _too_old(event, commit, facts.agents[agent]["snapshots"].get(other)) and not mark.get("too_old"):
                yield agent, f"Attempt {attempt['number']} read an output of {other} that was too old, without a mark."


def _too_old(claim: "Json", commit: "Json", declared: "Json | None") -> bool:
    if declared is None:
        return False
    age = datetime.fromisoformat(claim["at"]) - datetime.fromisoformat(commit["at"])
    return bool(age > timedelta(milliseconds=declared["max_staleness_ms"] + 1))


def _stale_is_not_executed(facts: Facts) -> "_Found":
    """9: what is older than its agent accepts gives no output."""
    for attempt in facts.attempts.values():
        for other, mark in (attempt["stale_reads"] or {}).items():
            if mark["too_old"] and mark["on_stale"] != "accept" and attempt["state"] == "completed":
                yield attempt["agent"], f"Attempt {attempt['number']} used an output of {other} that is too old."


def _strong_reads_stand(facts: Facts) -> "_Found":
    """9: at each commit, and at the end, what was read strongly stands there, and so does all that it was made from."""
    strong = {agent: strong_ancestors(facts, agent) for agent in facts.agents}
    for event, told, _ in replay(facts):
        if event["name"] in {"step.completed", "step.reused", "step.settled"}:
            attempt = facts.attempts[event["attempt_id"]]
            yield from _moved(facts, attempt, strong, {name: (step.state, step.attempt) for name, step in told.items()})
    now = {name: (step["state"], step["attempt_id"]) for name, step in facts.steps.items()}
    for step in facts.steps.values():
        if step["state"] == "completed" and step["attempt_id"] in facts.attempts:
            yield from _moved(facts, facts.attempts[step["attempt_id"]], strong, now)


def _moved(
    facts: Facts, attempt: "Json", strong: "dict[str, set[str]]", stands: "dict[str, tuple[str, str | None]]"
) -> "_Found":
    """What an attempt, and what it was made from, read strongly and no longer stands there."""
    waiting, seen = [attempt], set()
    while waiting:
        entry = waiting.pop()
        for other, read in entry["reads"].items():
            if other in strong[entry["agent"]] and read["attempt"] not in seen:
                seen.add(read["attempt"])
                if stands[other] != ("completed", read["attempt"]):
                    yield attempt["agent"], f"Attempt {attempt['number']} counts, and what {other} put out changed."
                waiting.append(facts.attempts[read["attempt"]])


_RULES: "dict[int, tuple[Callable[[Facts], _Found], ...]]" = {
    1: (_one_output_a_generation, _commits_hold_the_claim),
    2: (_dependencies_ended,),
    3: (_approved_first, _pins_are_outputs),
    4: (_key_agrees, _generations_follow),
    5: (_step_and_attempt_agree, _run_goes_on, _nothing_forgotten, _key_can_be_settled),
    6: (_letters_agree,),
    7: (_unknown_is_not_repeated, _only_people_repeat_effects),
    8: (_events_are_whole, _attempts_start_and_end, _events_tell_the_tables),
    9: (_reads_at_the_claim, _stale_is_not_executed, _strong_reads_stand),
}
