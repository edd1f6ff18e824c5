"""A step that kills the process that executes it: it ends alone, as a dead letter, and takes nobody along."""

import os
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import eventually
from test_running import _began, _end_truce

from app import operations

# `make histories` does it among 200.
NEIGHBOURS = 200 if "HISTORIES" in os.environ else 40
AGENTS = "- {id: step, idempotent: true, retry_policy: {max_worker_losses: 3}}"
# The poison waits until its neighbours execute beside it, and kills; where it is alone, at once.
HANDLERS = """
    import os, pathlib, signal, threading

    def step(ctx):
        folder = pathlib.Path(ctx.run.input["folder"])
        if ctx.run.input["poison"]:
            with (folder / "poison-began").open("a") as file:
                file.write(f"{os.getpid()}\\n")
        else:
            (folder / "began" / f"{ctx.run.id}-{os.getpid()}").touch()
        pause = threading.Event()
        for _ in range(6000):
            if ctx.run.input["poison"] and (folder / "kill").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            if not ctx.run.input["poison"] and (folder / "go").exists():
                return {"by": os.getpid()}
            pause.wait(0.02)
"""


def _kept_running(system, stopped: threading.Event) -> None:
    """A supervisor: a worker that was killed is started again."""
    while not stopped.is_set():
        worker = system.start_worker(concurrency=NEIGHBOURS + 1, STEPFAST_GRACE_S="0.5")
        while worker.poll() is None and not stopped.is_set():
            with suppress(subprocess.TimeoutExpired):
                worker.wait(0.1)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_poison_among_many_ends_alone(system, here, write_skill, tmp_path):
    """One among many in one process: after two deaths each suspect runs alone, and only the poison dies again."""
    (tmp_path / "began").mkdir()
    name = system.publish(here, write_skill(AGENTS, HANDLERS))
    poison = operations.start(here, name, {"folder": str(tmp_path), "poison": True}).run_id
    given = {"folder": str(tmp_path), "poison": False}
    neighbours = [operations.start(here, name, given).run_id for _ in range(NEIGHBOURS)]
    _end_truce(system)
    stopped = threading.Event()
    supervisor = threading.Thread(target=_kept_running, args=(system, stopped))
    supervisor.start()
    try:
        for deaths in (1, 2):
            pid = eventually(lambda n=deaths: len(found := _began(tmp_path, "poison")) == n and found[-1], within_s=90)
            beside = f"*-{pid}"
            eventually(
                lambda beside=beside: len(list((tmp_path / "began").glob(beside))) == NEIGHBOURS,
                within_s=90,
                what="its neighbours",
            )
            (tmp_path / "kill").touch()
            eventually(lambda n=deaths: system.workers[n - 1].poll() is not None, what="the death")
            (tmp_path / "kill").unlink()
        (tmp_path / "kill").touch()
        (tmp_path / "go").touch()
        run = system.ended(poison, within_s=200)
        ended = [system.ended(run_id, within_s=200) for run_id in neighbours]
    finally:
        stopped.set()
        supervisor.join()
    assert (run["state"], run["steps"][0]["tries"][-1]["error"]["code"]) == ("failed", "worker_lost")
    assert run["steps"][0]["worker_losses"] == 4
    assert {other["state"] for other in ended} == {"completed"}
    # Two deaths of the process that they shared, and none of the one that executed the poison alone.
    assert {other["steps"][0]["worker_losses"] for other in ended} == {2}
    assert system.workers[2].poll() is None
    assert len(system.workers) == 3
    alone = {other["steps"][0]["tries"][-1]["output"]["by"] for other in ended}
    assert len(alone) == NEIGHBOURS
    assert system.workers[2].pid not in alone


@pytest.mark.slow
def test_process_for_one_step_ends_with_its_worker(system, here, write_skill, tmp_path):
    """SIGKILL of the worker: what it started for a suspect ends, too, and nothing is left behind."""
    (tmp_path / "began").mkdir()
    name = system.publish(here, write_skill(AGENTS, HANDLERS))
    run_id = operations.start(here, name, {"folder": str(tmp_path), "poison": False}).run_id
    with here.store.engine.connect() as connection:
        connection.exec_driver_sql("update stepfast.steps set worker_losses = 2")
    worker = system.start_worker()
    (file,) = eventually(lambda: list((tmp_path / "began").glob(f"{run_id}-*")), what="the step")
    pid = int(file.name.rpartition("-")[2])
    assert pid != worker.pid
    os.kill(worker.pid, signal.SIGKILL)
    worker.wait()
    eventually(lambda: not _is_running(pid), within_s=10, what="the end of its process")
    eventually(lambda: not _in_group(worker.pid), within_s=10, what="the end of the fork server")


def _is_running(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError), Path(f"/proc/{pid}/stat").open() as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


def _in_group(group: int) -> list[int]:
    found = subprocess.run(["ps", "-eo", "pid,pgid,stat"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in found.splitlines()[1:]]
    return [int(pid) for pid, of, state in rows if int(of) == group and not state.startswith("Z")]
