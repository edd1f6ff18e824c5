"""A step under which workers died executes in a process of its own, so that its next victim is that process alone.

The processes come from Python's fork server: a process without threads that has everything imported, so that one more
costs milliseconds. It is started for the first such step, and ends with the worker; so does whatever it made.
"""

import json
import multiprocessing
import os
import random
import threading
from dataclasses import asdict
from multiprocessing.connection import wait
from typing import TYPE_CHECKING
from uuid import UUID

from app import events, settings
from app.events import Event
from app.execution import executor
from app.execution import worker as workers
from app.execution.executor import Result
from app.observe import logs, traces
from app.runs.store import StepKey

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from app.execution.worker import Worker

# A process takes some 15 MB of its own. Who finds no place in time is put off, and its thread is free for others: for
# so long for each that waits at most, so that a hundred suspects do not all come back at once.
AT_ONCE_MAX = 8
PLACE_WAIT_S = 1.5
PUT_OFF_EACH_MS = 100
RESULT_MAX_BYTES = 1_000_000

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["app.execution.alone_server"])
_places = threading.BoundedSemaphore(AT_ONCE_MAX)
_waiting: set[StepKey] = set()
# Of multiprocessing's own records of its children, which are not made for many threads.
_starting = threading.Lock()


def execute(worker: "Worker", step: StepKey, pipeline_hash: str) -> Result:
    """Executes a step in a process of its own, and returns what that one says; "stale" where it died."""
    _waiting.add(step)
    try:
        has_place = _places.acquire(timeout=PLACE_WAIT_S)
    finally:
        _waiting.discard(step)
    if not has_place:
        waits = random.uniform(1, 2 + len(_waiting))  # noqa: S311  # spreads them; nothing is guessed from it
        return executor.defer(
            worker, step, round(waits * PUT_OFF_EACH_MS), "as many steps as may are executed alone already"
        )
    try:
        said = _in_a_process(worker, step, pipeline_hash)
    finally:
        _places.release()
    if said is None:
        # The sweep sees its death as any other, and counts it.
        return Result("stale")
    result = json.loads(said)
    return Result(result["state"], tuple(result["ready"]), result["error"])


def _in_a_process(worker: "Worker", step: StepKey, pipeline_hash: str) -> bytes | None:
    ours, theirs = _processes.Pipe(duplex=False)
    process = _processes.Process(
        name="stepfast-alone",
        target=_main,
        args=(theirs, worker.worker_id, str(step.run_id), step.agent, pipeline_hash),
    )
    with _starting:
        process.start()
    theirs.close()
    assert process.pid is not None
    worker.children.add(process.pid)
    events.emit(Event.STEP_ALONE, pid=process.pid)
    try:
        # Not the pipe's end alone: what the handler forked may hold that open.
        wait([ours, process.sentinel])
        return ours.recv_bytes(RESULT_MAX_BYTES) if ours.poll() else None
    except EOFError:
        return None
    finally:
        ours.close()
        with _starting:
            process.join()


def _main(told: "Connection", parent_id: int, run_id: str, agent: str, pipeline_hash: str) -> None:
    """What such a process does."""
    threading.Thread(target=_end_with_parent, name="stepfast-parent", daemon=True).start()
    logs.setup(settings.load())
    worker = workers.start_child(parent_id)
    result = executor.execute(worker, StepKey(UUID(run_id), agent), pipeline_hash)
    workers.stop()
    traces.stop()
    told.send_bytes(json.dumps(asdict(result)).encode())


def _end_with_parent() -> None:
    """A worker that is killed takes its children along, as prefork's does. Nobody else would end them."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
