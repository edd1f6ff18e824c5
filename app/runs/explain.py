"""What happened to a run, why, and the one command to type next: a paragraph made of what is recorded.

Pure, and the same for the same rows: it reads no clock. Whoever prints it redacts it, and escapes control characters.
"""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from app.runs.states import RunState, StepState

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from app.pipelines.model import Json

_SHORT_ID_CHARS = 8
_MESSAGE_MAX_CHARS = 1_000
_NAMED_MAX = 8
_STEPS_MAX = 5

# What each error code means for whoever reads it; the message before it says what was seen.
_MEANINGS = {
    "unavailable": "What it calls could not be reached, or was overloaded.",
    "rate_limited": "What it calls takes no more requests for now.",
    "timed_out": "It did not end within its timeout_ms.",
    "invalid_output": "What it put out is not what its schema asks for.",
    "max_tokens": "Its answer did not fit into its max_tokens, which a new version of the skill may raise.",
    "handler_failed": "Its handler raised an error, or left its process.",
    "worker_lost": "The processes that executed it died, more often than its max_worker_losses allows.",
    "account_problem": "The account's key, permission or budget must be mended first.",
    "run_deadline": "A resumed run goes on without a deadline.",
    "gate_refused": "It was not executed, and a retry would see the same values.",
    "probe_missing": "Its worker lacks the handlers.py of what it depends on: see STEPFAST_SKILLS.",
    "stale_input": "It was not executed: what it works on was made in a world that is no more.",
    "snapshot_too_old": "It was not executed: its on_stale says so.",
    "invalid_input": "Plain SQL started it, and the worker that was first to read its input refused it.",
    "model_refused": "The model declined, and a retry would ask the same.",
    "outcome_unknown": "It is not repeated by itself, because it may have had its effect.",
    "author_mistake": "The pipeline or a handler's code is at fault, and a retry would fail again.",
}
# What a plain resume cannot mend, and why: bulk resumes leave it alone.
NOT_BY_RESUME = {
    "gate_refused": "a gate refused: the same values would be refused again",
    "snapshot_too_old": "what it reads is too old: the agent that made it must be done again",
    "invalid_input": "the input does not fit: the same input would not fit again",
    "model_refused": "the model declined: the same question would be declined again",
    "outcome_unknown": "nobody knows whether an effect happened: a person must look",
    "author_mistake": "the pipeline's author must act",
}


class Explanation(NamedTuple):
    """`head` says how the run stands, `why` the rest; `command` is empty where there is nothing to type."""

    head: str
    why: str
    command: str

    @property
    def text(self) -> str:
        """The paragraph."""
        return f"{self.head} {self.why}".strip()


def explain(run: "Json", events: "Sequence[Json]") -> Explanation:
    """The paragraph of a run, as `Reads.run` gives it, and its events."""
    match run["state"]:
        case RunState.COMPLETED if not run["partial"]:
            parts, command = [_totals(run)], ""
        case RunState.COMPLETED | RunState.FAILED | RunState.CANCELLED:
            parts, command = _ended_badly(run, events)
        case _:
            parts, command = _unfinished(run, events)
    why = " ".join(sentence for sentence in [*parts, *_on_the_way(run, events)] if sentence)
    return Explanation(_head(run, events), why, command)


def _short(identity: str) -> str:
    """The beginning of an id, long enough to name it."""
    return identity[:_SHORT_ID_CHARS]


def _head(run: "Json", events: "Sequence[Json]") -> str:
    who = f"Run {_short(run['id'])} of {run['pipeline']} {run['version']}"
    at = _moment(run["ended_at"])
    match run["state"]:
        case RunState.COMPLETED:
            return f"{who} completed {'in part ' if run['partial'] else ''}at {at}."
        case RunState.FAILED:
            return f"{who} failed at {at}."
        case RunState.CANCELLED:
            by = _last(events, "run.cancelled")
            return f"{who} was cancelled{_by(by['data']) if by else ''} at {at}."
        case RunState.PENDING:
            begun = any(step["tries"] for step in run["steps"])
            return f"{who} was resumed, and waits for its turn." if begun else f"{who} has not begun."
        case RunState.SUSPENDED:
            return f"{who} is suspended: nothing of it can go on before a person decides."
    return f"{who} is running."


