"""Start runs of Stepfast's pipelines inside your application's own database transaction, and follow them.

    import stepfast

    run = stepfast.enqueue("fulfilment", {"order": 7}, key="order-7", connection=session)
    run.status().state

`stepfast.django` and `stepfast.flask` fit it into those frameworks. Nothing here imports a driver before it is used.
"""

from stepfast.client import Client, configure, enqueue, run
from stepfast.errors import (
    InvalidInput,
    KeyConflict,
    Misuse,
    NotEnded,
    NotPossible,
    NotReady,
    RunFailed,
    StepfastError,
    UnknownName,
)
from stepfast.runs import Ask, Event, Request, RunHandle, Status

__all__ = [
    "Ask",
    "Client",
    "Event",
    "InvalidInput",
    "KeyConflict",
    "Misuse",
    "NotEnded",
    "NotPossible",
    "NotReady",
    "Request",
    "RunFailed",
    "RunHandle",
    "Status",
    "StepfastError",
    "UnknownName",
    "configure",
    "enqueue",
    "run",
]
