"""Celery's task events, as Flower needs them, sent a few times a second and not one by one.

That took a quarter of a worker's time. Those of a worker and of what it sends go together, in their order. Other
processes send theirs at once, as Celery does.
"""

import os
import threading
from typing import Any

from celery.app.events import Events
from celery.bootsteps import StartStopStep
from celery.events import EventDispatcher
from celery.worker import state
from kombu.asynchronous import get_event_loop

SENT_AFTER_S = 0.2
# More than this at once are sent by whoever adds the last one.
_AT_ONCE_MAX = 500


class TaskEvents(Events):
    dispatcher_cls = "app.execution.task_events:Dispatcher"


class Dispatcher(EventDispatcher):
    """The one of a worker's event loop holds task events back; the others of its process pass theirs to it."""

    _of_worker: "Dispatcher | None" = None

    def __init__(self, *args: Any, on_send_buffered: Any = None, **kwargs: Any) -> None:  # noqa: ANN401  # untyped
        self._waiting = threading.Lock()
        if on_send_buffered:
            kwargs |= {"buffer_limit": _AT_ONCE_MAX, "on_send_buffered": self._send_soon}
        super().__init__(*args, **kwargs)
        if on_send_buffered:
            Dispatcher._of_worker = self

    def publish(self, type: str, fields: dict[str, Any], producer: Any, **kwargs: Any) -> Any:  # noqa: A002, ANN401
        """How Celery tells of a message that was sent."""
        worker = Dispatcher._of_worker
        # Not in a child, which inherits both: the connection is its parent's.
        if worker is not None and worker.pid == os.getpid() and worker.enabled:
            return worker.send(type, **fields)
        return super().publish(type, fields, producer, **kwargs)

    def _send_soon(self) -> None:
        loop = get_event_loop()
        if loop is None or state.should_stop is not None:
            self.flush()
        elif self._waiting.acquire(blocking=False):
            loop.call_soon(loop.call_later, SENT_AFTER_S, self._send)

    def _send(self) -> None:
        self._waiting.release()
        self.flush()


class SendWhatWaits(StartStopStep):
    """A worker that stops has no loop that would send what is held back."""

    requires = ("celery.worker.consumer.events:Events",)

    def stop(self, parent: Any) -> None:  # noqa: ANN401
        if parent.event_dispatcher:
            parent.event_dispatcher.flush()