# What ended badly: failed, cancelled, or completed in part.


def _ended_badly(run: "Json", events: "Sequence[Json]") -> tuple[list[str], str]:
    resume = f"stepfast resume {_short(run['id'])}"
    reasons, advice = [], []
    for step in _in_state(run, StepState.DISCARDED)[:_STEPS_MAX]:
        code, message = _failure(step, events)
        reasons.append(_given_up(step, code, message))
        advice.append(_advice(run, step, code, events))
    if more := len(_in_state(run, StepState.DISCARDED)) - _STEPS_MAX:
        reasons += [f"{more} more were given up."] if more > 0 else []
    refused = [] if run["state"] == RunState.CANCELLED else _in_state(run, StepState.CANCELLED)
    reasons += [_rejected(step, events) for step in refused]
    gaps = _gaps(run)
    open_ended = run["state"] != RunState.CANCELLED and not reasons and not gaps
    reasons += _settled(events)
    reasons += [f"{agent} ran without what {other} put out later." for agent, other in gaps[:_STEPS_MAX]]
    if open_ended:
        late = _last(events, "run.failed")
        passed = late is not None and late["data"].get("code") == "run_deadline"
        reasons.append("Its deadline passed." if passed else "Nothing stands against going on.")
    # The first is what must be done first: a resume refuses where an outcome is unknown.
    advice.sort(key=lambda entry: entry[0])
    if advice:
        how, command = advice[0][1:]
    elif gaps:
        command = f"{resume} --from {gaps[0][0]}"
        how = f"To do that again, on the output: `{command}`."
    elif refused:
        how, command = f"`{resume}` asks again.", resume
    else:
        how, command = f"To go on from there: `{resume}`.", resume
    return [*reasons, *_remains(run), how], command


def _settled(events: "Sequence[Json]") -> "list[str]":
    """What was an unknown outcome until its worker reported after all, and has not been told by a resume since."""
    resumed = _last(events, "run.resumed")
    after = resumed["seq"] if resumed else 0
    return [
        f"The outcome of {entry['agent']} was unknown, until its worker reported after all at {_moment(entry['at'])}."
        for entry in events
        if entry["name"] == "step.settled" and entry["seq"] > after
    ]


def _gaps(run: "Json") -> "list[tuple[str, str]]":
    """Completed agents that had begun before one on which they depend was completed, with that one."""
    done = {step["agent"]: step for step in _in_state(run, StepState.COMPLETED)}
    return [
        (step["agent"], other)
        for step in done.values()
        for other in step["depends_on"]
        if other in done and not step["tries"][-1]["decided_by"]
        if step["tries"][-1]["started_at"] < done[other]["ended_at"]
        if not (other in step["snapshots"] and other in step["tries"][-1]["reads"])
    ]


def stale_reads(run: "Json") -> "dict[str, list[str]]":
    """By agent, whose outputs its current attempt read that were stale at its claim, or were superseded since."""
    current = {step["agent"]: step["attempt_id"] for step in run["steps"]}
    found = {}
    for step in run["steps"]:
        entry = next((one for one in step["tries"] if one["id"] == step["attempt_id"]), None)
        if entry and entry["state"] in {"executing", "completed"}:
            marked = set(entry["stale_reads"] or {})
            marked |= {name for name, read in entry["reads"].items() if read["attempt"] != current[name]}
            found[step["agent"]] = sorted(marked)
    return found


def _given_up(step: "Json", code: str, message: str) -> str:
    tries = [entry for entry in step["tries"] if entry["generation"] == step["generation"] and entry["error"]]
    after = f" after {_count(len(tries), 'attempt')}" if tries else ""
    if step["rounds"] and code == "gate_refused":
        after = f" after {_count(step['rounds'], 'round')} of its review loop"
    # What the agent advises; commands are chosen below.
    hint = str(tries[-1]["error"].get("next_step") or "") if tries else ""
    parts = [f"{step['agent']} was given up{after} ({code}): {_sentence(message)}", _MEANINGS.get(code, "")]
    return " ".join(part for part in [*parts, "" if "stepfast" in hint else hint] if part)


