"""Spans of OpenTelemetry: their ids, who gets them, and what is made of an attempt while it executes.

A run is one trace, whose id is the run's. Span ids are hashes of what the span is of, so that any process can name any
span as a parent. What executes is told here, as it happens; what is recorded (runs, steps, attempts) is told from the
record, by `execution.tracing`.

Nothing here may slow or fail a step: spans go to a queue with a limit, which a thread empties; what a provider does not
take is dropped and counted. OpenTelemetry is imported where a run is traced, and nowhere else.
"""

import hashlib
import importlib.util
import logging
import os
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import UUID

from app import events
from app.clock import monotonic_s
from app.events import Event
from app.observe import vendors
from app.observe.vendors import Attributes, Call, Kind
from app.redaction import cut_json, redact_text
from app.settings import Settings

if TYPE_CHECKING:
    import requests
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter

LOGS = "logs"
# Of what an attempt makes while it executes. A span has at most a few values of `trace_value_max_bytes`.
QUEUE_MAX_SPANS = 512
BATCH_MAX_SPANS = 32
EXPORT_EVERY_MS = 500
EXPORT_MAX_S = 5.0
# How long a process that ends waits for what is not exported yet: it is told to stop, and has promises to keep.
FLUSH_MAX_S = 0.7
WARN_EVERY_S = 60.0
_ERROR_MAX_BYTES = 1_000


def span_id(kind: Kind, *of: object) -> int:
    """The id of a span.

    Of a run's segment: by run id and number, from 0; a step: run id, agent, generation, segment; an attempt, or a part
    of one: the attempt's id.
    """
    return int.from_bytes(hashlib.sha256("|".join(map(str, (kind, *of))).encode()).digest()[:8]) or 1


def is_sampled(run_id: UUID, rate: float) -> bool:
    """Whether a run is among the share that is shown. A hash decides: the bits of a UUID are not all random."""
    return int.from_bytes(hashlib.sha256(run_id.bytes).digest()[:8]) < rate * 2**64


@dataclass(frozen=True, slots=True)
class Span:
    """One of ours. Times are in ns since 1970; what is shown is redacted; `link` is (trace id, span id)."""

    kind: Kind
    name: str
    id: int
    parent: int | None
    start_ns: int
    end_ns: int
    attributes: Attributes
    error: str | None = None
    shown_in: object = None
    shown_out: object = None
    link: tuple[int, int] | None = None


# Where they go.


def destination(provider: str, run_id: UUID, rate: float, settings: Settings) -> str:
    """Who shows a run: "logs", a provider, or "" where it is not among the sampled.

    A provider that cannot be used is warned of once a process; then the logs show what it would.
    """
    if provider == LOGS:
        return LOGS
    why = _lacking(provider, settings)
    if not why and not is_sampled(run_id, rate):
        return ""
    why = why or _refused(provider, settings)
    if why:
        _warn_once(provider, why)
        return LOGS
    return provider


def reachable(settings: Settings) -> list[str]:
    """The providers to which this process can export."""
    return [provider for provider in PROVIDERS if not (_lacking(provider, settings) or _refused(provider, settings))]


_NEEDS: Mapping[str, tuple[str, ...]] = {
    "langfuse": ("langfuse_public_key", "langfuse_secret_key"),
    "langsmith": ("langsmith_api_key",),
    "otlp": ("otel_exporter_otlp_endpoint",),
}
PROVIDERS = tuple(_NEEDS)
_warned: set[str] = set()


def _lacking(provider: str, settings: Settings) -> str:
    missing = [name.upper() for name in _NEEDS[provider] if not getattr(settings, name)]
    if provider == "otlp" and settings.otel_exporter_otlp_traces_endpoint:
        missing = []
    if missing:
        return f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set"
    try:
        found = importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError:
        found = None
    return "" if found else "the extra `tracing` of stepfast-app is not installed"


def _refused(provider: str, settings: Settings) -> str:
    try:
        outlet(provider, settings)
    except Exception as error:  # noqa: BLE001  # what OpenTelemetry's variables may say, it may refuse in many ways
        return f"{type(error).__name__}: {error}"
    return ""


