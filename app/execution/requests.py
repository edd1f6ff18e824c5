"""Carries out what people ordered from outside: rows of `stepfast.requests`, written by applications and plain SQL."""

from typing import TYPE_CHECKING

from app import events
from app.events import Event
from app.execution import canvas
from app.runs.orders import Orders

if TYPE_CHECKING:
    from uuid import UUID

    from app.execution.worker import Worker
    from app.runs.orders import Carried

AT_ONCE_MAX = 500
_STEPS_AT_ONCE_MAX = 1_000


def carry_out(worker: "Worker", run_id: "UUID | None" = None) -> None:
    """Carries out what waits, of one run or of all, and sends what may go on by it. The next sweep finds the rest."""
    orders = Orders(worker.store.engine)
    passed: list[UUID] = []
    for _ in range(AT_ONCE_MAX):
        carried = orders.carry_out(run_id, passed)
        if carried is None:
            return
        _emit(carried)
        canvas.send_unsent(worker.store.take_unsent(carried.run_id, _STEPS_AT_ONCE_MAX), worker.definition)


def _emit(carried: "Carried") -> None:
    fields = {"run_id": str(carried.run_id), "by": carried.by, "reason": carried.reason}
    match carried.action:
        case _ if not carried.done:
            events.emit(Event.REQUEST_REFUSED, action=carried.action, message=carried.answer["message"], **fields)
        case "resume":
            events.emit(Event.RUN_RESUMED, agents=carried.answer["agents"], from_agent=carried.agent, **fields)
        case "cancel":
            events.emit(Event.RUN_CANCELLED, **fields)
        case _:
            events.emit(Event(f"step.{carried.answer['decision']}"), agent=carried.agent, **fields)
