"""The crash points of messages, at which Celery and not our code sends and acknowledges."""

from typing import Any

from celery import signals
from celery.worker.request import Request

from app.crashpoints import CrashPoint, is_used, reach
from app.execution.canvas import STEP_TASK


class StepRequest(Request):
    """A step's message in a worker: of a prefork worker this is the parent."""

    def acknowledge(self) -> None:
        if not is_used() or self.acknowledged:
            super().acknowledge()
            return
        run, agent, _ = self.args
        reach(CrashPoint.ACK_BEFORE, agent, run)
        super().acknowledge()
        reach(CrashPoint.ACK_AFTER, agent, run)


def connect() -> None:
    """Has every message of a step noted before and after it is given to the broker, in a crash test alone."""
    if is_used():
        signals.before_task_publish.connect(_before, weak=False, dispatch_uid="stepfast-before-send")
        signals.after_task_publish.connect(_after, weak=False, dispatch_uid="stepfast-after-send")


def _before(sender: str, body: Any, **_: Any) -> None:  # noqa: ANN401  # Celery's signals pass what they like
    _reach(CrashPoint.SEND_BEFORE, sender, body)


def _after(sender: str, body: Any, **_: Any) -> None:  # noqa: ANN401
    _reach(CrashPoint.SEND_AFTER, sender, body)


def _reach(point: CrashPoint, task: str, body: Any) -> None:  # noqa: ANN401
    if task == STEP_TASK:
        (run, agent, _), _, _ = body
        reach(point, agent, run)
