"""LangGraph + PostgresSaver: `langgraph_saver.py setup`, RUNS PROCESSES THREADS, or as a worker: worker RUNS THREADS.

It has no queue and no workers: each process is given its share of the runs. A step's checkpoint is committed before the
next one begins (durability "sync"), as on the other sides. A saver serves one thread at a time, so each thread has one.
"""

import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import workload
from langgraph.checkpoint.postgres import PostgresSaver
from langgraph.graph import END, START, StateGraph
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

POOL_MAX = 20
State = TypedDict("State", dict.fromkeys(workload.AGENTS, dict), total=False)  # type: ignore[misc]


def compiled(pool: Any) -> Any:  # noqa: ANN401
    graph = StateGraph(State)
    for before, name in zip((START, *(f"do_{name}" for name in workload.AGENTS)), workload.AGENTS, strict=False):
        graph.add_node(f"do_{name}", node(name))
        graph.add_edge(before, f"do_{name}")
    graph.add_edge(f"do_{workload.AGENTS[-1]}", END)
    return graph.compile(checkpointer=PostgresSaver(pool))


def node(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {name: workload.agent(name, state)}


def work(runs: int, threads: int) -> None:
    """Some runs that warm; those that count begin together with all other processes'."""
    options = {"autocommit": True, "row_factory": dict_row, "prepare_threshold": 0}
    connections = min(threads, POOL_MAX)
    own = threading.local()
    with (
        ConnectionPool(workload.POSTGRES, min_size=connections, max_size=connections, kwargs=options) as pool,
        ThreadPoolExecutor(threads) as executor,
    ):

        def run(_number: int) -> None:
            if not hasattr(own, "graph"):
                own.graph = compiled(pool)
            own.graph.invoke({}, {"configurable": {"thread_id": str(uuid.uuid4())}}, durability="sync")

        list(executor.map(run, range(max(threads, workload.WARM_RUNS))))
        print(" ready.", flush=True)
        workload.until(workload.GO.exists)
        list(executor.map(run, range(runs)))
    print(" done.", flush=True)


def main(runs: int, processes: int, threads: int) -> None:
    shares = [runs // processes + (number < runs % processes) for number in range(processes)]
    workload.start_workers([workload.this_script("worker", share, threads) for share in shares])
    logs = [workload.HOME / f"worker-{number}.log" for number in range(processes)]
    began = time.perf_counter()
    workload.GO.touch()
    workload.until(lambda: all(b" done." in log.read_bytes() for log in logs), timeout_s=120)
    workload.report(runs, time.perf_counter() - began, 0.0, "langgraph", "langgraph-checkpoint-postgres")


if __name__ == "__main__":
    if sys.argv[1] == "setup":
        with PostgresSaver.from_conn_string(workload.POSTGRES) as saver:
            saver.setup()
    elif sys.argv[1] == "worker":
        work(*map(int, sys.argv[2:]))
    else:
        main(*map(int, sys.argv[1:]))
