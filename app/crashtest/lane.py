"""One run under one cell, on a database, a virtual host, a simulator and workers of its own.

Several lanes work side by side. A lane is used by one thread: its workers would end with it.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar
from uuid import UUID, uuid4

from app import crashpoints
from app.crashpoints import CrashPoint, Note
from app.crashtest import answers, faults, world
from app.crashtest.cells import OF_NETWORKS, UNDISTURBED, Answers, Cell
from app.crashtest.judge import Seen
from app.crashtest.workers import EACH, Workers, kinds
from app.execution.persistence import through_outage
from app.pipelines.model import Json, Pipeline
from app.runs.invariants import check
from app.runs.orders import Orders
from app.runs.reads import Reads
from app.runs.states import RUN_ENDED, StepState
from app.runs.store import Store
from app.settings import ROOT, variable
from app.simulator.script import Script
from app.simulator.server import Simulator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Engine

    from app.crashtest.proxy import Proxy
    from app.crashtest.servers import Servers

T = TypeVar("T")

# Short, so that a cell takes seconds. All other settings are the usual ones.
LEASE_S = 5
POLL_S = 0.1
# Of an undisturbed run; and of any other, beside five times what that one took.
UNDISTURBED_TIMEOUT_S = 600.0
RUN_TIMEOUT_S = 120.0
OUTAGE_MAX_S = 60
COMMAND_TIMEOUT_S = 60.0
BY = "crashtest"
OF_STARTS = frozenset({CrashPoint.ENQUEUE_BEFORE, CrashPoint.ENQUEUE_AFTER})
OF_COMMANDS = OF_STARTS | {CrashPoint.APPROVE_BEFORE, CrashPoint.APPROVE_AFTER}


@dataclass(frozen=True, slots=True)
class Order:
    """What is crash-tested. `make_world` fills a run's own folder and gives the run's input."""

    pipeline: Pipeline
    good: Script
    make_world: Callable[[Path], Json]
    environ: Mapping[str, str]  # of the workers; the lane adds its servers
    seed: int = 0


class Stopped(Exception):
    """Somebody asked for the end."""


@dataclass(slots=True)
class Playing:
    """What a run's cell has come to. `mended`: the cause of a failure that was ordered is gone, and the run resumed."""

    cell: Cell
    run_id: UUID
    calls: dict[str, int] = field(default_factory=dict)
    mended: bool = False
    problems: list[str] = field(default_factory=list)
    fault: "Iterator[None] | None" = None
    struck_at_s: float | None = None
    dead: set[int] = field(default_factory=set)  # workers that ended


