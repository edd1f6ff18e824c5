"""The end of a worker that is told to stop, by SIGTERM or Ctrl-C: within `shutdown_s`, whatever still executes.

Celery takes no new message from then on, and waits for what executes: for ever. Here that has a bound. Then what may be
repeated is given away, and others go on with it at once; it counts as no loss. What may not be repeated is left to
finish: to end it would make its outcome unknown, which the platform may do, and we must not.
"""

import mmap
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError

from app import events, settings
from app.errors import StepfastError
from app.events import Event
from app.execution import tracing, worker

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_LOOK_AGAIN_S = 0.5
_PARENT_MAX_S = 1.0

_main_pid = os.getpid()
# A byte that prefork's children share with their parent: whether it was told to stop, and waits for what they execute.
_is_told = mmap.mmap(-1, 1)
_ended = threading.Event()


def begin(how: str = "", **_: Any) -> None:  # noqa: ANN401  # Celery's signals pass what they like
    """Called in the signal's handler: only notes it, and starts the thread that keeps the bound."""
    if how != "Warm" or _is_told[0]:
        return
    _is_told[0] = 1
    threading.Thread(target=_keep_bound, name="stepfast-stopping", daemon=True).start()


def end() -> None:
    """All that executed is done."""
    _ended.set()


def _keep_bound() -> None:
    if _ended.wait(settings.load().shutdown_s):
        return
    while (left := _left_after_hand_over()) != 0:
        if _ended.wait(_LOOK_AGAIN_S):
            return
    tracing.stop()
    events.emit(Event.WORKER_STOPPED, pid=os.getpid(), left=left)
    sys.stdout.flush()
    sys.stderr.flush()
    # Celery waits for its threads and processes. Their attempts are fenced, and the kernel ends them with this process.
    os._exit(0)


def _left_after_hand_over() -> int | None:
    """How many steps are left; None where Postgres is away, and nobody can be told."""
    try:
        return worker.current().hand_over()
    except (SQLAlchemyError, StepfastError) as error:
        events.emit(Event.HEARTBEAT_FAILED, error=str(error).splitlines()[0])
        return None


def leave_it_to_the_parent(**_: Any) -> None:  # noqa: ANN401
    """Before each task of a prefork child: a SIGTERM that went to every process of the worker does not end its step.

    Heroku, systemd and others send it so. Billiard's own handler, which it installs late, raises in the midst of it.
    """
    is_child = os.getpid() != _main_pid and threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM) if is_child else None
    if callable(before) and getattr(before, "__name__", "") != "on_sigterm":
        signal.signal(signal.SIGTERM, _patient(before))


def _patient(before: "Callable[[int, FrameType | None], Any]") -> "Callable[[int, FrameType | None], None]":
    def on_sigterm(number: int, frame: "FrameType | None") -> None:
        """The parent may hear of it a moment later. Where it does not, this child alone is meant, by the parent."""
        until_s = time.monotonic() + _PARENT_MAX_S
        while time.monotonic() < until_s:
            if _is_told[0]:
                return
            time.sleep(0.01)
        before(number, frame)

    return on_sigterm
