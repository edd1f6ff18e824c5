"""What one call costs: processor time of the session that it goes to, and time on the wall."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from statistics import median
from uuid import UUID, uuid4

from sqlalchemy import text

from app.pipelines.model import Pipeline
from app.runs.database import engine
from app.runs.metrics import SERIES_MAX, SLICE_MS
from app.runs.prune import Pruning
from app.runs.reads import Reads
from app.runs.report import report
from app.runs.store import Bid, Ending, Paid, StepKey, Store

ERROR = {"code": "broken", "who": "retry", "message": "It broke.", "next_step": "", "details": {}}
LEASE_MS = 10_000
GRACE_MS = 500
RESEND_MS = 2_000
SWEEP_MAX = 100
# Runs a round: what is measured is a group of as many calls.
GROUP = 8
PRUNE_BATCHES = 5


def ran_ns(pid: int) -> int:
    """How long a process was on a processor; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])
    except (FileNotFoundError, ProcessLookupError):
        return 0


@dataclass(slots=True)
class Costs:
    """Milliseconds a call, by name: of the session's processor, and on the wall."""

    cpu: dict[str, list[float]] = field(default_factory=dict)
    wall: dict[str, list[float]] = field(default_factory=dict)

    def cpu_ms(self, name: str) -> float:
        return median(self.cpu[name])

    def wall_ms(self, name: str) -> float:
        return median(self.wall[name])


class Caller:
    """One session, which does what workers and people do; its runs are finished, with nobody else at them."""

    def __init__(self, url: str, pipeline: Pipeline, make_id: Callable[[], UUID] = uuid4) -> None:
        self.store = Store(engine(url, pool_max=1, name="bench"))
        self.pipeline = pipeline
        self.make_id = make_id
        self.costs = Costs()
        self.pid = self._value("select pg_backend_pid()")
        self.worker_id = self._value(
            "insert into stepfast.workers (host, pid, code_version, started_at, lease_until, has_session)"
            " values ('bench', 1, 1, stepfast.now(), stepfast.now() + interval '1 day', false) returning id"
        )

    def close(self) -> None:
        self._value(f"update stepfast.workers set ended_at = stepfast.now() where id = {self.worker_id} returning 1")
        self.store.engine.dispose()

    def _value(self, statement: str) -> int:
        with self.store.engine.connect() as connection:
            return int(connection.execute(text(statement)).scalar_one())

    @contextmanager
    def _measured(self, name: str, calls: int) -> Iterator[None]:
        time.sleep(0.001)  # the session is asleep again: what it used is written down when it stops
        began_ns, began_s = ran_ns(self.pid), time.perf_counter()
        yield
        wall_s = time.perf_counter() - began_s
        time.sleep(0.001)
        self.costs.cpu.setdefault(name, []).append((ran_ns(self.pid) - began_ns) / calls / 1e6)
        self.costs.wall.setdefault(name, []).append(wall_s / calls * 1e3)

    def steps(self) -> None:
        """A group of runs from their start to their end, with what a worker asks beside it."""
        ids = [self.make_id() for _ in range(GROUP)]
        with self._measured("enqueue_v1", GROUP):
            for run_id in ids:
                self.store.enqueue(self.pipeline.name, {}, run_id=run_id)
        with self._measured("take_unsent_v1", GROUP):
            for run_id in ids:
                self.store.take_unsent(run_id, SWEEP_MAX)
        for agent in self.pipeline.agents:
            bids = [self._bid(run_id, agent.id) for run_id in ids]
            with self._measured("claim_v1", GROUP):
                outcomes = {self.store.claim(bid).outcome for bid in bids}
            with self._measured("complete_v1", GROUP):
                outcomes |= {self.store.complete(b.step, b.attempt_id, {"by": agent.id}, Paid()).outcome for b in bids}
            assert outcomes == {"claimed", "completed"}, outcomes
        with self._measured("sweep_v1", GROUP):
            for _ in ids:
                self.store.sweep(lease_ms=LEASE_MS, grace_ms=GRACE_MS, resend_ms=RESEND_MS, limit=SWEEP_MAX)
        with self._measured("count_events_v1", 1):
            self._value(f"select stepfast.count_events_v1(0, {SLICE_MS}, {SERIES_MAX})")

    def reads(self) -> None:
        """What people ask."""
        reads = Reads(self.store.engine)
        newest = UUID(reads.run_list(limit=1)[0]["id"])
        asked: dict[str, Callable[[], object]] = {
            "runs": lambda: reads.run_list(limit=20),
            "runs --state failed": lambda: reads.run_list(limit=20, state="failed"),
            "runs --state suspended": lambda: reads.run_list(limit=20, state="suspended"),
            "runs --label team=b": lambda: reads.run_list(limit=20, labels={"team": "b"}),
            "a run by 20 digits": lambda: reads.run_id(newest.hex[:20]),
            "show": lambda: (reads.run(newest), reads.event_list(newest)),
            "Flower's list, newest page": lambda: reads.run_list(limit=51),
            "Flower's list, next page": lambda: reads.run_list(limit=51, before=newest),
            "dead": lambda: reads.dead_letter_groups(limit=20),
            "dead list": lambda: reads.dead_letter_list(limit=20),
            "report --since 1h": lambda: report(self.store.engine, since=timedelta(hours=1), pipeline=None),
            f"prune --dry-run, {PRUNE_BATCHES} batches": self._prune,
        }
        for name, ask in asked.items():
            with self._measured(name, 1):
                ask()

    def _prune(self) -> None:
        for _ in islice(Pruning(self.store.engine, timedelta(0)).batches(dry_run=True), PRUNE_BATCHES):
            pass

    def template(self, *, key: str | None = None, labels: dict[str, str] | None = None, fails: int = 0) -> UUID:
        """A finished run: its third agent fails so often; the third time it is given up."""
        run_id, _ = self.store.enqueue(self.pipeline.name, {}, key=key, labels=dict(labels or {}))
        self.store.take_unsent(run_id, SWEEP_MAX)
        for number, agent in enumerate(self.pipeline.agents):
            for attempt in range(fails if number == 2 else 0):
                bid = self._bid(run_id, agent.id)
                self.store.claim(bid)
                ending = Ending("discard") if attempt == 2 else Ending("retry", retry_ms=0)
                self.store.fail(bid.step, bid.attempt_id, dict(ERROR), Paid(), ending)
                if attempt == 2:
                    return run_id
                self.store.sweep(lease_ms=LEASE_MS, grace_ms=GRACE_MS, resend_ms=RESEND_MS, limit=SWEEP_MAX)
            bid = self._bid(run_id, agent.id)
            assert self.store.claim(bid).outcome == "claimed"
            self.store.complete(bid.step, bid.attempt_id, {"by": agent.id, "text": "words " * 40}, Paid())
        return run_id

    def _bid(self, run_id: UUID, agent: str) -> Bid:
        return Bid(
            StepKey(run_id, agent),
            self.pipeline.by_id[agent],
            self.pipeline.hash,
            uuid4(),
            self.worker_id,
            60_000,
            1_000,
            repeatable=True,
        )