def _warn_once(provider: str, lacking: str) -> None:
    if provider not in _warned:
        _warned.add(provider)
        message = f"Runs are not traced to {provider}: {lacking}. The logs show what it would."
        events.emit(Event.TRACES_OFF, provider=provider, message=message)


def _exporter(provider: str, settings: Settings) -> "SpanExporter":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    match provider:
        case "langfuse":
            keys = f"{settings.langfuse_public_key}:{settings.langfuse_secret_key}"
            url = f"{settings.langfuse_base_url.rstrip('/')}/api/public/otel/v1/traces"
            headers = {"authorization": f"Basic {b64encode(keys.encode()).decode()}"}
        case "langsmith":
            url = f"{settings.langsmith_endpoint.rstrip('/')}/otel/v1/traces"
            headers = {"x-api-key": settings.langsmith_api_key or ""}
            if settings.langsmith_project:
                headers["langsmith-project"] = settings.langsmith_project
        case _:
            return OTLPSpanExporter(timeout=EXPORT_MAX_S)  # by OpenTelemetry's own variables
    return OTLPSpanExporter(url, headers=headers, timeout=EXPORT_MAX_S, session=_session(headers))


def _session(headers: Mapping[str, str]) -> "requests.Session":
    """OTLPSpanExporter adds OTEL_EXPORTER_OTLP_HEADERS to whatever it is given: a collector's key is not for others."""
    import requests

    allowed = {*headers, "content-type", "content-encoding", "user-agent"}

    class OnlyOurs(requests.Session):
        def request(self, method: str, url: str, **options: Any) -> Any:  # type: ignore[override]  # noqa: ANN401
            sent = {name: value for name, value in options.pop("headers", {}).items() if name.lower() in allowed}
            return super().request(method, url, headers=sent, **options)

    return OnlyOurs()


