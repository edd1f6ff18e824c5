"""The Celery shell around a step: from a message to the executor, and from its result to the next messages."""

from typing import TYPE_CHECKING, Any

from celery import shared_task
from celery.exceptions import Reject
from sqlalchemy.exc import DataError

from app import events
from app.errors import UnknownName
from app.execution import canvas, dead_queue, worker
from app.execution.executor import execute
from app.execution.persistence import OUTAGE_MAX_S, through_outage

if TYPE_CHECKING:
    from celery import Task

    from app.execution.worker import Worker
    from app.pipelines.model import Pipeline


class AttemptFailed(Exception):  # reads as a state, as in errors.py
    """Ends the task as FAILURE, so that Flower shows the attempt as failed and Celery drops the rest of the chain."""


@shared_task(
    bind=True,
    name=canvas.STEP_TASK,
    ignore_result=True,
    throws=(AttemptFailed,),
    Request="app.execution.messages:StepRequest",
)
def step(self: "Task", *args: str) -> str:
    """One attempt at one step. Returns the step's new state; raises AttemptFailed where the attempt failed."""
    events.clear()
    try:
        key, pipeline_hash = canvas.step_of(args)
        current, pipeline = through_outage(lambda: _prepared(pipeline_hash), max_s=OUTAGE_MAX_S)
        pipeline.by_id[key.agent]
    except (ValueError, TypeError, KeyError, UnknownName, DataError) as error:
        # No message of ours, or of another database: RabbitMQ keeps it in its dead-letter exchange.
        raise Reject(str(error), requeue=False) from error
    result = execute(current, key, pipeline_hash)

    # A failed attempt ends the chain; what its failure mode lets go on is sent anew.
    chained = None if result.error else _next_agent(self.request.chain)
    if chained not in result.ready:
        self.request.chain = None
    canvas.send(pipeline, key.run_id, [agent for agent in result.ready if agent != chained])
    if result.state == "discarded":
        dead_queue.publish_pending(current.store, current.settings.dead_queue_max)
    if result.error:
        # The code alone: task events and Flower are no place for an error's text.
        raise AttemptFailed(f"{key.agent}: {result.error}")
    return result.state


def _prepared(pipeline_hash: str) -> "tuple[Worker, Pipeline]":
    """What an attempt needs from Postgres first. A message that meets an outage here is held: failing would lose it."""
    current = worker.current()
    pipeline = current.definition(pipeline_hash)
    current.worker_id  # noqa: B018  # the first use registers
    return current, pipeline


def _next_agent(chain: list[Any] | None) -> str | None:
    """The agent whose message Celery sends after this task; the chain holds what remains, last first."""
    return chain[-1]["args"][1] if chain else None
