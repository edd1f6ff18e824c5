"""What is done to messages, servers and networks while a run goes on.

Each is a generator that the lane continues between its looks at the run; its end lets the run be judged. Most begin
where a worker has stopped itself (SIGSTOP, at `complete.before`) with an answer in its hands: the worst moment.
"""

import os
import signal
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from uuid import UUID

from celery import Celery

from app.crashpoints import CrashPoint, Note
from app.crashtest.cells import Cell, Fault
from app.execution.canvas import STEP_TASK
from app.execution.queues import StepAMQP

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from app.crashtest.lane import Lane, Playing

_STEPS_MAX = 1_000


def _message_doubled(lane: "Lane", playing: "Playing") -> "Iterator[None]":
    """Sends each step's message again while it executes and after its commit, until every one was taken."""
    doubled: set[tuple[CrashPoint, str]] = set()
    agents = lane.order.pipeline.agents
    ended = False
    while not ended or sum(note.point == CrashPoint.CLAIM_BEFORE for note in lane.notes()) < len(agents) + len(doubled):
        ended = lane.has_ended(playing)
        for note in lane.notes():
            when = (note.point, note.agent)
            if note.point in {CrashPoint.CLAIM_AFTER, CrashPoint.COMPLETE_AFTER} and when not in doubled:
                _send(lane, playing.run_id, note.agent)
                doubled.add(when)
        yield


def _worker_frozen(lane: "Lane", playing: "Playing") -> "Iterator[None]":
    stopped = yield from _until_stopped(lane, playing)
    while not lane.has_ended(playing):
        yield
    _thaw(stopped)
    yield from _until_answered(lane, stopped)


def _network_dropped(lane: "Lane", playing: "Playing") -> "Iterator[None]":
    stopped = yield from _until_stopped(lane, playing)
    lane.proxies[lane.workers.of(stopped.pid).slot].drop()
    _thaw(stopped)


def _network_cut(lane: "Lane", playing: "Playing") -> "Iterator[None]":
    stopped = yield from _until_stopped(lane, playing)
    proxy = lane.proxies[lane.workers.of(stopped.pid).slot]
    proxy.cut()
    _thaw(stopped)
    try:
        while not lane.has_ended(playing):
            yield
    finally:
        proxy.heal()
    yield from _until_answered(lane, stopped)


def _broker_away(*, forgets: bool) -> "Callable[[Lane, Playing], Iterator[None]]":
    def fault(lane: "Lane", playing: "Playing") -> "Iterator[None]":
        stopped = yield from _until_stopped(lane, playing)
        with lane.servers.broker_away(forgets=forgets):
            _thaw(stopped)

    return fault


def _postgres_away(number: signal.Signals) -> "Callable[[Lane, Playing], Iterator[None]]":
    def fault(lane: "Lane", playing: "Playing") -> "Iterator[None]":
        stopped = yield from _until_stopped(lane, playing)
        with lane.servers.postgres_away(number):
            _thaw(stopped)

    return fault


FAULTS: "dict[Fault, Callable[[Lane, Playing], Iterator[None]]]" = {
    Fault.MESSAGE_DOUBLED: _message_doubled,
    Fault.WORKER_FROZEN: _worker_frozen,
    Fault.NETWORK_DROPPED: _network_dropped,
    Fault.NETWORK_CUT: _network_cut,
    Fault.BROKER_WIPED: _broker_away(forgets=True),
    Fault.BROKER_RESTARTED: _broker_away(forgets=False),
    Fault.POSTGRES_FAST: _postgres_away(signal.SIGINT),
    Fault.POSTGRES_IMMEDIATE: _postgres_away(signal.SIGQUIT),
}


@contextmanager
def around_start(lane: "Lane", cell: Cell, run_id: UUID) -> "Iterator[None]":
    """Where the broker is wiped, the run's first message is lost, too: it is marked as sent, and never is.

    (Sent for real it would not wait to be lost: either broker hands it to a worker at once, also to a stopped one.)
    """
    if cell.fault != Fault.BROKER_WIPED:
        yield
        return
    lane.workers.signal(signal.SIGSTOP)  # or one of them would send it
    try:
        yield
        lane.store.take_unsent(run_id, _STEPS_MAX)
    finally:
        lane.workers.signal(signal.SIGCONT)


def _send(lane: "Lane", run_id: UUID, agent: str) -> None:
    """A message as the application would send it; from an app of our own, since each lane has its own broker."""
    pipeline = lane.order.pipeline
    celery = Celery("stepfast-crashtest", broker=lane.broker_url, amqp=StepAMQP, set_as_current=False)
    with celery.connection_for_write() as connection:
        celery.send_task(
            STEP_TASK,
            args=(str(run_id), agent, pipeline.hash),
            queue=pipeline.by_id[agent].queue,
            connection=connection,
        )


def _until_stopped(lane: "Lane", playing: "Playing") -> "Generator[None, None, Note]":
    """Until a worker has stopped itself where it was ordered to; which one it is."""
    while True:
        for note in lane.notes():
            if note.struck:
                playing.struck_at_s = note.at_s
                return note
        yield


def _until_answered(lane: "Lane", stopped: Note) -> "Iterator[None]":
    """Until the database has answered the late commit of a worker that was away."""
    while not any(note.point == CrashPoint.COMPLETE_AFTER and note.pid == stopped.pid for note in lane.notes()):
        yield


def _thaw(stopped: Note) -> None:
    with suppress(ProcessLookupError):  # then it never answers, and that is found
        os.kill(stopped.pid, signal.SIGCONT)