def _failure(step: "Json", events: "Sequence[Json]") -> tuple[str, str]:
    """The code and the message with which a step was given up."""
    said = _last(events, "step.discarded", step["agent"])
    data = said["data"] if said else (step["tries"] or [{"error": None}])[-1]["error"] or {}
    return str(data.get("code", "unknown")), str(data.get("message", "no message is recorded"))


def _advice(run: "Json", step: "Json", code: str, events: "Sequence[Json]") -> tuple[int, str, str]:
    """What is to be done about a step that was given up: its rank, the sentences, and the command."""
    name, agent = _short(run["id"]), step["agent"]
    resume, override = f"stepfast resume {name}", f"stepfast override {name} {agent} --output FILE"
    if code == "outcome_unknown":
        how = (
            f"Look in the outside world whether it happened. If it did, say what it gave: `{override}`, then "
            f"`{resume}`. If it did not: `{resume} --from {agent}`."
        )
        letter = _last(events, "step.discarded", agent)
        return 0, how, f"stepfast dead show {_short(letter['data']['dead_letter'])}" if letter else "stepfast dead list"
    if code in {"author_mistake", "model_refused"}:
        how = (
            "A run keeps the definition that it began with: mend the skill, publish it as a new version and start a "
            f"new run, or give the output by hand: `{override}`, then `{resume}`. A handler's code is the worker's: if "
            f"the fault was there, restart the workers on the mended code, then `{resume}`."
        )
        return 1, how, override
    if code == "invalid_input":
        again = f"stepfast run {run['pipeline']}"
        return 1, f"This input stays what it is: `{again}`, with one that fits.", again
    if code == "gate_refused":
        sent_back = _last(events, "step.rerun", agent)
        read = _last_read(run, step)
        begun_at = sent_back["data"]["rerun"] if sent_back else read
        if begun_at is None:
            return 2, f"To go on without it, give its output by hand: `{override}`, then `{resume}`.", override
        again = f"{resume} --from {begun_at}"
        # What is put in the place of a loop's first agent is worked on once more, and may be refused once more.
        how = (
            f"To let {begun_at} try again: `{again}`. To decide what the gate reads: "
            f"`stepfast override {name} {read or begun_at} --output FILE`, then `{resume}`."
        )
        return 2, how, again
    if code == "snapshot_too_old" and (old := _last_read(run, step)):
        again = f"{resume} --from {old}"
        return 2, f"To have {old} done again, and all that is made from it: `{again}`.", again
    return 3, f"When the cause is gone, `{resume}` gives it a new budget of attempts.", resume


def _last_read(run: "Json", step: "Json") -> str | None:
    """Of the agents whose outputs its error tells of, or on which it depends, the last in the pipeline's order."""
    errors = [entry["error"] for entry in step["tries"] if entry["error"]]
    details = errors[-1]["details"] if errors else {}
    values = details.get("values", details.get("reads")) if isinstance(details, Mapping) else None
    read = {str(name).partition(".")[0] for name in values} if isinstance(values, Mapping) else set(step["depends_on"])
    found = [other["agent"] for other in run["steps"] if other["agent"] in read]
    return found[-1] if found else None


def _rejected(step: "Json", events: "Sequence[Json]") -> str:
    decisions = [entry for entry in events if entry["agent"] == step["agent"] and entry["name"] in _REFUSALS]
    if not decisions:
        return f"{step['agent']} was cancelled."
    last = decisions[-1]
    if last["name"] == "step.expired":
        return f"Nobody approved {step['agent']} before its request expired at {_moment(last['at'])}."
    return f"{step['agent']} was rejected{_by(last['data'])} at {_moment(last['at'])}."


_REFUSALS = {"step.rejected", "step.expired"}


def _remains(run: "Json") -> "list[str]":
    done, waiting = _in_state(run, StepState.COMPLETED), _in_state(run, StepState.PENDING)
    skipped = _in_state(run, StepState.SKIPPED)
    costs = [entry["cost_usd"] for step in done for entry in step["tries"] if entry["cost_usd"] is not None]
    paid = f" (${sum(costs):.4f})" if costs else ""
    return [
        f"Completed, kept and not paid for again: {_names(done)}{paid}." if done else "",
        f"Skipped: {_names(skipped)}." if skipped else "",
        f"Not begun: {_names(waiting)}." if waiting else "",
    ]