class Outlet:
    """One provider, as this process reaches it."""

    def __init__(self, provider: str, settings: Settings) -> None:
        from opentelemetry.sdk.resources import Resource

        self.provider = provider
        self._exporter = _exporter(provider, settings)
        self._resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "stepfast")})
        self._lock = threading.Lock()
        self._waiting_spans = 0
        self._dropped_spans = 0
        self._warned_s = -WARN_EVERY_S
        self._batch: BatchSpanProcessor | None = None
        # Its lines, one for each failure, become ours with a count.
        logging.getLogger("opentelemetry.exporter.otlp.proto.http.trace_exporter").addFilter(_note)

    def _new_batch(self) -> "BatchSpanProcessor":
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

        outlet, exporter = self, self._exporter

        class Counting(SpanExporter):
            def export(self, spans: "Sequence[ReadableSpan]") -> SpanExportResult:
                result = exporter.export(spans)
                outlet.taken(len(spans))
                if result is not SpanExportResult.SUCCESS:
                    outlet.dropped(len(spans), _why())
                return result

            def shutdown(self) -> None:
                exporter.shutdown()

        return BatchSpanProcessor(
            Counting(),
            max_queue_size=QUEUE_MAX_SPANS,
            max_export_batch_size=BATCH_MAX_SPANS,
            schedule_delay_millis=EXPORT_EVERY_MS,
        )

    @cached_property
    def tracer_provider(self) -> "TracerProvider":
        """For the SDK's client: its spans are held until the attempt that called has told what came of them."""
        from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        class Holding(SpanProcessor):
            def on_end(self, span: "ReadableSpan") -> None:
                live = _live.get()
                if live is not None:
                    live.held.append(span)

        made = TracerProvider(sampler=ALWAYS_ON, resource=self._resource, shutdown_on_exit=False)
        made.add_span_processor(Holding())
        return made

    def submit(self, span: "ReadableSpan") -> None:
        """Never waits: what finds the queue full is dropped."""
        with self._lock:
            full = self._waiting_spans >= QUEUE_MAX_SPANS
            self._waiting_spans += not full
            # Made once, and after any fork: it has a thread.
            batch = self._batch = self._batch or self._new_batch()
        if full:
            self.dropped(1, "The queue is full.")
        else:
            batch.on_end(span)

    def taken(self, count: int) -> None:
        with self._lock:
            self._waiting_spans -= count

    def dropped(self, count: int, why: str) -> None:
        """Warns of what was dropped, with its count, once a while."""
        with self._lock:
            self._dropped_spans += count
            if monotonic_s() - self._warned_s < WARN_EVERY_S:
                return
            self._warned_s = monotonic_s()
            told, self._dropped_spans = self._dropped_spans, 0
        self._tell(told, why)

    def _tell(self, count: int, why: str) -> None:
        events.emit(Event.TRACES_DROPPED, provider=self.provider, spans=count, message=why)

    def export(self, run_id: UUID, trace_name: str, spans: Sequence[Span]) -> str:
        """Exports these now, in one request, and waits for it. Returns why it failed, or ""."""
        from opentelemetry.sdk.trace.export import SpanExportResult

        assert len(spans) <= BATCH_MAX_SPANS
        made = [self.readable(run_id, trace_name, span) for span in spans]
        return "" if self._exporter.export(made) is SpanExportResult.SUCCESS else _why() or "it takes nothing"

    def readable(self, run_id: UUID, trace_name: str, span: Span) -> "ReadableSpan":
        """The span as OpenTelemetry exports it."""
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        from opentelemetry.trace import Link, Status, StatusCode

        shown = vendors.of_span(self.provider, span.kind, trace_name, span.shown_in, span.shown_out)
        return ReadableSpan(
            span.name,
            context=_context(run_id.int, span.id),
            parent=_context(run_id.int, span.parent) if span.parent else None,
            resource=self._resource,
            attributes={**span.attributes, **shown},
            links=[Link(_context(*span.link))] if span.link else [],
            status=Status(StatusCode.OK) if span.error is None else Status(StatusCode.ERROR, span.error),
            start_time=span.start_ns,
            end_time=max(span.start_ns, span.end_ns),
            instrumentation_scope=InstrumentationScope("stepfast"),
        )

    def stop(self) -> None:
        """Exports what waits, within FLUSH_MAX_S."""
        if self._batch:
            # It waits for half a minute where nobody answers; a thread of its own can be left behind.
            thread = threading.Thread(target=self._batch.shutdown, name="stepfast-traces-flush", daemon=True)
            thread.start()
            thread.join(FLUSH_MAX_S)
        with self._lock:
            lost, self._dropped_spans = self._dropped_spans + self._waiting_spans, 0
            self._waiting_spans = 0
        if lost:
            self._tell(lost, "The process ended before they were taken.")


_said = threading.local()


def _note(record: logging.LogRecord) -> bool:
    """Keeps what the exporter says, in the thread that exports, and has nobody else log it."""
    _said.text = record.getMessage()
    return False


def _why() -> str:
    return getattr(_said, "text", "")


def _context(trace_id: int, span: int) -> Any:  # noqa: ANN401  # a SpanContext
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(trace_id, span, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))


_outlets: dict[str, Outlet] = {}
_lock = threading.Lock()


def outlet(provider: str, settings: Settings) -> Outlet:
    """How this process reaches a provider."""
    with _lock:
        if provider not in _outlets:
            _outlets[provider] = Outlet(provider, settings)
        return _outlets[provider]


def warm_up() -> None:
    """Loads what the first span needs, before any fork."""
    import opentelemetry.exporter.otlp.proto.http.trace_exporter
    import opentelemetry.sdk.trace.export  # noqa: F401


def stop() -> None:
    """Exports what waits. Whoever ends a process calls it: billiard's children run no atexit."""
    with _lock:
        found = list(_outlets.values())
        _outlets.clear()
    for one in found:
        one.stop()


def _after_fork() -> None:
    """A child makes its own connections, threads and locks, once it has something to export."""
    global _lock, _outlets
    _lock, _outlets = threading.Lock(), {}


os.register_at_fork(after_in_child=_after_fork)


# What is made of an attempt while it executes.