class Lane:
    """Between `with` and its end its workers run."""

    def __init__(self, number: int, order: Order, servers: "Servers", home: Path, stopping: threading.Event) -> None:
        self.number = number
        self.order = order
        self.servers = servers
        self.broker_url = servers.broker_url(number)
        self._home = home / f"lane{number}"
        self._stopping = stopping
        self._orders = self._home / "orders"  # of the crash points
        self._scratch = self._home / "scratch"
        self._count = 0
        self._killed: set[int] = set()
        self._timeout_s = UNDISTURBED_TIMEOUT_S
        self._stack = ExitStack()
        self.proxies: list[Proxy] = []  # of the two workers of each kind, once a network was to be cut

    def __enter__(self) -> Self:
        from app.runs.database import engine

        self._orders.mkdir(mode=0o700, parents=True)
        self._engine: Engine = engine(self.servers.database_url(self.number), pool_max=4)
        self._stack.callback(self._engine.dispose)
        self.store, self._reads, self._people = Store(self._engine), Reads(self._engine), Orders(self._engine)
        self._simulator = self._stack.enter_context(Simulator(seed=self.order.seed))
        self.store.publish(self.order.pipeline)
        self._environ = self._make_environ()
        self.workers = self._start_workers([self._environ, self._environ])
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.workers.stop()
        finally:
            self._stack.close()

    def _make_environ(self) -> dict[str, str]:
        return dict(self.order.environ) | {
            variable("database_url"): self.servers.database_url(self.number),
            variable("broker_url"): self.broker_url,
            variable("home"): str(self._home),
            variable("lease_s"): str(LEASE_S),
            variable("crash_points"): str(self._orders),
            variable("log_format"): "json",
            "ANTHROPIC_BASE_URL": self._simulator.url,
            "ANTHROPIC_API_KEY": "sk-simulated",
        }

    def _start_workers(self, environs: list[dict[str, str]]) -> Workers:
        logs = self._home / f"workers-{self._count}"
        return Workers(self.number, kinds(self.order.pipeline), environs, logs)

    def _go_through_proxies(self) -> None:
        """Starts the workers anew, each of the two of a kind on its own way to the database."""
        ways = [self._stack.enter_context(self.servers.proxy(self.number)) for _ in range(EACH)]
        self.proxies = [proxy for proxy, _ in ways]
        self.workers.stop()
        self.workers = self._start_workers([self._environ | {variable("database_url"): url} for _, url in ways])

    # One cell.

    def play(self, cell: Cell) -> Seen:
        """A run from its start to its end, with what the cell does to it. Raises NotReady, Stopped."""
        if cell.fault in OF_NETWORKS and not self.proxies:
            self._go_through_proxies()
        self.workers.wait_ready(self._stopping)
        self._count += 1
        for old in self._orders.iterdir():
            old.unlink()
        run_input = self.order.make_world(self._scratch)
        self._simulator.use(answers.script(self.order.pipeline, self.order.good, cell.agent, cell.answers))
        playing = Playing(cell, self._start(cell, run_input))
        if cell.fault:
            playing.fault = faults.FAULTS[cell.fault](self, playing)
        began_s = time.monotonic()
        while not self._is_over(playing):
            if self._stopping.wait(POLL_S):
                raise Stopped
            if time.monotonic() - began_s > self._timeout_s:
                playing.problems.append(f"it did not end within {self._timeout_s:.0f} s")
                self.workers.restart()
                break
        self._look_after_workers(playing)
        if not cell.strikes:
            self._timeout_s = RUN_TIMEOUT_S + 5 * (time.monotonic() - began_s)
        return self._seen(playing)

    def _start(self, cell: Cell, run_input: Json) -> UUID:
        """Starts a run as an application does that only speaks SQL. A command that dies first is typed again."""
        name, key, run_id = self.order.pipeline.name, f"{BY}-{self._count}", uuid4()
        tenant = key  # keys of one run's steps must not meet another's
        by_command = bool(OF_STARTS & set(cell.strikes))
        for point in cell.strikes:
            run = "" if by_command else str(run_id)
            crashpoints.arm(self._orders, point, cell.agent, run, stops=cell.fault is not None)
        if by_command:
            tenant = "default"
            file = self._home / "input.json"
            file.write_text(json.dumps(run_input))
            self._command("run", name, "--input", f"@{file}", "--key", key)
        with faults.around_start(self, cell, run_id):
            started, _ = self._patiently(
                lambda: self.store.enqueue(name, run_input, key=key, tenant=tenant, run_id=run_id)
            )
        return started

    def _command(self, *arguments: str) -> None:
        """A command of ours, as a process that may be killed."""
        subprocess.run(  # noqa: S603  # our own program
            [sys.executable, "-c", "from app.cli.main import main; raise SystemExit(main())", *arguments],
            cwd=ROOT,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )

    def _is_over(self, playing: Playing) -> bool:
        """Looks once: gives the approvals that are asked for, mends what was to fail, and goes on with the fault."""
        self._look_after_workers(playing)
        run = self.run(playing)
        waiting = [step["agent"] for step in run["steps"] if step["state"] == StepState.SUSPENDED]
        if waiting:
            self._approve(playing, waiting[0])
            return False
        if playing.fault:
            try:
                next(playing.fault)
            except StopIteration:
                playing.fault = None
            return False
        if run["state"] not in RUN_ENDED or not self._all_struck(playing.cell):
            return False
        if playing.cell.answers == Answers.FAILS and not playing.mended:
            self._mend(playing)
            return False
        # Which points there are is read from what this run noted: its last message is acknowledged after it has ended.
        return playing.cell != UNDISTURBED or self._all_acknowledged()

    def _approve(self, playing: Playing, agent: str) -> None:
        if self._unstruck(playing.cell) & OF_COMMANDS:
            self._command("approve", str(playing.run_id), agent, "--yes")
            return
        self._patiently(
            lambda: self._people.decide(playing.run_id, agent, approved=True, digest=None, by=BY, reason=None)
        )

    def _mend(self, playing: Playing) -> None:
        """Once the dead letter is on the broker: what a person does who has mended the cause."""
        letters = self._patiently(lambda: self._reads.dead_letter_list(limit=1))
        if letters and letters[0]["published_at"] is None:
            return
        if not letters:
            playing.problems.append("no dead letter was left")
        playing.calls = self._calls()
        self._simulator.use(answers.script(self.order.pipeline, self.order.good, playing.cell.agent, Answers.GOOD))
        playing.mended = True
        self._patiently(lambda: self._people.resume(playing.run_id, BY))

    def _look_after_workers(self, playing: Playing) -> None:
        # Also those of the cell before: a process may take longer to die than its run to end.
        self._killed |= {note.pid for note in self.notes() if note.struck}
        for worker in self.workers.replace_dead():
            playing.dead.add(worker.process.pid)
            if worker.process.pid not in self._killed:
                playing.problems.append(f"a worker ended by itself: {worker.log}")

    # What is looked at.

    def run(self, playing: Playing) -> Json:
        """The run as `show --json` gives it."""
        return self._patiently(lambda: self._reads.run(playing.run_id))

    def has_ended(self, playing: Playing) -> bool:
        return self.run(playing)["state"] in RUN_ENDED

    def notes(self) -> list[Note]:
        return crashpoints.notes(self._orders)

    def _all_struck(self, cell: Cell) -> bool:
        return not self._unstruck(cell)

    def _all_acknowledged(self) -> bool:
        """Whether a message of each agent that took one is acknowledged."""
        noted = self.notes()
        taken, acknowledged = (
            {note.agent for note in noted if note.point == point}
            for point in (CrashPoint.CLAIM_BEFORE, CrashPoint.ACK_AFTER)
        )
        return taken <= acknowledged

    def _unstruck(self, cell: Cell) -> set[CrashPoint]:
        return {point for point in cell.strikes if (self._orders / f"{point.label}:{cell.agent}").exists()}

    def _calls(self) -> dict[str, int]:
        return answers.calls(self.order.pipeline, self._simulator.state()["rules"])

    def _seen(self, playing: Playing) -> Seen:
        notes = self.notes()
        strikes = [note for note in notes if note.struck]
        events = self._patiently(lambda: self._reads.event_list(playing.run_id))
        at_s = playing.struck_at_s or (strikes[-1].at_s if strikes else None)
        calls = self._calls()
        return Seen(
            run=self.run(playing),
            events=events,
            notes=notes,
            calls={agent: count + playing.calls.get(agent, 0) for agent, count in calls.items()},
            left=world.left(self._scratch),
            struck=self._all_struck(playing.cell),
            died=self._who(playing, strikes),
            recovered_s=None if at_s is None else recovered_s(events, at_s),
            violations=self._patiently(lambda: self._violations(playing.run_id)),
            problems=playing.problems,
        )

    def _who(self, playing: Playing, strikes: list[Note]) -> str:
        if playing.cell.fault or not strikes:
            return ""
        of_workers = playing.dead | {worker.process.pid for worker in self.workers.running}
        return ", ".join(
            "command" if note.point in OF_COMMANDS else "worker" if note.pid in of_workers else "child"
            for note in strikes
        )

    def _violations(self, run_id: UUID | None = None) -> list[str]:
        with self._engine.connect() as connection:
            return [f"{found.rule}: {found.agent or 'run'}: {found.sentence}" for found in check(connection, run_id)]

    def whole_database(self) -> list[str]:
        """What contradicts the rules in all runs of this lane together."""
        return self._patiently(self._violations)

    def _patiently(self, call: Callable[[], T]) -> T:
        """Through the outages of Postgres that we cause ourselves."""
        return through_outage(call, max_s=OUTAGE_MAX_S)


def recovered_s(events: list[Json], at_s: float) -> float | None:
    """Seconds from a death until something of the run was done again; None where nothing was left to do."""
    for event in events:
        happened_s = datetime.fromisoformat(event["at"]).timestamp()
        if happened_s > at_s and event["name"] in {"step.claimed", "step.completed", "run.completed", "run.failed"}:
            return happened_s - at_s
    return None
