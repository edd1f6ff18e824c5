"""DBOS, workflows on a queue: `dbos_queue.py setup`, RUNS PROCESSES CONCURRENCY, or as a worker: worker CONCURRENCY."""

import os
import sys
import threading
import time
from typing import Any

import psycopg
import workload
from dbos import DBOS

# A tenth and a fiftieth of its default: how long a waiting workflow may go unseen.
POLL_S = 0.05


@DBOS.step()
def step(name: str, state: dict[str, Any]) -> dict[str, Any]:
    return workload.agent(name, state)


@DBOS.workflow()
def pipeline() -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name in workload.AGENTS:
        state = {**state, name: step(name, state)}
    return state


def launch(concurrency: int, *, only_enqueues: bool) -> None:
    DBOS(
        config={
            "name": "bench",
            "system_database_url": workload.POSTGRES.replace("postgresql://", "postgresql+psycopg://"),
            "log_level": "ERROR",
            "run_admin_server": False,
            "sys_db_pool_size": 20,
            "executor_id": f"bench-{os.getpid()}-{time.time_ns()}",
            "application_version": "1",
        }
    )
    if only_enqueues:
        DBOS.listen_queues([])
    DBOS.launch()
    DBOS.register_queue("bench", worker_concurrency=concurrency, polling_interval_sec=POLL_S)


def main(runs: int, processes: int, concurrency: int) -> None:
    launch(concurrency, only_enqueues=True)
    workload.start_workers([workload.this_script("worker", concurrency)] * processes)
    with psycopg.connect(workload.POSTGRES, autocommit=True) as database:
        ended = "select count(*) from dbos.workflow_status where status = 'SUCCESS'"

        def await_ended(count: int) -> None:
            workload.until(lambda: database.execute(ended).fetchone() == (count,))

        workload.measure(runs, lambda: DBOS.enqueue_workflow("bench", pipeline), await_ended, "dbos")


if __name__ == "__main__":
    if sys.argv[1] == "setup":
        launch(1, only_enqueues=True)
    elif sys.argv[1] == "worker":
        launch(int(sys.argv[2]), only_enqueues=False)
        print(" ready.", flush=True)
        threading.Event().wait()
    else:
        main(*map(int, sys.argv[1:]))
    os._exit(0)  # its threads would stay
