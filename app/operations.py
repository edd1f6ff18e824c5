"""What every entry point calls: publish, start, resume, decide, and how a run is shown. Each is safe to call again."""

from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from app import events
from app.agents.outputs import check_output
from app.crashpoints import CrashPoint, reach
from app.errors import AgentError, AuthorMistake, NotPossible, UnknownName
from app.events import Event
from app.execution import canvas
from app.pipelines.feedback import redacted_feedback
from app.pipelines.report import nearest
from app.pipelines.run_input import check_input
from app.redaction import REDACTED, redact
from app.runs import given
from app.runs.orders import Orders
from app.runs.reads import Reads
from app.runs.resume_plan import resume_plan
from app.runs.states import StepState
from app.words import moment, short

if TYPE_CHECKING:
    from app.execution.worker import Worker
    from app.pipelines.model import Agent, Json, Pipeline
    from app.settings import Settings

_STEPS_AT_ONCE_MAX = 1_000


@dataclass(frozen=True, slots=True)
class Started:
    """`created` is False where the key had started this run before."""

    run_id: UUID
    created: bool


def publish(worker: "Worker", pipeline: "Pipeline") -> bool:
    """Stores a definition and moves its name to it. Returns whether it was new.

    Raises Misuse where the version exists with other content.
    """
    new = worker.store.publish(pipeline)
    if new:
        events.emit(Event.PIPELINE_PUBLISHED, pipeline=pipeline.name, version=pipeline.version, hash=pipeline.hash)
    return new


def start(
    worker: "Worker",
    pipeline: str,
    run_input: "Json",
    *,
    key: str | None = None,
    tenant: str = "default",
    labels: "Json | None" = None,
    priority: int = 0,
) -> Started:
    """Starts a run of a published pipeline and sends its first steps.

    Raises UnknownName (pipeline), Misuse (the input is too large, no JSON, or not in the pipeline's input_schema) and
    KeyConflict. The run is committed before anything is sent: a broker that is away delays it and loses nothing.
    """
    current = Reads(worker.store.engine).current_hash(pipeline)
    if current is None:
        hint = nearest(pipeline, Reads(worker.store.engine).pipeline_names())
        raise UnknownName(f"No pipeline is published as {pipeline}.{hint}", next_step="Run: stepfast publish SKILL")
    check_input(run_input, worker.settings.input_max_bytes, worker.definition(current).input_schema)
    reach(CrashPoint.ENQUEUE_BEFORE)
    run_id, created, unsent = worker.store.start(
        pipeline, run_input, key=key, tenant=tenant, labels=labels, priority=priority, send_max=_STEPS_AT_ONCE_MAX
    )
    if created:
        events.emit(Event.RUN_ENQUEUED, run_id=str(run_id), pipeline=pipeline)
    reach(CrashPoint.ENQUEUE_AFTER)
    canvas.send_unsent(unsent, worker.definition)
    return Started(run_id, created)


def resume(worker: "Worker", run_id: UUID, by: str, *, from_agent: str | None = None) -> tuple[str, ...]:
    """Continues a failed, cancelled or partial run from its last checkpoint; or, from an agent, in a new generation.

    Returns the agents that run again. Raises NotPossible, UnknownName.
    """
    orders = Orders(worker.store.engine)
    if from_agent is None:
        agents = orders.resume(run_id, by)
    else:
        _known_agent(worker, run_id, from_agent)
        agents = orders.resume_from(run_id, from_agent, by)
    events.emit(Event.RUN_RESUMED, run_id=str(run_id), agents=agents, by=by, from_agent=from_agent)
    dispatch(worker, run_id)
    return agents


def plan_resume(worker: "Worker", run_id: UUID, by: str, *, from_agent: str | None = None) -> "Json":
    """What `resume` would do, and what it would cost: see `resume_plan`. Raises what `resume` would."""
    reads = Reads(worker.store.engine)
    found = reads.run(run_id)
    pinned = worker.definition(found["pipeline_hash"])
    if from_agent is not None:
        known_agent(pinned, from_agent)
    current = reads.current_hash(found["pipeline"])
    return resume_plan(
        found,
        Orders(worker.store.engine).rehearse(run_id, by, from_agent),
        pinned,
        worker.definition(current) if current else None,
        now=reads.now(),
        code_here=_code_here(pinned, worker.settings),
        effects=reads.effect_list(run_id),
    )


