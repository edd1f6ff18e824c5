"""Runs in the traces of a provider: what executes, as it happens; and what is recorded, by a thread of each worker.

The thread, one for each provider that this worker reaches, looks for runs of which an attempt, a step or all has ended
since (the outbox `stepfast.traces`), and exports what their record says. So a trace is whole whoever ended a run, and
whatever was killed meanwhile: a command, a page, a sweep. What a provider does not take is tried again for a day.
"""

import threading
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from app import events
from app.agents.work import Answer, Work
from app.clock import monotonic_s
from app.errors import AgentError
from app.events import Event
from app.execution.trace_record import Record, shows_errors
from app.observe import traces
from app.observe.vendors import Call
from app.pipelines.feedback import redacted_feedback
from app.redaction import cut_json, redact, redact_text
from app.runs.traces import Due, Traces

if TYPE_CHECKING:
    from collections.abc import Callable

    from app.execution.worker import Worker
    from app.pipelines.model import Json, Pipeline
    from app.settings import Settings

EVERY_S = 0.5
# As long as an export may take, for each of so many.
TAKEN_AT_ONCE_MAX = 4
LEASE_S = 30.0
STOP_MAX_S = 0.8
# After what last happened in a run.
TRIED_MAX = timedelta(days=1)
GIVE_UP_EVERY_S = 60.0
GIVEN_UP_AT_ONCE_MAX = 500
_ROUNDS_MAX = 1_000
WARN_EVERY_S = 60.0


# What executes.


def destination(pipeline: "Pipeline", run_id: UUID, settings: "Settings") -> str:
    """Who shows a run's inputs and outputs: "logs", a provider, or "" for nobody."""
    tracing = pipeline.tracing
    return traces.destination(tracing.provider, run_id, tracing.sample_rate, settings) if tracing.enabled else ""


def following(
    provider: str, pipeline: "Pipeline", run_id: UUID, agent: str, attempt_id: UUID, settings: "Settings"
) -> AbstractContextManager[None]:
    """Has what happens inside told to a provider as this attempt's; nothing where the logs show it, or nobody."""
    if provider in {"", traces.LOGS}:
        return traces.following(None)
    names = {"stepfast.run_id": str(run_id), "stepfast.agent": agent, "stepfast.attempt_id": str(attempt_id)}
    outlet = traces.outlet(provider, settings)
    live = traces.Live(outlet, run_id, attempt_id, pipeline.name, {**names}, shows_errors(pipeline))
    return traces.following(live)


def call_model(work: Work, pipeline: "Pipeline", settings: "Settings") -> Answer:
    """Calls Claude, and tells what only we know of the call. Raises AgentError."""
    from app.agents import claude

    live = traces.current()
    if live is None:
        return claude.call(work, settings)
    paid: Answer | AgentError | None = None
    try:
        paid = claude.call(work, settings)
    except AgentError as error:
        paid = error
        raise
    finally:
        with suppress(Exception):  # what cannot be told must not fail the step; its span is exported without
            if live.held:
                live.finish_calls(_told(work, pipeline, settings, paid))
    return paid


def _told(work: Work, pipeline: "Pipeline", settings: "Settings", paid: Answer | AgentError | None) -> Call:
    tracing, limit = pipeline.tracing, settings.trace_value_max_bytes
    system, user = _messages(work, pipeline, settings) if tracing.log_inputs else (None, None)
    output = None
    if tracing.log_outputs and isinstance(paid, Answer):
        output = cut_json(redact(paid.output, work.agent.schema), limit)
    return Call(
        system=None if system is None else str(cut_json(system, limit)),
        user=None if user is None else str(cut_json(user, limit)),
        output=output,
        usage=paid.usage if paid else None,
        cost_usd=paid.cost_usd if paid else None,
    )


def _messages(work: Work, pipeline: "Pipeline", settings: "Settings") -> tuple[str | None, str | None]:
    """The messages as they would be of redacted values: what the schemas call sensitive does not show by its looks."""
    from app.agents import requests

    def hidden(value: "Json", schema: "Json | None") -> Any:  # noqa: ANN401  # an object, unless it is hidden as a whole
        return redact(value, schema)

    shown = replace(
        work,
        input=hidden(work.input, pipeline.input_schema),
        outputs={name: hidden(output, pipeline.by_id[name].schema) for name, output in work.outputs.items()},
        feedback=redacted_feedback(work.feedback, pipeline),
    )
    try:
        request = requests.build(shown, settings)
    except (AgentError, LookupError, TypeError):  # a template names a part of what is hidden as a whole
        return None, None
    return redact_text(request["system"]), redact_text(request["messages"][0]["content"])