@dataclass(slots=True)
class Live:
    """The attempt that executes in this context, traced. `shows_errors`: what errors say may be shown."""

    outlet: Outlet
    run_id: UUID
    attempt_id: UUID
    trace_name: str
    attributes: Attributes
    shows_errors: bool
    held: "list[ReadableSpan]" = field(default_factory=list)

    def submit(self, span: Span) -> None:
        with suppress(Exception):
            self.outlet.submit(self.outlet.readable(self.run_id, self.trace_name, span))

    def finish_calls(self, call: Call) -> None:
        """Exports the SDK's spans of a call, with what only we know of it."""
        from opentelemetry.sdk.trace import ReadableSpan

        while self.held:
            span = self.held.pop()
            given = dict(span.attributes or {})
            reason = given.get("anthropic.message.stop_reason")
            told = vendors.of_call(self.outlet.provider, self.trace_name, _with_reason(call, reason))
            with suppress(Exception):
                self.outlet.submit(
                    ReadableSpan(
                        span.name,
                        context=span.context,
                        parent=span.parent,
                        resource=span.resource,
                        attributes={**given, **self.attributes, **told},
                        events=span.events,
                        links=span.links,
                        kind=span.kind,
                        status=span.status,
                        start_time=span.start_time,
                        end_time=span.end_time,
                        instrumentation_scope=span.instrumentation_scope,
                    )
                )


_live: ContextVar[Live | None] = ContextVar("stepfast_live", default=None)


def current() -> Live | None:
    """The traced attempt that executes in this context, if one does."""
    return _live.get()


def _with_reason(call: Call, reason: object) -> Call:
    return replace(call, stop_reason=str(reason)) if reason else call


@contextmanager
def following(live: Live | None) -> Iterator[None]:
    """Inside, spans of this attempt are made; those of others (the SDK's, a handler's own) become its children."""
    token = _live.set(live)
    try:
        with _as_current(live, span_id(Kind.ATTEMPT, live.attempt_id) if live else 0):
            yield
    finally:
        if live is not None and live.held:
            live.finish_calls(Call())
        _live.reset(token)


@dataclass(slots=True)
class Part:
    """What is told of a part of an attempt while it is under way."""

    attributes: Attributes = field(default_factory=dict)
    shown_in: object = None
    shown_out: object = None


@contextmanager
def part(kind: Kind, name: str) -> Iterator[Part]:
    """A span of a part of the attempt that executes; nothing where that is not traced."""
    live, told = _live.get(), Part()
    if live is None:
        yield told
        return
    mine, start_ns, error = span_id(kind, live.attempt_id), time.time_ns(), None
    try:
        with _as_current(live, mine):
            yield told
    except BaseException as raised:
        error = error_text(raised, live.shows_errors)
        raise
    finally:
        parent = span_id(Kind.ATTEMPT, live.attempt_id)
        attributes = live.attributes | told.attributes
        live.submit(
            Span(kind, name, mine, parent, start_ns, time.time_ns(), attributes, error, told.shown_in, told.shown_out)
        )


@contextmanager
def _as_current(live: Live | None, span: int) -> Iterator[None]:
    if live is None:
        yield
        return
    from opentelemetry import context, trace

    parent = trace.NonRecordingSpan(_context(live.run_id.int, span))
    token = context.attach(trace.set_span_in_context(parent))
    try:
        yield
    finally:
        context.detach(token)


def error_text(error: BaseException | Mapping[str, object], shows: bool) -> str:
    """A code, and where it may be shown what the error says. It may quote what went in, and what came out."""
    if isinstance(error, BaseException):
        code, message = getattr(error, "code", type(error).__name__), str(error)
    else:
        code, message = error["code"], str(error["message"])
    return str(cut_json(redact_text(f"{code}: {message}"), _ERROR_MAX_BYTES)) if shows else str(code)


def watched(client: Any) -> Any:  # noqa: ANN401  # an Anthropic client, which this room does not import
    """The client with spans of its calls, where the attempt that calls is traced."""
    live = _live.get()
    if live is None:
        return client
    return client.with_options(open_telemetry={"tracer_provider": live.outlet.tracer_provider})
