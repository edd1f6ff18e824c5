"""The names of everything that is recorded or logged: one enum, so that a name is spelled once.

The first group is written to `stepfast.events` by the database's functions, in the transaction of the change itself,
and logged by the process that made the change. The second group is only logged.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from enum import StrEnum


class Event(StrEnum):
    # Recorded in the run's own sequence.
    RUN_ENQUEUED = "run.enqueued"
    RUN_COMPLETED = "run.completed"
    RUN_FAILED = "run.failed"
    RUN_RESUMED = "run.resumed"
    RUN_CANCELLED = "run.cancelled"
    RUN_SUSPENDED = "run.suspended"
    RUN_CONTINUED = "run.continued"
    STEP_CLAIMED = "step.claimed"
    STEP_COMPLETED = "step.completed"
    STEP_REUSED = "step.reused"
    STEP_RETRY_SCHEDULED = "step.retry_scheduled"
    STEP_DEFERRED = "step.deferred"
    STEP_DISCARDED = "step.discarded"
    STEP_RESCUED = "step.rescued"
    STEP_RERUN = "step.rerun"
    STEP_REOPENED = "step.reopened"
    STEP_STALE_READ = "step.stale_read"  # what it was given was superseded, or is older than declared; it is accepted
    STEP_STALE_INPUT = "step.stale_input"  # what it reads is too old: it waits until that is done again
    STEP_SUSPENDED = "step.suspended"
    STEP_APPROVED = "step.approved"
    STEP_REJECTED = "step.rejected"
    STEP_EXPIRED = "step.expired"
    STEP_OVERRIDDEN = "step.overridden"
    STEP_SETTLED = "step.settled"
    STEP_CANCELLED = "step.cancelled"
    STEP_FENCED = "step.fenced"  # an attempt that had lost its step came with what it had done, and was refused
    STEP_DISMISSED = "step.dismissed"  # a person discarded its dead letter

    # Only logged.
    STEP_STALE_CLAIM = "step.stale_claim"
    STEP_ALONE = "step.alone"  # it is executed in a process of its own: workers died under it
    STEP_DISPATCHED = "step.dispatched"
    SEND_FAILED = "step.send_failed"
    STEP_INPUT = "step.input"
    STEP_OUTPUT = "step.output"
    STEP_GATE = "step.gate"
    COMMIT_RETRIED = "step.commit_retried"
    MODEL_CALLED = "model.called"
    MODEL_ALIASED = "model.aliased"
    HANDLER_PRINTED = "handler.printed"
    HANDLER_LOG = "handler.log"
    CACHE_AWAY = "checkpoint.cache_away"  # Redis does not answer, or is not named: outputs are read from Postgres
    TRACES_OFF = "traces.off"  # a provider cannot be used by this process
    TRACES_DROPPED = "traces.dropped"  # a provider took them not
    TRACES_LATE = "traces.late"  # likewise; what is recorded is exported later
    PIPELINE_PUBLISHED = "pipeline.published"
    DEAD_LETTER_PUBLISHED = "dead_letter.published"
    REQUEST_REFUSED = "request.refused"
    SWEEP_FAILED = "sweep.failed"
    WORKER_STARTED = "worker.started"
    WORKER_STOPPED = "worker.stopped"  # it gave away what it could not finish in time
    WORKER_LOST = "worker.lost"
    HEARTBEAT_FAILED = "worker.heartbeat_failed"
    LIBRARY = "library"  # a third party's log line, under our format


Subscriber = Callable[[Event, Mapping[str, object]], None]

_subscribers: list[Subscriber] = []
_bound: ContextVar[Mapping[str, object]] = ContextVar("stepfast_bound", default={})  # noqa: B039  # never mutated


def subscribe(subscriber: Subscriber) -> None:
    """Has `subscriber` called with every event of this process, from any thread."""
    if subscriber not in _subscribers:
        _subscribers.append(subscriber)


def emit(event: Event, /, **fields: object) -> None:
    """Tells every subscriber. What a subscriber raises is dropped: watching a step must not fail it."""
    merged = {**_bound.get(), **fields}
    for subscriber in _subscribers:
        with suppress(Exception):
            subscriber(event, merged)


@contextmanager
def bound(**fields: object) -> Iterator[None]:
    """Adds fields (run_id, agent, …) to every event emitted inside, and removes them after."""
    token = _bound.set({**_bound.get(), **fields})
    try:
        yield
    finally:
        _bound.reset(token)


def bound_fields() -> Mapping[str, object]:
    """What is bound now."""
    return _bound.get()


def clear() -> None:
    """Forgets what is bound. Contextvars leak from task to task in Celery's pools, so each task begins with this."""
    _bound.set({})