# What is recorded.


class Tracer:
    """Exports what is recorded of runs that are due at one provider, until it is stopped."""

    def __init__(self, current: "Callable[[], Worker]", provider: str) -> None:
        self._current = current
        self._provider = provider
        self._stopping = threading.Event()
        self._gave_up_s = -GIVE_UP_EVERY_S
        self._warned_s: dict[str, float] = {}
        self._thread = threading.Thread(target=self._run, name=f"stepfast-tracer-{provider}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Has it look a last time."""
        self._stopping.set()

    def join(self, within_s: float) -> None:
        """Waits for that. What is left is another worker's, or the next one's."""
        self._thread.join(max(0.0, within_s))

    def _run(self) -> None:
        last = False
        while not last:
            last = self._stopping.wait(EVERY_S)
            try:
                self._look(Traces(self._current().store.engine))
            except Exception as error:  # noqa: BLE001  # whatever it was, it is tried again
                self._warn(error)

    def _look(self, outbox: Traces) -> None:
        if monotonic_s() - self._gave_up_s >= GIVE_UP_EVERY_S:
            self._gave_up_s = monotonic_s()
            for _ in range(_ROUNDS_MAX):
                given_up = outbox.give_up(traces.PROVIDERS, TRIED_MAX.total_seconds(), GIVEN_UP_AT_ONCE_MAX)
                if given_up < GIVEN_UP_AT_ONCE_MAX:
                    break
        while export_due(self._current(), self._provider, self._warn):
            pass

    def _warn(self, error: Exception) -> None:
        """Once a while for each cause: they are few, and one must not hide another."""
        cause = type(error).__name__
        if monotonic_s() - self._warned_s.get(cause, -WARN_EVERY_S) >= WARN_EVERY_S:
            self._warned_s[cause] = monotonic_s()
            said = str(error).splitlines()[:1]  # of Postgres', the rest is the statement
            message = ": ".join((cause, *said))
            events.emit(Event.TRACES_LATE, provider=self._provider, message=message)


class NotTaken(Exception):
    """A provider refused, or did not answer."""


def export_due(worker: "Worker", provider: str, warn: "Callable[[Exception], None]") -> bool:
    """Exports what is due of a few runs. What fails is due again after LEASE_S.

    Returns whether there may be more; False where something failed, so that there is a pause.
    """
    outbox = Traces(worker.store.engine)
    taken = outbox.take(provider, LEASE_S, TAKEN_AT_ONCE_MAX)
    more, failed = len(taken) == TAKEN_AT_ONCE_MAX, False
    for due in taken:
        try:
            more |= _export(worker, outbox, due, provider)
        except Exception as error:  # noqa: BLE001  # it is this run's alone: those after it must not wait for it
            warn(error)
            failed = True
    return more and not failed


def _export(worker: "Worker", outbox: Traces, due: Due, provider: str) -> bool:
    """Exports what is due of a run, or a part of it. Returns whether there is more. Raises NotTaken."""
    found = outbox.record(due.run_id)
    run, changed = found["run"], [found["run"], *found["steps"], *found["attempts"]]
    if max(row["ended_at"] or run["created_at"] for row in changed) < due.taken - TRIED_MAX:
        outbox.confirm(due, ())
        return False
    pipeline = worker.definition(run["pipeline_hash"])
    if not traces.is_sampled(due.run_id, pipeline.tracing.sample_rate):
        outbox.confirm(due, ())
        return False
    limit = worker.settings.trace_value_max_bytes
    record = Record(found, pipeline, due, limit, lambda attempt: outbox.output(due.run_id, attempt))
    waiting = record.waiting()
    spans = [make() for make in waiting[: traces.BATCH_MAX_SPANS]]
    if spans and (why := traces.outlet(provider, worker.settings).export(due.run_id, pipeline.name, spans)):
        raise NotTaken(why)
    more = len(waiting) > len(spans)
    outbox.confirm(due, {f"{span.id:016x}" for span in spans}, more=more)
    return more


_tracers: list[Tracer] = []


def start(current: "Callable[[], Worker]", settings: "Settings") -> None:
    """Starts this worker's Tracers, one for each provider that it reaches: none waits for another that is away."""
    for provider in traces.reachable(settings):
        tracer = Tracer(current, provider)
        tracer.start()
        _tracers.append(tracer)


def stop() -> None:
    """Exports what waits, for at most STOP_MAX_S and FLUSH_MAX_S."""
    until_s = monotonic_s() + STOP_MAX_S
    for tracer in _tracers:
        tracer.stop()
    for tracer in _tracers:
        tracer.join(until_s - monotonic_s())
    _tracers.clear()
    traces.stop()
