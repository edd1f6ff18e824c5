"""One attempt at one step, as a story: find what to run, claim, gate, call, commit.

No transaction and no pooled connection is held while the agent works. What is returned says what became of the step and
what the caller must send next.
"""

import json
import random
import traceback
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from sqlalchemy.exc import DataError

from app import events
from app.agents.work import Answer, Work
from app.clock import Deadline
from app.crashpoints import CrashPoint, reach
from app.errors import (
    AgentError,
    AuthorMistake,
    GateRefused,
    HandlerFailed,
    InvalidInput,
    InvalidOutput,
    Misuse,
    ProbeMissing,
    SnapshotTooOld,
    StaleClaim,
    StaleInput,
)
from app.events import Event
from app.execution import cached, canvas, tracing
from app.execution.effects import RecordedEffects
from app.execution.outcome import decide
from app.execution.persistence import OUTAGE_MAX_S, through_outage
from app.execution.trace_record import shows_errors
from app.observe import traces
from app.observe.vendors import Kind
from app.pipelines import expressions
from app.pipelines.feedback import redacted_feedback
from app.pipelines.model import canonical_json, hash_json
from app.pipelines.run_input import check_input
from app.pipelines.templates import lookup_shown
from app.redaction import capped, redact
from app.runs.store import Bid, Claim, Ended, Ending, Paid, StepKey

if TYPE_CHECKING:
    from app.agents.handlers import Handler
    from app.execution.worker import Worker
    from app.pipelines.model import Agent, Json, Pipeline

# How long a step waits whose key another run holds, and, at most, one whose handler this worker lacks: less at random,
# since a worker asks Redis anew each second, and one that does so in step with it would be first in line for ever.
KEY_WAIT_MS, DEFER_MS = 1_000, 5_000
# Others may take a step away this long after its own deadline: time to commit what was answered at the last moment.
COMMIT_MARGIN_MS = 15_000
# What a person is shown before a decision.
SHOWN_MAX_BYTES = 64_000