def _code_here(pipeline: "Pipeline", settings: "Settings") -> dict[str, str | None]:
    """The hash of each handler's code as this environment has it; None where it has none, or a broken one."""
    from app.agents import handlers

    found: dict[str, str | None] = {}
    for agent in pipeline.agents:
        if agent.handler:
            try:
                handler = handlers.find(pipeline.name, agent, settings)
            except AgentError:
                handler = None
            found[agent.id] = handler.code_hash if handler else None
    return found


def override(
    worker: "Worker", run_id: UUID, agent_id: str, output: "Json", *, by: str, reason: str | None = None
) -> tuple[str, ...]:
    """Gives an agent an output by a person's hand. Returns the agents that are done again on it.

    Raises InvalidOutput where it does not fit the agent's schema; NotPossible, UnknownName.
    """
    agent = _known_agent(worker, run_id, agent_id)
    checked = check_output(output, agent, worker.settings.output_max_bytes)
    agents = Orders(worker.store.engine).override(run_id, agent_id, checked, by, reason)
    events.emit(Event.STEP_OVERRIDDEN, run_id=str(run_id), agent=agent_id, by=by, reason=reason)
    dispatch(worker, run_id)
    return agents


def cancel(worker: "Worker", run_id: UUID, *, by: str, reason: str | None = None) -> None:
    """Ends a run that has not ended; what executes is fenced. Raises NotPossible."""
    Orders(worker.store.engine).cancel(run_id, by, reason)
    events.emit(Event.RUN_CANCELLED, run_id=str(run_id), by=by, reason=reason)


def decide(
    worker: "Worker",
    run_id: UUID,
    agent_id: str,
    *,
    approved: bool,
    by: str,
    reason: str | None = None,
    digest: str | None = None,
) -> str:
    """Approves or rejects what an agent waits for. Returns approved, rejected, or expired (it came too late).

    `digest` binds the decision to what the person saw. Raises NotPossible, UnknownName.
    """
    _known_agent(worker, run_id, agent_id)
    orders = Orders(worker.store.engine)
    reach(CrashPoint.APPROVE_BEFORE, agent_id)
    decision = orders.decide(run_id, agent_id, approved=approved, digest=digest, by=by, reason=reason)
    reach(CrashPoint.APPROVE_AFTER, agent_id)
    events.emit(Event(f"step.{decision}"), run_id=str(run_id), agent=agent_id, by=by, reason=reason)
    dispatch(worker, run_id)
    return decision


def discard_letter(worker: "Worker", letter_id: UUID, *, by: str) -> None:
    """Closes a dead letter without doing its step again. Raises UnknownName; NotPossible where it is closed already."""
    entry = Reads(worker.store.engine).dead_letter(letter_id)
    if not Orders(worker.store.engine).discard_letter(letter_id, by):
        raise NotPossible(
            f"It was resolved at {moment(entry['resolved_at'])} UTC ({entry['resolution']}).",
            next_step="List what is open: stepfast dead list",
        )


def document(worker: "Worker", run_id: UUID) -> "Json":
    """A run with its steps, attempts and outputs, as `Reads.run`; what its schemas call sensitive is hidden."""
    run = Reads(worker.store.engine).run(run_id)
    pipeline = worker.definition(run["pipeline_hash"])
    run["input"] = redact(run["input"], pipeline.input_schema)
    if pipeline.hides(pipeline.concurrency_parts):
        run["concurrency_key"] = run["concurrency_key"] and REDACTED
    for step in run["steps"]:
        agent = pipeline.by_id[step["agent"]]
        step["feedback"] = redacted_feedback(step["feedback"], pipeline)
        for entry in step["tries"]:
            entry["output"] = redact(entry["output"], agent.schema)
            if pipeline.hides(agent.key_parts):
                entry["key"] = entry["key"] and REDACTED
    return run


