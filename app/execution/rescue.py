"""The sweep: twice a second in every worker, so that nothing waits for ever.

Due retries, workers that are gone, runs that plain SQL enqueued, what people ordered from outside, messages that were
lost, dead letters not yet sent. An idle worker spends one statement on it.
"""

import threading
from typing import TYPE_CHECKING

from app import events
from app.crashpoints import CrashPoint, reach
from app.events import Event
from app.execution import canvas, dead_queue, queues, requests

if TYPE_CHECKING:
    from collections.abc import Callable

    from app.execution.worker import Worker
    from app.runs.store import Swept

BATCH = 500
# What one transaction rescues, ends or releases. Each takes a millisecond or two, twenty on a busy server, and locks a
# run until the last is done: transactions are to stay under 50 ms.
_CHANGED_AT_ONCE_MAX = 2
_ROUNDS_MAX = 500
# A message that is sent and not claimed for so long, while its queue is empty, was lost.
RESEND_MS = 2_000
_JUDGE_MIN_S = 0.02


def sweep(worker: "Worker") -> float | None:
    """One sweep. What it cannot finish, the next one finds again. Returns in how many seconds to judge a suspect."""
    for _ in range(_ROUNDS_MAX):
        swept = _sweep_once(worker)
        if max(swept.due, swept.expired, len(swept.rescued)) < _CHANGED_AT_ONCE_MAX:
            break
    return None if swept.judge_ms is None else swept.judge_ms / 1000


def _sweep_once(worker: "Worker") -> "Swept":
    configured = worker.settings
    reach(CrashPoint.SWEEP_BEFORE)
    # Whoever was cut off together with this process may be back later than it: it is not dead. A beat later it is.
    was_cut = worker.store.lost_a_session_within(configured.lease_s)
    swept = worker.store.sweep(
        lease_ms=round(configured.lease_s * 1000),
        grace_ms=round(1000 * max(configured.grace_s, configured.lease_s / 3 if was_cut else 0)),
        resend_ms=RESEND_MS,
        limit=_CHANGED_AT_ONCE_MAX,
        family=worker.family(),
    )
    for worker_id in swept.lost:
        events.emit(Event.WORKER_LOST, worker=worker_id)
    for rescued in swept.rescued:
        events.emit(Event.STEP_RESCUED, **rescued)
        reach(CrashPoint.SWEEP_AFTER, rescued["agent"])
    if swept.requested:
        requests.carry_out(worker)
    if swept.unsent or swept.due or swept.rescued:
        _send_unsent(worker)
    if swept.overdue:
        empty = queues.empty_queues(swept.overdue)
        overdue = worker.store.take_overdue(empty, RESEND_MS, BATCH)
        canvas.send_unsent(overdue, worker.definition)
    if swept.unpublished or any(entry["code"] != "worker_lost" for entry in swept.rescued):
        dead_queue.publish_pending(worker.store, configured.dead_queue_max)
    return swept


def _send_unsent(worker: "Worker") -> None:
    for _ in range(_ROUNDS_MAX):
        unsent = worker.store.take_unsent(None, BATCH)
        canvas.send_unsent(unsent, worker.definition)
        if len(unsent) < BATCH:
            return


class Sweeper:
    """A thread that sweeps until it is stopped. It begins whatever is away just then, and goes on when it is back."""

    def __init__(self, current: "Callable[[], Worker]", pause_s: float) -> None:
        self._current = current
        self._pause_s = pause_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stepfast-sweeper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        pause_s = self._pause_s
        while not self._stopping.wait(pause_s):
            pause_s = self._pause_s
            try:
                judge_s = sweep(self._current())
                if judge_s is not None:
                    # Its steps wait for the end of the grace, and not for the next turn as well.
                    pause_s = min(pause_s, max(judge_s, _JUDGE_MIN_S))
            except Exception as error:  # noqa: BLE001  # whatever it was, the next sweep tries again
                events.emit(Event.SWEEP_FAILED, error=str(error).splitlines()[0] if str(error) else repr(error))
