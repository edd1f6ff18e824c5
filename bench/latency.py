"""`make latency`: how long runs wait for us and not for a model, what an idle worker costs, how soon commands answer.

On private servers, with one real worker and the simulator, one run at a time. Goals stand beside; they are no promises.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import system as systems  # first: it makes our own packages importable
from report import Found, machine, print_all, quantile
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from standing import idle
from stepfast import Client

if TYPE_CHECKING:
    from collections.abc import Callable

COMMANDS = {"--help": 0.3, "runs": 0.8}
WARM_UP_RUNS = 10
# An agent that comes while a sweep is at work waits for it: runs start at any time between two.
PAUSE_MAX_S = 0.1


def waits(found: Found, system: systems.System, *, runs: int) -> None:
    """From a start to the first request at the model, and from each commit to the next request."""
    system.start_worker("threads", 8)
    url = system.environ["STEPFAST_DATABASE_URL"]
    client = Client(url, system.environ["STEPFAST_BROKER_URL"])
    host = create_engine(url)

    def in_a_transaction(key: str) -> None:
        with Session(host) as session, session.begin():
            client.enqueue("chain", {}, key=key, connection=session)

    starts: dict[str, Callable[[str], object]] = {
        "operations.start": lambda key: system.start_run("chain", {}, key),
        "stepfast.enqueue": in_a_transaction,
        "stepfast.enqueue, connecting": lambda key: client.enqueue("chain", {}, key=key),
    }
    first: dict[str, list[float]] = {name: [] for name in starts}
    later: list[float] = []
    for number in range(WARM_UP_RUNS + runs):
        for name, start in starts.items():
            key = f"{name} {number}"
            system.script(delay_ms=0)
            time.sleep(random.uniform(0, PAUSE_MAX_S))
            began_s = time.time()
            start(key)
            time.sleep(0.1)  # rather than ask all the time, which would disturb
            systems.eventually(lambda key=key: system.ended_runs(key), within_s=30, what="a run's end")  # type: ignore[misc]
            if number >= WARM_UP_RUNS:
                commits_s, arrivals_s = _commits_s(system, key), system.arrivals()
                assert len(commits_s) == len(arrivals_s)
                first[name].append(1000 * (arrivals_s[0] - began_s))
                later += [1000 * (at - before) for before, at in zip(commits_s, arrivals_s[1:], strict=False)]
    host.dispose()
    for name, spent in first.items():
        _beside_goals(found, f"{name} to the first request", spent, p50=15, p99=40)
    _beside_goals(found, "step.completed to the next request", later, p50=8)


def _commits_s(system: systems.System, key: str) -> list[float]:
    """When each step's result was written. The commit comes after it, and counts as waiting."""
    rows = system.rows(
        "select extract(epoch from e.at) as at_s from stepfast.events e join stepfast.runs r on r.id = e.run_id"
        " where r.key = :key and e.name = 'step.completed' order by e.seq",
        key=key,
    )
    return [float(row.at_s) for row in rows]


def _beside_goals(found: Found, name: str, spent_ms: list[float], *, p50: float, p99: float | None = None) -> None:
    spent_ms.sort()
    found.figures[f"{name}, samples"] = len(spent_ms)
    found.goal(f"{name}, p50", quantile(spent_ms, 0.5), "ms", at_most=p50)
    if p99 is None:
        found.figures[f"{name}, p99"] = f"{quantile(spent_ms, 0.99):,.2f} ms"
    else:
        found.goal(f"{name}, p99", quantile(spent_ms, 0.99), "ms", at_most=p99)


def commands(found: Found, system: systems.System, *, times: int) -> None:
    """How soon commands answer, with everything in the file system's cache."""
    for command, goal_s in COMMANDS.items():
        argv = [Path(sys.executable).with_name("stepfast"), command]
        spent: list[float] = []
        for _ in range(1 + times):
            began_s = time.perf_counter()
            subprocess.run(argv, env=system.environ, stdout=subprocess.DEVNULL, check=True)
            spent.append(time.perf_counter() - began_s)
        found.goal(f"stepfast {command}, p50 of {times}", statistics.median(spent[1:]), "s", at_most=goal_s)


def main() -> None:
    parser = argparse.ArgumentParser(prog="latency", description=__doc__)
    parser.add_argument("--part", action="append", choices=("waits", "idle", "commands"), help="these only")
    parser.add_argument("--short", action="store_true", help="a small form of each")
    given = parser.parse_args()
    short = given.short
    parts: dict[str, Callable[[Found, systems.System], None]] = {
        "waits": lambda *of: waits(*of, runs=2 if short else 200),
        "idle": lambda *of: idle(*of, runs=100 if short else 2_000, seconds=1 if short else 30),
        "commands": lambda *of: commands(*of, times=1 if short else 10),
    }
    results = []
    with ExitStack() as homes:
        for name in given.part or parts:
            home = Path(homes.enter_context(tempfile.TemporaryDirectory(prefix="stepfast-latency-")))
            found = Found(name, "valkey", {"load before": round(os.getloadavg()[0], 1)})
            with systems.system(home, found.broker, say) as system:
                parts[name](found, system)
            found.figures["load after"] = round(os.getloadavg()[0], 1)
            results.append(found)
    print_all(results, machine())


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
