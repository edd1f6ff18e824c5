"""Absurd: `absurd_tasks.py setup`, RUNS PROCESSES CONCURRENCY, or as a worker: worker CONCURRENCY.

A worker claims whole runs, in batches, and commits each step: no step passes from one worker to another.
"""

import sys
from typing import Any

import absurdctl
import psycopg
import workload
from absurd_sdk import Absurd

# A fifth of its default: how long a waiting task may go unseen.
POLL_S = 0.05


def connected() -> Absurd:
    app = Absurd(workload.POSTGRES, queue_name="bench")

    @app.register_task("pipeline")
    def pipeline(_params: Any, ctx: Any) -> dict[str, Any]:  # noqa: ANN401
        state: dict[str, Any] = {}
        for name in workload.AGENTS:
            state[name] = ctx.step(name, lambda name=name: workload.agent(name, state))
        return state

    return app


def main(runs: int, processes: int, concurrency: int) -> None:
    app = connected()
    workload.start_workers([workload.this_script("worker", concurrency)] * processes)
    with psycopg.connect(workload.POSTGRES, autocommit=True) as database:
        ended = "select count(*) from absurd.t_bench where state = 'completed'"

        def await_ended(count: int) -> None:
            workload.until(lambda: database.execute(ended).fetchone() == (count,))

        workload.measure(runs, lambda: app.spawn("pipeline", {}, queue="bench"), await_ended, "absurd-sdk")


if __name__ == "__main__":
    if sys.argv[1] == "setup":
        with psycopg.connect(workload.POSTGRES, autocommit=True) as database:
            database.execute(absurdctl.BUNDLED_SCHEMA_SQL)
        connected().create_queue("bench")
    elif sys.argv[1] == "worker":
        app = connected()
        print(" ready.", flush=True)
        app.start_worker(concurrency=int(sys.argv[2]), poll_interval=POLL_S)
    else:
        main(*map(int, sys.argv[1:]))
