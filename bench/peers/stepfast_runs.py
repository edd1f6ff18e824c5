"""Stepfast: `stepfast_runs.py setup`, or RUNS PROCESSES THREADS. Task events on, as its celeryconfig.py has them.

Runs are started by `stepfast.enqueue`'s client, each in a transaction of its own.
"""

import os
import sys
from pathlib import Path

import psycopg
import workload

ROOT = Path(__file__).resolve().parents[2]
SKILL = ROOT / "bench" / "skills" / "hops"
ENVIRON = {
    "STEPFAST_DATABASE_URL": workload.POSTGRES,
    "STEPFAST_BROKER_URL": workload.BROKER,
    "STEPFAST_HOME": str(workload.HOME),
    "STEPFAST_SKILLS": str(SKILL.parent),
    "PYTHONPATH": str(Path(__file__).parent),
}


def set_up() -> None:
    os.environ.update(ENVIRON)
    from app import operations, settings
    from app.execution import worker
    from app.pipelines import loader
    from app.runs.database import migrate

    migrate(settings.load().need_database())
    pipeline = loader.load(SKILL, aliases=settings.load().model_aliases, handler_modules=())
    operations.publish(worker.current(), pipeline)
    worker.stop()


def main(runs: int, processes: int, threads: int) -> None:
    import stepfast

    celery = [sys.executable, "-m", "celery", "-A", "app", "worker", "--without-mingle", "--without-gossip"]
    pool = ["-Q", "agents,handlers", "-P", "threads", "-c", str(threads)]
    commands = [[*celery, *pool, "-n", f"bench-{number}@%h"] for number in range(processes)]
    workload.start_workers(commands, cwd=ROOT, env=os.environ | ENVIRON)
    client = stepfast.Client(broker=workload.BROKER)
    with psycopg.connect(workload.POSTGRES, autocommit=True) as database:
        ended = "select count(*) from stepfast.runs where state = 'completed'"

        def await_ended(count: int) -> None:
            workload.until(lambda: database.execute(ended).fetchone() == (count,))

        workload.measure(
            runs,
            lambda: client.enqueue("hops", {}, connection=database),
            await_ended,
            "stepfast-app",
            "celery",
            "hiredis",
        )


if __name__ == "__main__":
    set_up() if sys.argv[1] == "setup" else main(*map(int, sys.argv[1:]))
