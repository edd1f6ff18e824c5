"""`python bench/waiting.py`: what 1,000 runs cost that all wait for a model at once, on private servers.

Each has four agents, each call takes 10 s at the simulator, which shares this machine's cores: 40 s, were all the rest
nothing. Goals stand beside; they are no promises.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import system as systems  # first: it makes our own packages importable
from report import Found, machine, print_all

AGENTS = 4
SAMPLE_S = 1.0
OVER_IDEAL_MAX = 1.2
MEMORY_MAX_MB = 350
CONNECTIONS_MAX = 20


@dataclass(slots=True)
class Most:
    """The most that was seen at any time, of one worker."""

    memory_mb: float = 0.0
    connections: int = 0
    calls: int = 0

    def look(self, system: systems.System) -> None:
        for worker in system.workers:
            self.memory_mb = max(self.memory_mb, sum(memory_mb(pid) for pid in worker.pids()))
        self.connections = max(self.connections, _connections(system) // len(system.workers))
        self.calls = max(self.calls, system.calls_in_flight())


def memory_mb(pid: int) -> float:
    """A process's own memory, and its share of what it shares."""
    found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def _connections(system: systems.System) -> int:
    """Of all workers: each session but ours."""
    return int(
        system.value(
            "select count(*) from pg_stat_activity where backend_type = 'client backend'"
            " and datname = current_database() and application_name not like :ours",
            ours=f"stepfast {os.getpid()}@%",
        )
    )


def waiting(found: Found, system: systems.System, *, runs: int, call_s: float, workers: int) -> None:
    for number in range(workers):
        system.start_worker("threads", runs // workers, ready=number == workers - 1)
    system.await_ready(system.workers)
    system.script(delay_ms=round(1000 * call_s))
    idle_mb = max(sum(memory_mb(pid) for pid in worker.pids()) for worker in system.workers)
    used_s = [systems.cpu_s(worker.pids()) for worker in system.workers]
    began_s = time.monotonic()
    system.start_runs("chain", {}, "waiting-", runs)
    most, ideal_s = Most(), AGENTS * call_s
    while system.ended_runs("waiting-") < runs:
        if time.monotonic() - began_s > 10 * ideal_s + 60:
            raise systems.TookTooLong(f"{system.ended_runs('waiting-')} of {runs} runs ended")
        most.look(system)
        time.sleep(min(SAMPLE_S, call_s / 4))
    took_s = time.monotonic() - began_s
    used_s = [systems.cpu_s(worker.pids()) - before for worker, before in zip(system.workers, used_s, strict=True)]
    found.figures |= {"runs": runs, "workers": workers, "calls in flight, most": most.calls}
    found.goal("wall", took_s, "s", at_most=OVER_IDEAL_MAX * ideal_s)
    found.goal("wall / ideal", took_s / ideal_s, "", at_most=OVER_IDEAL_MAX)
    found.goal("a worker's memory, most", most.memory_mb, "MB PSS", at_most=MEMORY_MAX_MB)
    found.figures["a worker's memory before"] = f"{idle_mb:.2f} MB PSS"
    found.goal("a worker's connections, most", most.connections, "", at_most=CONNECTIONS_MAX)
    found.figures["a worker's processor time a step"] = f"{1000 * sum(used_s) / (AGENTS * runs):.2f} ms"
    calls = system.calls()
    found.count("calls beyond one a step", calls - AGENTS * runs)


def main() -> None:
    parser = argparse.ArgumentParser(prog="waiting", description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000, help="(1,000)")
    parser.add_argument("--call-s", type=float, default=10.0, help="of each call (10)")
    parser.add_argument("--workers", type=int, default=2, help="which share the runs (2: one a processor)")
    given = parser.parse_args()
    found = Found("waiting", "valkey", {"load before": round(os.getloadavg()[0], 1)})
    with (
        tempfile.TemporaryDirectory(prefix="stepfast-waiting-") as home,
        systems.system(Path(home), "valkey", say) as system,
    ):
        waiting(found, system, runs=given.runs, call_s=given.call_s, workers=given.workers)
    found.figures["load after"] = round(os.getloadavg()[0], 1)
    print_all([found], machine())


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