@dataclass(frozen=True, slots=True)
class Result:
    """`state` is the step's new state, or "stale" or "deferred". `ready` are the agents whose messages must be sent.

    `error` is the code of what the attempt failed with.
    """

    state: str
    ready: tuple[str, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Attempt:
    """What every stage after the claim needs. `shown_by`: who shows inputs and outputs (see `tracing.destination`)."""

    id: UUID
    worker: "Worker"
    step: StepKey
    pipeline: "Pipeline"
    agent: "Agent"
    handler: "Handler | None"
    claim: Claim
    deadline: Deadline
    shown_by: str = ""


def execute(worker: "Worker", step: StepKey, pipeline_hash: str) -> Result:
    """Makes one attempt at a step. Never raises for what the agent or the pipeline did wrong."""
    pipeline = worker.definition(pipeline_hash)
    agent = pipeline.by_id[step.agent]
    with events.bound(run_id=str(step.run_id), pipeline=pipeline.name, agent=agent.id):
        handler = broken = None
        try:
            handler = _find_handler(worker, pipeline, agent)
        except AgentError as error:
            broken = error
        if agent.handler and not handler and not broken:
            delay_ms = random.randint(DEFER_MS // 2, DEFER_MS)  # noqa: S311  # spreads them, as retries
            return defer(worker, step, delay_ms, f"this worker has no handler {agent.handler}")
        bid = Bid(
            step=step,
            agent=agent,
            pipeline_hash=pipeline_hash,
            attempt_id=uuid4(),
            worker_id=worker.worker_id,
            timeout_ms=agent.timeout_ms + COMMIT_MARGIN_MS,
            wait_ms=KEY_WAIT_MS,
            repeatable=agent.repeatable or bool(handler and handler.repeatable),
            code_hash=handler.code_hash if handler else None,
            alone=worker.alone,
            lean=cached.caches(worker, pipeline),
        )
        reach(CrashPoint.CLAIM_BEFORE, agent.id, str(step.run_id))
        claim = through_outage(lambda: worker.store.claim(bid), max_s=OUTAGE_MAX_S)
        _send_next(worker, claim)
        deadline = Deadline.after_ms(agent.timeout_ms)
        if claim.outcome == "alone":
            from app.execution import alone

            return alone.execute(worker, step, pipeline_hash)
        shown_by = tracing.destination(pipeline, step.run_id, worker.settings)
        attempt = Attempt(bid.attempt_id, worker, step, pipeline, agent, handler, claim, deadline, shown_by)
        with (
            events.bound(attempt_id=str(attempt.id), generation=claim.generation),
            tracing.following(shown_by, pipeline, step.run_id, agent.id, attempt.id, worker.settings),
        ):
            return _attempt(attempt, broken)


def _send_next(worker: "Worker", claim: Claim) -> None:
    """Sends what takes the claimed step's place at the broker. What is not sent is found as overdue."""
    try:
        canvas.send_unsent(claim.next, worker.definition)
    except Exception as error:  # noqa: BLE001  # it is not this attempt's failure
        events.emit(Event.SEND_FAILED, error=str(error))


def _attempt(attempt: Attempt, broken: AgentError | None) -> Result:
    claim = attempt.claim
    match claim.outcome:
        case "stale":
            return _stale(attempt)
        case "deferred":
            deferred = Event.STEP_STALE_INPUT if claim.reason == "stale_input" else Event.STEP_DEFERRED
            events.emit(deferred, reason=claim.reason, held_by=claim.held_by)
            return Result("deferred")
        case "reuse":
            assert claim.output is not None
            assert claim.reused_from is not None
            return _complete(attempt, Answer(claim.output), reused_from=UUID(claim.reused_from))
    events.emit(Event.STEP_CLAIMED, number=claim.number, worker=attempt.worker.worker_id)
    if claim.stale:
        events.emit(Event.STEP_STALE_READ, reads=claim.stale)
    reach(CrashPoint.CLAIM_AFTER, attempt.agent.id)
    try:
        if broken:
            raise broken
        attempt = _with_outputs(attempt)
        _check_claim(attempt)
        _check_run_input(attempt)
        _check_world(attempt)
        _check_gate(attempt)
        if attempt.agent.requires_human_approval and (digest := _digest(attempt)) != claim.approved:
            return _suspend(attempt, digest)
        answer = _call(attempt)
    except StaleClaim:
        events.emit(Event.STEP_STALE_CLAIM, state="fenced")
        return Result("stale")
    except AgentError as error:
        return _fail(attempt, error)
    except Exception as error:  # noqa: BLE001  # our own bug must end as a dead letter, not as a hung step
        return _fail(attempt, _internal(error))
    return _complete(attempt, answer)


def _with_outputs(attempt: Attempt) -> Attempt:
    """The attempt with what a lean claim left out. The agent's time begins once it is there."""
    claim = attempt.claim
    if not claim.reads:
        return attempt
    outputs = cached.outputs(attempt.worker, attempt.step.run_id, attempt.pipeline, claim)
    deadline = Deadline.after_ms(attempt.agent.timeout_ms)
    return replace(attempt, claim=replace(claim, outputs=outputs), deadline=deadline)


def _stale(attempt: Attempt) -> Result:
    claim = attempt.claim
    events.emit(Event.STEP_STALE_CLAIM, state=claim.state, run_state=claim.run_state)
    if claim.state == "worker_ended":
        attempt.worker.beat_soon()
    return Result("stale")


def _check_claim(attempt: Attempt) -> None:
    """Raises what the claim found wrong."""
    claim = attempt.claim
    said = f"{claim.problem[:1].upper()}{claim.problem[1:]}."
    if claim.outcome == "bad_key":
        raise AuthorMistake(said)
    if claim.outcome == "too_old":
        stale = claim.stale or {}
        old = next((name for name, read in stale.items() if read["too_old"]), attempt.agent.id)
        raise SnapshotTooOld(
            said,
            next_step=f"To make a new one: stepfast resume {attempt.step.run_id} --from {old}",
            details={"reads": stale},
        )


def _find_handler(worker: "Worker", pipeline: "Pipeline", agent: "Agent") -> "Handler | None":
    if agent.handler is None:
        return None
    from app.agents import handlers

    return handlers.find(pipeline.name, agent, worker.settings)


def defer(worker: "Worker", step: StepKey, delay_ms: int, reason: str) -> Result:
    """Puts an available step off, which counts against nothing."""
    deferred = through_outage(lambda: worker.store.defer(step, delay_ms, reason), max_s=OUTAGE_MAX_S)
    if not deferred:
        return Result("stale")
    events.emit(Event.STEP_DEFERRED, reason=reason, retry_ms=delay_ms)
    return Result("deferred")


def _check_run_input(attempt: Attempt) -> None:
    """Plain SQL checks no input: whoever is first to work with it does."""
    if attempt.agent.depends_on:
        return
    try:
        check_input(attempt.claim.input, attempt.worker.settings.input_max_bytes, attempt.pipeline.input_schema)
    except Misuse as error:
        invalid = InvalidInput(error.message, next_step="Start another run, with an input that fits.")
        invalid.unquoted = "The run's input is not one that the pipeline takes."
        raise invalid from error


def _check_world(attempt: Attempt) -> None:
    """Looks again at what those on which this agent depends strongly saw of the world."""
    for seen in attempt.claim.observed:
        from app.agents import handlers

        observer, name, probe = seen["agent"], seen["name"], seen["probe"]
        settings, agent = attempt.worker.settings, attempt.pipeline.by_id[observer]
        found = handlers.find_probe(attempt.pipeline.name, agent, probe, settings)
        if found is None:
            raise ProbeMissing(f"This worker has no probe {probe} for what {observer} observed.")
        now = handlers.look(found, _work(attempt))
        if canonical_json(now) != canonical_json(seen["value"]):
            stale = StaleInput(
                f"{name}, which {observer} observed as {seen['value']!r}, is {now!r} now.",
                next_step=f"Once it stays as it is: stepfast resume {attempt.step.run_id}",
                details={"values": {f"{observer}.{name}": {"old": seen["value"], "new": now}}},
            )
            stale.agent, stale.unquoted = observer, f"{name}, which {observer} observed, has changed."
            raise stale


def _check_gate(attempt: Attempt) -> None:
    """Rule 3: no step is executed whose gate is not true of the recorded outputs that it pinned."""
    if attempt.agent.gate is None:
        return
    gate = expressions.parse(attempt.agent.gate)
    values = _values_to_show(gate, attempt)
    with traces.part(Kind.GATE, "gate") as told:
        told.attributes["stepfast.gate"] = attempt.agent.gate
        if attempt.pipeline.tracing.log_inputs:
            told.shown_in = capped(values, attempt.worker.settings.trace_value_max_bytes)
        try:
            verdict = gate.evaluate({**attempt.claim.outputs, "input": attempt.claim.input})
        except AuthorMistake as error:
            error.details = {**error.details, "values": values}
            raise
        told.attributes["stepfast.gate.held"] = verdict.held
    shown = {"values": values} if _logs_values(attempt) and attempt.pipeline.tracing.log_inputs else {}
    events.emit(Event.STEP_GATE, gate=attempt.agent.gate, held=verdict.held, **shown)
    if not verdict.held:
        saw = ", ".join(f"{name} = {value!r}" for name, value in values.items())
        refused = GateRefused(
            f"The gate {attempt.agent.gate} does not hold: {saw}.",
            next_step=f"See: stepfast show {attempt.step.run_id}",
            details={"gate": attempt.agent.gate, "values": values},
        )
        refused.read = _read_by(gate, attempt.claim)
        refused.unquoted = f"The gate {attempt.agent.gate} does not hold."
        raise refused
    reach(CrashPoint.GATE_AFTER, attempt.agent.id)


def _values_to_show(gate: expressions.Gate, attempt: Attempt) -> "Json":
    """What the gate reads, by name, without what the schemas mark as sensitive; null stands for what is missing."""
    shown = _inputs_to_show(attempt)
    values = {**shown["outputs"], "input": shown["input"]}
    return {".".join(path): lookup_shown(path, values) for path in gate.references}


def _read_by(gate: expressions.Gate, claim: Claim) -> "Json":
    """The whole outputs that a gate read a part of: what an agent that runs again needs to know."""
    agents = sorted({path[0] for path in gate.references} & claim.outputs.keys())
    return {name: claim.outputs[name] for name in agents}


def _digest(attempt: Attempt) -> str:
    """What is approved: the inputs, the agent's whole definition, and the code that will run."""
    claim = attempt.claim
    return hash_json(
        {
            "agent": json.loads(json.dumps(asdict(attempt.agent))),
            "code": attempt.handler.code_hash if attempt.handler else None,
            "input": claim.input,
            "outputs": claim.outputs,
            "feedback": claim.feedback,
        }
    )


def _suspend(attempt: Attempt, digest: str) -> Result:
    """Asks a person. Whoever executes after the approval must find the same digest."""
    store, expires_ms = attempt.worker.store, attempt.agent.approval_timeout_ms
    shown = _inputs_to_show(attempt)
    if attempt.claim.feedback:
        shown["feedback"] = redacted_feedback(attempt.claim.feedback, attempt.pipeline)
    reach(CrashPoint.SUSPEND_BEFORE, attempt.agent.id)
    ended = through_outage(
        lambda: store.suspend(attempt.step, attempt.id, digest, capped(shown, SHOWN_MAX_BYTES), expires_ms),
        max_s=OUTAGE_MAX_S,
    )
    reach(CrashPoint.SUSPEND_AFTER, attempt.agent.id)
    if ended.outcome == "stale":
        events.emit(Event.STEP_STALE_CLAIM, state="fenced")
        return Result("stale")
    events.emit(Event.STEP_SUSPENDED, digest=digest)
    _emit_run_end(ended)
    return Result("suspended", _ready(ended))


def _work(attempt: Attempt) -> Work:
    claim = attempt.claim
    return Work(
        run_id=attempt.step.run_id,
        attempt_id=attempt.id,
        pipeline=attempt.pipeline.name,
        agent=attempt.agent,
        generation=claim.generation,
        number=claim.number,
        input=claim.input,
        outputs=claim.outputs,
        deadline=attempt.deadline,
        feedback=claim.feedback,
    )


def _call(attempt: Attempt) -> Answer:
    work = _work(attempt)
    _warn_once_a_run(attempt)
    logged, settings = _logs_values(attempt), attempt.worker.settings
    if logged and attempt.pipeline.tracing.log_inputs:
        events.emit(Event.STEP_INPUT, inputs=capped(_inputs_to_show(attempt), settings.log_value_max_bytes))
    reach(CrashPoint.CALL_BEFORE, attempt.agent.id)
    if attempt.handler:
        from app.agents import handlers

        with traces.part(Kind.HANDLER, str(attempt.agent.handler)):
            effects = RecordedEffects(attempt.worker.store, attempt.step, attempt.id)
            answer = handlers.call(attempt.handler, work, effects, settings)
    else:
        answer = tracing.call_model(work, attempt.pipeline, settings)
    reach(CrashPoint.CALL_AFTER, attempt.agent.id)
    if logged and attempt.pipeline.tracing.log_outputs:
        shown = redact(answer.output, attempt.agent.schema)
        events.emit(Event.STEP_OUTPUT, output=capped(shown, settings.log_value_max_bytes))
    return answer


def _logs_values(attempt: Attempt) -> bool:
    """Whether the logs are where this run's values are shown, those that the file lets be."""
    return attempt.shown_by == traces.LOGS


def _inputs_to_show(attempt: Attempt) -> "Json":
    """What the attempt was given, without what the schemas mark as sensitive."""
    pipeline, claim = attempt.pipeline, attempt.claim
    outputs = {name: redact(output, pipeline.by_id[name].schema) for name, output in claim.outputs.items()}
    return {"input": redact(claim.input, pipeline.input_schema), "outputs": outputs}


def _warn_once_a_run(attempt: Attempt) -> None:
    """Says what the file asks for and does not get, at the first attempt of the first agent."""
    if attempt.agent is not attempt.pipeline.agents[0] or attempt.claim.number > 1:
        return
    if attempt.pipeline.checkpointing.store == "redis" and not attempt.worker.cache:
        events.emit(Event.CACHE_AWAY, message="STEPFAST_REDIS_URL is not set: outputs are read from Postgres.")
    aliases = attempt.worker.settings.model_aliases
    for model in sorted({agent.model for agent in attempt.pipeline.agents if agent.model in aliases}, key=str):
        assert model is not None
        events.emit(Event.MODEL_ALIASED, model=model, runs_on=aliases[model])


def _complete(attempt: Attempt, answer: Answer, reused_from: UUID | None = None) -> Result:
    """Commits. The answer is held, and its commit repeated, until Postgres takes it or the fence refuses it."""
    paid = Paid(answer.model, answer.request_id, answer.usage, answer.cost_usd)
    store = attempt.worker.store
    reach(CrashPoint.COMPLETE_BEFORE, attempt.agent.id)
    try:
        with traces.part(Kind.COMMIT, "commit") as told:
            ended = through_outage(
                lambda: store.complete(attempt.step, attempt.id, answer.output, paid, reused_from, answer.observed),
                max_s=OUTAGE_MAX_S,
            )
            told.attributes["stepfast.outcome"] = ended.outcome
    except DataError as error:
        reason = str(error.orig).splitlines()[0]
        refused = InvalidOutput(f"Postgres refuses the output: {reason}", usage=paid.usage, cost_usd=paid.cost_usd)
        return _fail(attempt, refused)
    reach(CrashPoint.COMPLETE_AFTER, attempt.agent.id)
    if ended.outcome == "stale":
        events.emit(Event.STEP_STALE_CLAIM, state="fenced", cost_usd=answer.cost_usd)
        return Result("stale")
    cached.keep(attempt.worker, attempt.pipeline, attempt.id, answer.output)
    events.emit(Event.STEP_REUSED if reused_from else Event.STEP_COMPLETED, cost_usd=answer.cost_usd)
    _emit_run_end(ended)
    return Result("completed", _ready(ended))


def _fail(attempt: Attempt, error: AgentError) -> Result:
    ending = decide(
        error,
        attempt.agent,
        failures=attempt.claim.failures,
        waits=attempt.claim.waits,
        rounds=attempt.claim.rounds,
        random_0_to_1=random.random(),  # noqa: S311  # spreads retries; nothing is guessed from it
    )
    model = attempt.agent.model
    runs_on = attempt.worker.settings.model_aliases.get(model, model) if model else None
    paid = Paid(runs_on, None, error.usage, error.cost_usd)
    stored = error_json(attempt, error)
    reach(CrashPoint.FAIL_BEFORE, attempt.agent.id)
    try:
        ended = _store_failure(attempt, stored, paid, ending)
    except Exception as unstorable:  # noqa: BLE001  # an error that cannot be stored must not leave its step executing
        stored = error_json(attempt, _internal(unstorable))
        ended = _store_failure(attempt, stored, Paid(), ending)
    reach(CrashPoint.FAIL_AFTER, attempt.agent.id)
    if ended.outcome == "stale":
        events.emit(Event.STEP_STALE_CLAIM, state="fenced", code=error.code)
        return Result("stale")
    quotes = _logs_values(attempt) and shows_errors(attempt.pipeline)
    events.emit(
        Event.STEP_DISCARDED if ended.outcome == "discarded" else _FAILED[ending.action],
        code=error.code,
        message=stored["message"] if quotes else error.unquoted or stored["message"],
        retry_ms=ending.retry_ms,
        cost_usd=error.cost_usd,
    )
    _emit_run_end(ended)
    return Result(ended.outcome, _ready(ended), error.code)


def _store_failure(attempt: Attempt, stored: "Json", paid: Paid, ending: Ending) -> Ended:
    store = attempt.worker.store
    return through_outage(lambda: store.fail(attempt.step, attempt.id, stored, paid, ending), max_s=OUTAGE_MAX_S)


def _ready(ended: Ended) -> tuple[str, ...]:
    return tuple(step.agent for step in ended.ready)


_FAILED = {"retry": Event.STEP_RETRY_SCHEDULED, "discard": Event.STEP_DISCARDED, "rerun": Event.STEP_RERUN}


def error_json(attempt: Attempt, error: AgentError) -> "Json":
    """The stored form of an error, redacted and bounded; the dead letter is made of it."""
    limit = attempt.worker.settings.log_value_max_bytes
    next_step = error.next_step or f"When the cause is mended: stepfast resume {attempt.step.run_id}"
    return {
        "code": error.code,
        "who": error.who,
        "message": capped(redact(error.message), limit),
        "next_step": capped(next_step, limit),
        "details": capped(redact(error.details), limit),
    }


def _internal(error: Exception) -> AgentError:
    frames = "".join(traceback.format_exception(error))[-4_000:]
    return HandlerFailed(f"{type(error).__name__}: {error}", details={"traceback": frames})


def _emit_run_end(ended: Ended) -> None:
    if ended.run_state == "completed":
        events.emit(Event.RUN_COMPLETED)
    elif ended.run_state == "suspended":
        events.emit(Event.RUN_SUSPENDED)
    elif ended.run_state == "failed" and ended.outcome == "discarded":
        events.emit(Event.RUN_FAILED)