# What is not ended: what it waits for.


def _unfinished(run: "Json", events: "Sequence[Json]") -> tuple[list[str], str]:
    if run["blocked_by"]:
        other = _short(run["blocked_by"])
        return [f"It waits for run {other}, which has the same concurrency key."], f"stepfast show {other} --follow"
    name = _short(run["id"])
    executing, suspended = _in_state(run, StepState.EXECUTING), _in_state(run, StepState.SUSPENDED)
    retryable, available = _in_state(run, StepState.RETRYABLE), _in_state(run, StepState.AVAILABLE)
    parts = [_given_up(step, *_failure(step, events)) for step in _in_state(run, StepState.DISCARDED)[:_STEPS_MAX]]
    parts += [_executes(step) for step in executing[:_STEPS_MAX]]
    waits = [_waits(step, events) for step in retryable[:_STEPS_MAX]]
    parts += [sentence for sentence, _ in waits]
    parts += [_held(run, step) for step in suspended[:_STEPS_MAX]]
    if available:
        queues = ", ".join(sorted({step["queue"] for step in available}))
        asked = "is one running that serves it, on the same database and broker?"
        parts.append(f"No worker has taken {_names(available)} yet, from the queue {queues}: {asked}")
    commands = [command for _, command in waits if command]
    if suspended:
        commands.append(f"stepfast approve {name} {suspended[0]['agent']}")
    elif available and not executing:
        commands.append("stepfast doctor")
    return parts, (commands or [f"stepfast show {name} --follow"])[0]


def _executes(step: "Json") -> str:
    entry = step["tries"][-1]
    where = f", on worker {entry['worker_id']}" if entry["worker_id"] else ""
    return f"{step['agent']} is executing since {_moment(entry['started_at'])} (attempt {entry['number']}{where})."


def _waits(step: "Json", events: "Sequence[Json]") -> tuple[str, str]:
    """Why a step waits for a time, and the command that can help, if one can."""
    agent, until = step["agent"], f"{str(step['scheduled_at'])[11:19]} UTC"
    past = [entry for entry in events if entry["agent"] == agent and entry["name"] in _WAITS]
    data = past[-1]["data"] if past else {}
    if "code" in data:
        return f"{agent} failed ({data['code']}) and waits until {until}: {_sentence(str(data['message']))}", ""
    reason, holder = str(data.get("reason", "")), _short(str(data.get("held_by") or ""))
    match reason:
        case "key_reserved":
            return f"{agent} waits for run {holder}, which holds its key; it looks at {until}.", ""
        case "key_unknown":
            why = f"run {holder} holds its key, whose outcome is unknown"
            return f"{agent} waits until {until}: {why}.", f"stepfast explain {holder}"
        case _ if "has no handler" in reason:
            needed = "A worker is needed whose STEPFAST_SKILLS names its folder."
            return f"{agent} waits until {until}: {reason}. {needed}", "stepfast doctor"
    return f"{agent} waits until {until}{': ' + _sentence(reason) if reason else '.'}", ""


_WAITS = {"step.retry_scheduled", "step.deferred"}


def _held(run: "Json", step: "Json") -> str:
    agent = step["agent"]
    asked = [entry for entry in run["approvals"] if entry["agent"] == agent and entry["state"] == "requested"]
    since = f" since {_moment(asked[-1]['requested_at'])}" if asked else ""
    expires = asked[-1]["expires_at"] if asked else None
    until = f" The request expires at {_moment(expires)}." if expires else ""
    return f"{agent} waits for a person{since}: it begins once it is approved.{until}{given_before(run, agent)}"


def given_before(run: "Json", agent: str) -> str:
    """A sentence, after a space, of the last approval that was given for an agent and holds no more; or nothing."""
    void = [
        entry
        for entry in run["approvals"]
        if entry["agent"] == agent and entry["state"] == "void" and entry["decided_by"]
    ]
    if not void:
        return ""
    last = void[-1]
    who = _by({"by": last["decided_by"], "reason": last["reason"]})
    return f" An approval{who} at {_moment(last['decided_at'])} holds no more: {_sentence(last['void_reason'])}"


# What else is worth knowing of any run.


