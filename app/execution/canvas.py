"""From steps that may start to Celery messages.

The canvas is derived and disposable: a linear stretch is a `chain`, several stretches are a `group`; a join is sent by
the committer that completes its last dependency. Tasks are named by strings, so that nothing here imports them.
Messages carry ids, never inputs or outputs.
"""

from itertools import groupby
from typing import TYPE_CHECKING

from amqp.exceptions import AMQPError
from celery import Signature, chain, group
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from app import events
from app.crashpoints import CrashPoint, reach
from app.events import Event
from app.pipelines import plan
from app.runs.store import StepKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from uuid import UUID

    from app.pipelines.model import Pipeline
    from app.runs.store import Unsent

STEP_TASK = "stepfast.step"
# The client's message after its host's commit.
DISPATCH_TASK = "stepfast.dispatch"
# What a broker that is away raises: kombu wraps some of it, and not all.
BROKER_ERRORS = (OperationalError, OSError, RedisError, AMQPError)


def signature(pipeline: "Pipeline", run_id: "UUID", agent_id: str) -> Signature:
    """One attempt's message."""
    return Signature(
        STEP_TASK,
        args=(str(run_id), agent_id, pipeline.hash),
        immutable=True,
        options={"queue": pipeline.by_id[agent_id].queue, "shadow": f"{pipeline.name}.{agent_id}"},
    )


def compile_canvas(pipeline: "Pipeline", run_id: "UUID", ready: "Iterable[str]") -> Signature | None:
    """The canvas of the stretches that begin with these agents; None where there are none."""
    stretches = [
        [signature(pipeline, run_id, agent_id) for agent_id in stretch]
        for stretch in plan.stretches(pipeline, tuple(ready))
    ]
    parts = [stretch[0] if len(stretch) == 1 else chain(*stretch) for stretch in stretches]
    if len(parts) <= 1:
        return parts[0] if parts else None
    return group(*parts)


def send(pipeline: "Pipeline", run_id: "UUID", ready: "Iterable[str]") -> bool:
    """Sends what is ready, and returns whether that worked.

    A broker that is away loses nothing: the steps stay available, and the sweep sends them again.
    """
    agents = tuple(ready)
    canvas = compile_canvas(pipeline, run_id, agents)
    if canvas is None:
        return True
    try:
        canvas.apply_async()
    except BROKER_ERRORS as error:
        events.emit(Event.SEND_FAILED, run_id=str(run_id), agents=agents, error=str(error))
        return False
    events.emit(Event.STEP_DISPATCHED, run_id=str(run_id), agents=agents)
    return True


def send_unsent(unsent: "Iterable[Unsent]", definition: "Callable[[str], Pipeline]") -> int:
    """Sends steps that the store marked as sent, in their order, a canvas a run. Returns how many were sent."""
    sent = 0
    for run_id, entries in groupby(unsent, key=lambda entry: entry.step.run_id):
        of_run = list(entries)
        for entry in of_run:
            reach(CrashPoint.TAKE_AFTER, entry.step.agent)
        if not send(definition(of_run[0].pipeline_hash), run_id, [entry.step.agent for entry in of_run]):
            # Each further try would wait for the broker, too. What is left is found as overdue.
            break
        sent += len(of_run)
    return sent


def step_of(args: "Iterable[str]") -> tuple[StepKey, str]:
    """The inverse of `signature`'s arguments: the step and its pipeline's hash."""
    from uuid import UUID

    run_id, agent_id, pipeline_hash = args
    return StepKey(UUID(run_id), agent_id), pipeline_hash