def saw(worker: "Worker", run_id: UUID, agent_id: str, number: int | None = None) -> "Json":
    """What an attempt at an agent was given and what it gave, redacted; without a number that of the one that counts.

    Keys: run_id, pipeline, version, agent, state, attempts (how many there are), attempt (its row, with output and
    error), input, outputs (by agent), feedback, gate (see `gate_seen`), asked ({system, user}: what a model was sent;
    null for a handler) and approvals (of the agent, oldest first). Raises UnknownName; NotPossible without an attempt.
    """
    run = document(worker, run_id)
    pipeline = worker.definition(run["pipeline_hash"])
    agent = known_agent(pipeline, agent_id)
    step = next(step for step in run["steps"] if step["agent"] == agent_id)
    tries = given.tries_by_id(run)
    if not step["tries"]:
        raise NotPossible(
            f"{agent_id} was given nothing yet: it is {step['state']}.",
            next_step=f"See: stepfast show {short(run['id'])}",
        )
    entry = tries.get(step["attempt_id"], step["tries"][-1])
    if number is not None:
        found = [other for other in step["tries"] if other["number"] == number]
        if not found:
            raise UnknownName(f"{agent_id} has no attempt {number}.", next_step=f"It has 1 to {len(step['tries'])}.")
        entry = found[0]
    feedback = given.feedback_given(entry, pipeline, Reads(worker.store.engine).event_list(run_id), tries)
    outputs = given.outputs_read(entry, tries)
    return {
        **{name: run[name] for name in ("pipeline", "version", "input")},
        "run_id": run["id"],
        "agent": agent_id,
        "state": step["state"],
        "attempts": len(step["tries"]),
        "attempt": entry,
        "outputs": outputs,
        "feedback": feedback,
        "gate": given.gate_seen(entry, agent, run, tries),
        "asked": _asked(run, agent, entry, outputs, feedback),
        "approvals": [approval for approval in run["approvals"] if approval["agent"] == agent_id],
    }


def _asked(run: "Json", agent: "Agent", entry: "Json", outputs: "Json", feedback: "Json | None") -> "Json | None":
    """The message that a model was sent, made again of redacted values; None where none could be made."""
    from app.agents import requests
    from app.agents.work import Work
    from app.clock import Deadline

    if agent.prompt is None or entry["decided_by"] or entry["reused_from"]:
        return None
    work = Work(
        run_id=UUID(run["id"]),
        attempt_id=UUID(entry["id"]),
        pipeline=run["pipeline"],
        agent=agent,
        generation=entry["generation"],
        number=entry["number"],
        input=run["input"],
        outputs=outputs,
        deadline=Deadline.after_ms(agent.timeout_ms),
        feedback=feedback,
    )
    try:
        return {"system": requests.system_text(agent.prompt), "user": requests.user_text(work)}
    except AuthorMistake:
        return None


def waiting(worker: "Worker", run_id: UUID, agent: str) -> "tuple[Json, Pipeline, Json]":
    """A run, its definition, and the open request of an agent. Raises UnknownName; NotPossible where none is open."""
    found = Reads(worker.store.engine).run(run_id)
    pipeline = worker.definition(found["pipeline_hash"])
    known_agent(pipeline, agent)
    of_agent = [entry for entry in found["approvals"] if entry["agent"] == agent]
    step = next(step for step in found["steps"] if step["agent"] == agent)
    if step["state"] == StepState.SUSPENDED and of_agent and of_agent[-1]["state"] == "requested":
        return found, pipeline, of_agent[-1]
    decided = [entry for entry in of_agent if entry["decided_by"]]
    others = [other["agent"] for other in found["steps"] if other["state"] == StepState.SUSPENDED]
    name = short(found["id"])
    raise NotPossible(
        f"{agent} waits for no decision: it is {step['state']}.{_decided(decided[-1]) if decided else ''}",
        next_step=f"{others[0]} waits: stepfast approve {name} {others[0]}" if others else f"See: stepfast show {name}",
    )


def _decided(approval: "Json") -> str:
    return f" It was {approval['state']} by {approval['decided_by']} at {moment(approval['decided_at'])} UTC."


def known_agent(pipeline: "Pipeline", agent_id: str) -> "Agent":
    """The agent of a pipeline. Raises UnknownName, with the nearest name."""
    if agent_id not in pipeline.by_id:
        raise UnknownName(
            f"{pipeline.name} has no agent {agent_id}.{nearest(agent_id, pipeline.by_id)}",
            next_step=f"It has {', '.join(pipeline.by_id)}.",
        )
    return pipeline.by_id[agent_id]


def _known_agent(worker: "Worker", run_id: UUID, agent_id: str) -> "Agent":
    return known_agent(worker.definition(Reads(worker.store.engine).pipeline_hash(run_id)), agent_id)


def dispatch(worker: "Worker", run_id: UUID) -> int:
    """Sends what comes next in the queues that a run's steps wait for: these steps, if nothing is before them.

    Returns how many steps were sent.
    """
    return canvas.send_unsent(worker.store.take_unsent(run_id, _STEPS_AT_ONCE_MAX), worker.definition)
