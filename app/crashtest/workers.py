"""The workers of a lane: real processes, two of each kind that the pipeline needs, so that one can take over."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from app.errors import NotReady
from app.pipelines.model import Pipeline, Queue
from app.settings import ROOT

READY_TIMEOUT_S = 120.0
POLL_S = 0.05
LOG_TAIL_MAX_BYTES = 2_000
EACH = 2
THREADS, PROCESSES = 8, 2
_FOLLOWER = ROOT / "app" / "with_parent.py"


@dataclass(frozen=True, slots=True)
class Kind:
    """As the Procfile has it: what waits for a network in threads, what touches the machine in processes."""

    name: str
    queues: str
    pool: str
    concurrency: int


def kinds(pipeline: Pipeline) -> list[Kind]:
    queues = {str(agent.queue) for agent in pipeline.agents}
    waiting = queues - {Queue.HANDLERS}
    found = [Kind("agents", ",".join(sorted(waiting)), "threads", THREADS)] if waiting else []
    return [*found, Kind("handlers", Queue.HANDLERS, "prefork", PROCESSES)] if Queue.HANDLERS in queues else found


@dataclass(slots=True)
class Worker:
    kind: Kind
    process: subprocess.Popen[bytes]
    log: Path
    slot: int  # among those of its kind

    @property
    def is_ready(self) -> bool:
        return b" ready." in self.log.read_bytes()

    def log_tail(self) -> str:
        return self.log.read_bytes()[-LOG_TAIL_MAX_BYTES:].decode(errors="replace").strip()


class Workers:
    """Starts them, each in a session of its own, and puts a fresh one in the place of one that died.

    All is done from one thread: on Linux they end with the thread that started them, should we be killed. `environs`
    are those of the two workers of each kind.
    """

    def __init__(self, lane: int, found: Iterable[Kind], environs: Sequence[Mapping[str, str]], logs: Path) -> None:
        assert len(environs) == EACH
        self._lane = lane
        self._environs = environs
        self._logs = logs
        self._kinds = list(found)
        self._started = 0
        self.running: list[Worker] = []
        logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.restart()

    def restart(self) -> None:
        """Fresh ones, in place of all that there are."""
        self.stop()
        for kind in self._kinds:
            for slot in range(EACH):
                self._start(kind, slot)

    def _start(self, kind: Kind, slot: int) -> None:
        self._started += 1
        log = self._logs / f"{kind.name}-{self._started}.log"
        follow = (sys.executable, "-I", "-S", str(_FOLLOWER), str(os.getpid()))
        name = f"crash{os.getpid()}-{self._lane}-{kind.name}-{self._started}@%h"
        with log.open("wb") as stream:
            process = subprocess.Popen(  # noqa: S603  # our own program
                [
                    *(*follow, sys.executable, "-m", "celery", "-A", "app", "worker", "-n", name, "-Q", kind.queues),
                    *("-P", kind.pool, "-c", str(kind.concurrency), "--without-mingle", "--without-gossip"),
                ],
                cwd=ROOT,
                env=dict(self._environs[slot]),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        self.running.append(Worker(kind, process, log, slot))

    def replace_dead(self) -> list[Worker]:
        """Starts a fresh worker for each that ended, and returns those that did."""
        dead = [worker for worker in self.running if worker.process.poll() is not None]
        for worker in dead:
            _kill(worker)  # what is left of its group: a prefork parent's children
            self.running.remove(worker)
            self._start(worker.kind, worker.slot)
        return dead

    def wait_ready(self, stopping: threading.Event) -> None:
        """Until each takes messages. Raises NotReady where one ends or takes too long."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while waiting := [worker for worker in self.running if not worker.is_ready]:
            ended = [worker for worker in waiting if worker.process.poll() is not None]
            if ended or time.monotonic() > deadline:
                worker = (ended or waiting)[0]
                what = "ended" if ended else "was not ready in time"
                raise NotReady(f"A worker {what}; the end of its log:\n{worker.log_tail()}\n")
            if stopping.wait(POLL_S):
                return

    def of(self, pid: int) -> Worker:
        """The worker that a process is, or is a child of."""
        group = os.getpgid(pid)
        return next(worker for worker in self.running if worker.process.pid == group)

    def signal(self, number: signal.Signals) -> None:
        """To every process of every worker."""
        for worker in self.running:
            with suppress(ProcessLookupError):
                os.killpg(worker.process.pid, number)

    def stop(self) -> None:
        """At once: whatever they still held is nobody's any more."""
        for worker in self.running:
            _kill(worker)
        self.running.clear()


def _kill(worker: Worker) -> None:
    with suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
