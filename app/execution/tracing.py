"""Runs in the traces of a provider: what executes, as it happens; and what is recorded, by a thread of each worker.

The thread looks for runs of which an attempt, a step or all has ended since (the outbox `stepfast.traces`), and exports
what their record says. So a trace is whole whoever ended a run, and whatever was killed meanwhile: a command, a page, a
sweep. A provider that is away is tried again for a day.
"""

import threading
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy.exc import SQLAlchemyError

from app import events
from app.agents.work import Answer, Work
from app.clock import monotonic_s
from app.errors import AgentError, StepfastError
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
TRIED_MAX = timedelta(days=1)
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
    """Exports what is recorded of runs that are due, until it is stopped."""

    def __init__(self, current: "Callable[[], Worker]") -> None:
        self._current = current
        self._stopping = threading.Event()
        self._warned_s = -WARN_EVERY_S
        self._thread = threading.Thread(target=self._run, name="stepfast-tracer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Looks a last time, for STOP_MAX_S. What is left is another worker's, or the next one's."""
        self._stopping.set()
        self._thread.join(STOP_MAX_S)

    def _run(self) -> None:
        last = False
        while not last:
            last = self._stopping.wait(EVERY_S)
            try:
                while export_due(self._current(), self._warn):
                    pass
            except (SQLAlchemyError, StepfastError):  # the sweep says so
                pass
            except Exception as error:  # noqa: BLE001  # whatever it was, it is tried again
                self._warn(repr(error))

    def _warn(self, why: str, provider: str = "") -> None:
        if monotonic_s() - self._warned_s >= WARN_EVERY_S:
            self._warned_s = monotonic_s()
            events.emit(Event.TRACES_LATE, provider=provider, message=why)


def export_due(worker: "Worker", warn: "Callable[[str, str], None]") -> bool:
    """Exports what is due of a few runs. Returns whether there may be more; False where a provider takes nothing."""
    outbox = Traces(worker.store.engine)
    taken = outbox.take(LEASE_S, TAKEN_AT_ONCE_MAX)
    for due in taken:
        try:
            why, provider = _export(worker, outbox, due)
        except (SQLAlchemyError, StepfastError):
            raise
        except Exception:
            outbox.confirm(due, ())  # a run that cannot be shown must not stand before others for ever
            raise
        if why:
            warn(why, provider)
            return False
    return len(taken) == TAKEN_AT_ONCE_MAX


def _export(worker: "Worker", outbox: Traces, due: Due) -> tuple[str, str]:
    """Why it failed, or "", and the provider."""
    found = outbox.record(due.run_id)
    pipeline = worker.definition(found["run"]["pipeline_hash"])
    provider = destination(pipeline, due.run_id, worker.settings)
    ended_at = found["run"]["ended_at"]
    if provider in {"", traces.LOGS} or (ended_at and ended_at < due.taken - TRIED_MAX):
        outbox.confirm(due, ())
        return "", provider
    record = Record(found, pipeline, due, worker.settings.trace_value_max_bytes)
    needed = record.needed()
    spans = record.spans(outbox.outputs(due.run_id, needed) if needed else {})
    why = traces.outlet(provider, worker.settings).export(due.run_id, pipeline.name, spans) if spans else ""
    if not why:
        outbox.confirm(due, {f"{span.id:016x}" for span in spans})
    return why, provider


_tracers: list[Tracer] = []


def start(current: "Callable[[], Worker]", settings: "Settings") -> None:
    """Starts this worker's Tracer, where it can reach a provider."""
    if traces.is_configured(settings):
        tracer = Tracer(current)
        tracer.start()
        _tracers.append(tracer)


def stop() -> None:
    """Exports what waits, for at most STOP_MAX_S and FLUSH_MAX_S."""
    for tracer in _tracers:
        tracer.stop()
    _tracers.clear()
    traces.stop()
