"""Many dead letters of one cause, resumed by one command: in bounded batches, with progress, in bounded memory.

The short form is part of every test run. The long form: `make letters`, which is `LETTERS=10000`.
"""

import os
import re
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from commanding import STEPFAST, give_up
from conftest import eventually
from pipelines import agent, pipeline
from sqlalchemy import text

from app import operations
from app.runs.database import engine
from app.runs.failed import PAGE_RUNS
from app.runs.store import Store

LETTERS = int(os.environ.get("LETTERS", "60"))
THREADS = 8
# Above what the command takes for no letter at all: two pages of ids, and what Python does not give back.
MEMORY_MAX_MIB = 40
ENDED_WITHIN_S = 60 + LETTERS / 10
DEFINITION = pipeline(agent("only", handler="handlers:only", queue="handlers"))
HANDLER = """
    import pathlib
    def only(ctx):
        if not (pathlib.Path(ctx.run.input["folder"]) / "mended").exists():
            raise ValueError("not mended")
        return {}
"""


def _resumed(system, folder, *options) -> tuple[str, float, float]:
    """What `resume --failed` said on standard error, in seconds, and its peak memory in MiB."""
    errors = folder / "errors"
    began = time.monotonic()
    with errors.open("w") as stream:
        command = [str(STEPFAST), "resume", "--failed", "--json", *options]
        running = subprocess.Popen(command, cwd=folder, env=system.environ, stdout=subprocess.DEVNULL, stderr=stream)
        _, status, used = os.wait4(running.pid, 0)
    running.returncode = os.waitstatus_to_exitcode(status)
    assert running.returncode == 0, errors.read_text()[-2_000:]
    return errors.read_text(), time.monotonic() - began, used.ru_maxrss / 1024


@pytest.mark.timeout(ENDED_WITHIN_S * 4)
def test_many_dead_letters_are_resumed_by_one_command(system, here, write_skill, tmp_path):
    """All of them, a page at a time after a canary, with progress; the memory does not grow with their number."""
    write_skill("- {id: unused}", HANDLER)
    operations.publish(here, DEFINITION)
    store = Store(engine(system.database_url, pool_max=THREADS))

    def fail(number: int) -> None:
        run_id, _ = store.enqueue(DEFINITION.name, {"folder": str(tmp_path)})
        give_up(store, DEFINITION, run_id, "only", message=f"Number {number} broke.")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fail, range(LETTERS)))
    *_, idle_mib = _resumed(system, tmp_path, "--pipeline", DEFINITION.name, "--since", "2999-01-01", "--yes")
    (tmp_path / "mended").touch()
    for _ in range(2):
        system.start_worker(queues="handlers")
    said, spent_s, peak_mib = _resumed(system, tmp_path, "--yes")
    print(
        f"{LETTERS:,} dead letters of one cause: resumed in {spent_s:.0f} s, {LETTERS / spent_s:.0f} a second; "
        f"peak memory {peak_mib:.0f} MiB, {idle_mib:.0f} MiB for none"
    )
    told = [int(count.replace(",", "")) for count in re.findall(r": ([\d,]+) of [\d,]+ resumed\.", said)]
    assert told[-1] == LETTERS
    assert len(told) == -(-(LETTERS - 1) // PAGE_RUNS)
    assert peak_mib - idle_mib < MEMORY_MAX_MIB
    left = text("select count(*) from stepfast.runs where state <> 'completed'")
    with store.engine.connect() as connection:
        eventually(lambda: connection.execute(left).scalar() == 0, within_s=ENDED_WITHIN_S, what="the end of all runs")
        assert connection.execute(text("select count(*) from stepfast.attempts")).scalar() == 2 * LETTERS
    store.engine.dispose()
