"""What other applications send: `stepfast.start` starts a run; `stepfast.dispatch` has one looked after at once."""

from typing import TYPE_CHECKING, Any
from uuid import UUID

from celery import shared_task
from celery.exceptions import Reject
from sqlalchemy.exc import DBAPIError

from app import events, operations
from app.errors import NotReady, StepfastError
from app.events import Event
from app.execution import canvas, requests, worker
from app.runs.database import is_outage

if TYPE_CHECKING:
    from celery import Task

    from app.pipelines.model import Json


RETRY_S = 5
RETRIES_MAX = 720  # an hour without Postgres


@shared_task(bind=True, name="stepfast.start", ignore_result=True)
def start(self: "Task", pipeline: str, run_input: "Json", key: str | None = None, **options: Any) -> str:  # noqa: ANN401
    """Starts a run and returns its id. The key defaults to the task's id, so a redelivery starts nothing twice.

    `options`: tenant, labels, priority.
    """
    events.clear()
    try:
        started = operations.start(worker.current(), pipeline, run_input, key=key or self.request.id, **options)
    except (StepfastError, DBAPIError) as error:
        if not (isinstance(error, NotReady) or (isinstance(error, DBAPIError) and is_outage(error))):
            # It would be refused again. What it says may hold parts of the input, which are not for logs and events.
            kind = type(error).__name__
            events.emit(Event.REQUEST_REFUSED, action="start", pipeline=pipeline, task=self.request.id, message=kind)
            raise Reject(kind, requeue=False) from None
        # Nothing is recorded yet that a sweep could find: the message itself must come back. Its key makes it one run.
        raise self.retry(exc=error, countdown=RETRY_S, max_retries=RETRIES_MAX) from error
    return str(started.run_id)


@shared_task(name=canvas.DISPATCH_TASK, ignore_result=True)
def dispatch(run_id: str) -> None:
    """Sends what may start of a run, and carries out what was ordered for it: what the next sweep would do.

    The client sends this after its host's commit. An outage is not retried: the sweep comes.
    """
    events.clear()
    try:
        run = UUID(run_id)
    except (ValueError, AttributeError, TypeError) as error:
        raise Reject(f"{run_id!r} is no run's id", requeue=False) from error
    current = worker.current()
    # First what a run that has just started waits for. What was ordered sends by itself what it frees.
    sent = operations.dispatch(current, run)
    requests.carry_out(current, run)
    if not sent:
        # The message may have overtaken its host's commit.
        operations.dispatch(current, run)
