"""A plain Celery chain, results on Redis, task events on: `celery_chain.py setup`, or RUNS PROCESSES THREADS.

Acknowledges late, as whoever cares for a lost worker sets it. Nothing is durable: it is the floor under all that is
built on Celery.
"""

import os
import sys
from pathlib import Path
from typing import Any

import workload
from celery import Celery, chain
from celery.signals import worker_ready

app = Celery("celery_chain", broker=workload.BROKER, backend=workload.BROKER)
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
    worker_send_task_events=True,
    task_send_sent_event=True,
    worker_hijack_root_logger=False,
)


@app.task(name="agent")
def agent(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {**state, name: workload.agent(name, state)}


@worker_ready.connect
def _say_so(**_: object) -> None:
    os.write(1, b" ready.\n")  # what is printed, Celery logs as a warning


def main(runs: int, processes: int, threads: int) -> None:
    celery = [sys.executable, "-m", "celery", "-A", "celery_chain", "worker", "--without-mingle", "--without-gossip"]
    pool = ["-P", "threads", "-c", str(threads), "-E", "-l", "ERROR"]
    commands = [[*celery, *pool, "-n", f"bench-{number}@%h"] for number in range(processes)]
    workload.start_workers(commands, cwd=Path(__file__).parent)
    first, *others = workload.AGENTS
    results = []

    def start() -> None:
        results.append(chain(agent.s({}, first), *(agent.s(name) for name in others)).apply_async())

    def await_ended(_count: int) -> None:
        while results:
            results.pop().get(timeout=workload.READY_TIMEOUT_S)

    workload.measure(runs, start, await_ended, "celery", "redis", "hiredis")


if __name__ == "__main__" and sys.argv[1] != "setup":
    main(*map(int, sys.argv[1:]))
