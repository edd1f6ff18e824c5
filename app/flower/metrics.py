"""Stepfast's part of Flower's /metrics: from Postgres, so that it is the same from every Flower, and after a restart.

Each scrape asks Postgres once, beside Tornado's loop; scrapes at the same time share the answer. /metrics is open to
whoever reaches Flower, so nothing of it tells a cost, a tenant, an input or an output.
"""

import asyncio
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from flower.views import monitor
from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from app.execution import queues, worker
from app.pipelines.model import Queue
from app.runs.health import Health
from app.runs.metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from prometheus_client import Metric

    from app.execution.worker import Worker
    from app.runs.metrics import Total

FRESH_S = 2.0
# Prometheus gives up after 10 s, by default.
ANSWER_MAX_S = 8.0
# The search for stuck runs looks at every run that has not ended.
STUCK_PERIOD_S = 60.0
_STEPS_LE = "step_seconds_le_"

_COUNTERS = {
    "runs_ended": ("Runs that completed, failed or were cancelled; once each time.", ("pipeline", "state")),
    "retries": ("Attempts that failed and are made again.", ("pipeline", "agent")),
    "rescues": ("Steps that were taken from a worker that died or froze.", ("pipeline", "agent")),
    "dead_letters": ("Steps that were given up.", ("pipeline", "agent", "code")),
}


class Collector:
    """What prometheus_client asks. It is asked in Tornado's loop, and gives what was read before."""

    def __init__(self) -> None:
        self._reading: asyncio.Future[None] | None = None
        self._read_at_s = 0.0
        self._found: Sequence[Metric] = ()
        self._stuck: tuple[float, int] | None = None  # when it was looked for, and how many were found

    def collect(self) -> "Iterator[Metric]":
        yield GaugeMetricFamily("stepfast_up", "Whether Postgres answered for the metrics.", value=bool(self._found))
        yield from self._found

    async def refresh(self) -> None:
        """Reads, unless that was done just now. What takes too long is left out, and may be there next time."""
        if self._reading is None or (self._reading.done() and time.monotonic() - self._read_at_s > FRESH_S):
            self._found = ()
            self._reading = asyncio.get_running_loop().run_in_executor(None, self._read)
        await asyncio.wait({self._reading}, timeout=ANSWER_MAX_S)

    def _read(self) -> None:
        try:
            current = worker.current()
            metrics = Metrics(current.store.engine)
            behind_s = metrics.count()
            standing = metrics.standing()
            # Counts that lag would seem to jump, later: they are left out until they are whole.
            counted = list(_counts(metrics.totals())) if behind_s == 0 else []
            stuck = self._count_stuck(current, {label for name, label in standing if name == "queue_age"})
            self._found = [*_gauges(standing, behind_s, stuck), *counted]
        except Exception:  # noqa: BLE001  # whatever it is, /metrics must answer: stepfast_up says so
            self._found = ()
        self._read_at_s = time.monotonic()

    def _count_stuck(self, current: "Worker", waited_for: set[str]) -> int:
        now_s = time.monotonic()
        if self._stuck is None or now_s - self._stuck[0] > STUCK_PERIOD_S:
            busy = waited_for - set(queues.empty_queues(waited_for))
            found = Health(current.store.engine).stuck(busy=busy, limit=1)
            self._stuck = (now_s, found[0]["runs"] if found else 0)
        return self._stuck[1]


def _gauges(standing: dict[tuple[str, str], float], behind_s: float, stuck: int) -> "Iterator[Metric]":
    runs = GaugeMetricFamily("stepfast_runs", "Runs that have not ended, and failed ones.", labels=["state"])
    steps = GaugeMetricFamily("stepfast_steps", "Steps that execute, or wait for a time or a worker.", labels=["state"])
    letters = GaugeMetricFamily("stepfast_dead_letters_open", "Dead letters that wait for somebody.", labels=["code"])
    age = GaugeMetricFamily(
        "stepfast_queue_age_seconds", "How long the oldest step of a queue has waited for a worker.", labels=["queue"]
    )
    for queue in Queue:
        standing.setdefault(("queue_age", queue), 0.0)
    families = {"runs": runs, "steps": steps, "letters": letters, "queue_age": age}
    for (name, label), value in standing.items():
        if name in families:
            families[name].add_metric([label], value)
    yield from families.values()
    single = {
        "stepfast_approvals_waiting": ("Requests that wait for a person.", standing["approvals", ""]),
        "stepfast_workers": ("Processes with a live lease that execute steps.", standing["workers", ""]),
        "stepfast_runs_stuck": ("Runs that nothing will move, as `stepfast doctor` finds them.", stuck),
        "stepfast_counters_behind_seconds": (
            "What the counters still have to count; until then they are absent.",
            behind_s,
        ),
    }
    for name, (documentation, value) in single.items():
        yield GaugeMetricFamily(name, documentation, value=value)


def _counts(totals: "Iterable[Total]") -> "Iterator[Metric]":
    by_metric: defaultdict[str, list[Total]] = defaultdict(list)
    for total in totals:
        by_metric[total.metric].append(total)
    for metric, (documentation, labels) in _COUNTERS.items():
        family = CounterMetricFamily(f"stepfast_{metric}", documentation, labels=labels)
        for row in by_metric[metric]:
            named = {"pipeline": row.pipeline, "agent": row.agent, "state": row.label, "code": row.label}
            family.add_metric([named[label] for label in labels], row.total)
        yield family
    tokens = CounterMetricFamily("stepfast_tokens", "Tokens of paid calls.", labels=["model", "direction"])
    for direction in ("input", "output"):
        for row in by_metric[f"tokens_{direction}"]:
            tokens.add_metric([row.label, direction], row.total)
    yield tokens
    yield _durations(by_metric)


def _durations(by_metric: "dict[str, list[Total]]") -> "Metric":
    """Of steps that completed."""
    family = HistogramMetricFamily(
        "stepfast_step_duration_seconds", "How long completed attempts took.", labels=["pipeline", "agent"]
    )
    limits = sorted(float(name.removeprefix(_STEPS_LE)) for name in by_metric if name.startswith(_STEPS_LE))
    counts = {
        (row.pipeline, row.agent, float(name.removeprefix(_STEPS_LE))): row.total
        for name, rows in by_metric.items()
        if name.startswith(_STEPS_LE)
        for row in rows
    }
    for row in by_metric["step_seconds_sum"]:
        buckets = [
            ("+Inf" if limit == float("inf") else str(limit), counts.get((row.pipeline, row.agent, limit), 0.0))
            for limit in limits
        ]
        family.add_metric([row.pipeline, row.agent], buckets=buckets, sum_value=row.total)
    return family


_collector = Collector()


class MetricsView(monitor.Metrics):
    async def get(self) -> None:
        await _collector.refresh()
        await super().get()


def register() -> None:
    """Adds what is collected here to whatever Flower exports."""
    REGISTRY.register(_collector)
