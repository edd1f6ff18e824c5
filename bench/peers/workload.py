"""The one workload of every side, and how it is timed. The standard library alone: each side has its own packages.

Runs of four agents in a row. Each agent is handed what all before it gave, in the side's own way, lasts BENCH_LLM_MS
(0 measures the engine alone) and gives 550 bytes.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

AGENTS = ("a", "b", "c", "d")
# So many runs go first, untimed: imports, connections, plans.
WARM_RUNS = 20
POLL_S = 0.02
READY_TIMEOUT_S = 60.0

LLM_S = float(os.environ.get("BENCH_LLM_MS", "0")) / 1000
POSTGRES = os.environ.get("BENCH_POSTGRES", "")
BROKER = os.environ.get("BENCH_BROKER", "")
HOME = Path(os.environ.get("BENCH_HOME", "."))
# From when it is there, runs count.
GO = HOME / "go"


def agent(name: str, before: dict[str, Any]) -> dict[str, Any]:
    """One agent's output. Refuses to go on without the outputs of all agents before it."""
    assert set(before) == set(AGENTS[: AGENTS.index(name)]), f"{name} was handed {sorted(before)}"
    if LLM_S and GO.exists():
        time.sleep(LLM_S)
    return {"confidence": 0.9, "approved": True, "text": "x" * 500}


def until(check: Callable[[], bool], timeout_s: float = READY_TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Not within {timeout_s:.0f} s.")
        time.sleep(POLL_S)


def start_workers(commands: Sequence[Sequence[str]], **options: Any) -> None:  # noqa: ANN401  # Popen's
    """Starts worker processes and waits until each has written ` ready.` Whoever started us ends them, as our group."""
    logs = []
    for number, command in enumerate(commands):
        log = HOME / f"worker-{number}.log"
        with log.open("wb") as stream:
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, **options)
        logs.append(log)
    until(lambda: all(b" ready." in log.read_bytes() for log in logs))


def this_script(*arguments: object) -> list[str]:
    """The command that runs the side's script once more, as a worker."""
    return [sys.executable, sys.argv[0], *map(str, arguments)]


def measure(runs: int, start: Callable[[], object], await_ended: Callable[[int], object], *packages: str) -> None:
    """Times so many runs from the first start to the last end. `await_ended` returns when as many runs have ended."""
    for _ in range(WARM_RUNS):
        start()
    await_ended(WARM_RUNS)
    GO.touch()
    began = time.perf_counter()
    for _ in range(runs):
        start()
    sent = time.perf_counter()
    await_ended(WARM_RUNS + runs)
    report(runs, time.perf_counter() - began, sent - began, *packages)


def report(runs: int, wall_s: float, sent_s: float, *packages: str) -> None:
    """What bench/against.py reads."""
    versions = {name: importlib.metadata.version(name) for name in packages}
    found = {"runs": runs, "wall_s": round(wall_s, 3), "sent_s": round(sent_s, 3), "versions": versions}
    (HOME / "result.json").write_text(json.dumps(found))