def _on_the_way(run: "Json", events: "Sequence[Json]") -> "list[str]":
    """What did not end it, and still happened: retries, lost workers, review rounds, overrides, resumes."""
    told = []
    for step in run["steps"]:
        if step["state"] in {StepState.DISCARDED, StepState.RETRYABLE}:
            continue  # told already
        failed = [entry for entry in step["tries"] if entry["state"] == "failed"]
        lost = [entry for entry in step["tries"] if entry["state"] == "lost"]
        if failed:
            codes = ", ".join(sorted({entry["error"]["code"] for entry in failed}))
            told.append(f"{step['agent']} failed {_times(len(failed))} ({codes})")
        if lost:
            told.append(f"{step['agent']} was taken from a worker {_times(len(lost))}")
    told += _done_again(events)
    dismissed = [entry for entry in events if entry["name"] == "step.dismissed"]
    told += [f"the dead letter of {entry['agent']} was discarded{_by(entry['data'])}" for entry in dismissed]
    overridden = [entry for entry in events if entry["name"] == "step.overridden"]
    told += [f"the output of {entry['agent']} was given by hand{_by(entry['data'])}" for entry in overridden]
    # An override sets a run that was completed going by itself.
    resumed = [entry for entry in events if entry["name"] == "run.resumed" and "overridden" not in entry["data"]]
    if resumed:
        told.append(f"it was resumed {_times(len(resumed))}, last{_by(resumed[-1]['data'])}")
    more = [f"{len(told) - _NAMED_MAX} more"] if len(told) > _NAMED_MAX else []
    return [f"On the way: {'; '.join([*told[:_NAMED_MAX], *more])}."] if told else []


def _done_again(events: "Sequence[Json]") -> "Iterator[str]":
    reruns = [entry for entry in events if entry["name"] == "step.rerun"]
    gates = Counter((e["agent"], e["data"]["rerun"]) for e in reruns if e["data"]["code"] != "stale_input")
    yield from (f"the gate of {agent} sent {back} back {_times(number)}" for (agent, back), number in gates.items())
    found = [(e["agent"], e["data"]["rerun"]) for e in reruns if e["data"]["code"] == "stale_input"]
    found += [(e["agent"], back) for e in events if e["name"] == "step.stale_input" for back in e["data"]["rerun"]]
    for (agent, back), number in Counter(found).items():
        yield f"{agent} found the output of {back} stale, and had it done again {_times(number)}"
    accepted = sorted({entry["agent"] for entry in events if entry["name"] == "step.stale_read"})
    if accepted:
        yield f"stale reads were accepted: {', '.join(accepted[:_NAMED_MAX])}"


def _totals(run: "Json") -> str:
    totals = run["totals"]
    calls = _count(totals["calls"], "paid call")
    known = "at an unknown price" if totals["cost_usd"] is None else f"${totals['cost_usd']:.4f}"
    return f"Done: {_names(run['steps'])}, with {f'{calls}, {known}' if totals['calls'] else 'no paid call'}."


def _in_state(run: "Json", state: StepState) -> "list[Json]":
    return [step for step in run["steps"] if step["state"] == state]


def _last(events: "Sequence[Json]", name: str, agent: str | None = None) -> "Json | None":
    found = [entry for entry in events if entry["name"] == name and agent in {None, entry["agent"]}]
    return found[-1] if found else None


def _names(steps: "Iterable[Json]") -> str:
    names = [step["agent"] for step in steps]
    more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
    return ", ".join(names[:_NAMED_MAX]) + more


def _by(data: "Json") -> str:
    """Who did it, and why they said they did."""
    by = f" by {data['by']}" if data.get("by") else ""
    return f"{by} ({_cut(str(data['reason']))})" if data.get("reason") else by


def _moment(text: str | None) -> str:
    return f"{text[:10]} {text[11:19]} UTC" if text else "a time that is not recorded"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def _count(number: int, noun: str) -> str:
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"


def _sentence(message: str) -> str:
    ended = _cut(" ".join(message.split()))
    return ended if ended.endswith((".", "!", "?")) else f"{ended}."


def _cut(text: str) -> str:
    return text if len(text) <= _MESSAGE_MAX_CHARS else f"{text[: _MESSAGE_MAX_CHARS - 3]}..."
