"""What finished runs cost those that run now; and `make history`, which measures it, in its smallest form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benches import Bench
from pipelines import line

ROOT = Path(__file__).parent.parent


def test_new_attempts_stay_out_of_the_pages_of_old_ones(fast_store):
    """A claim dirties a new page and no old one, whose full image would go to the WAL; BRIN then finds what is new."""
    bench = Bench(fast_store)
    output = {"text": "words " * 60}
    for _ in range(30):
        run = bench.start(line("a", "b", "c", "d"))
        for agent in "abcd":
            bench.complete(bench.claim(run, agent)[0], output)
    bench.sql("vacuum stepfast.attempts")
    pages = bench.sql("select pg_relation_size('stepfast.attempts') / 8192")
    assert pages > 10
    for _ in range(10):
        bench.claim(bench.start(line("a", "b", "c", "d")), "a")
    old = bench.sql(
        "select count(*) from stepfast.attempts where state = 'executing' and ctid < cast(:page as tid)",
        page=f"({pages // 2},0)",
    )
    assert old == 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_history_is_made_and_both_databases_do_the_same_work(tmp_path):
    """Copies stand in one database and not in the other, of every kind; runs and calls are measured on all sides."""
    argv = ("--runs", "200", "--rounds", "1", "--round-runs", "10", "--shared-buffers", "64MB", "--home", tmp_path)
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "history.py", *argv, "--json"], capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    answer = json.loads(done.stdout)
    assert done.returncode == (0 if answer["ok"] else 1)  # so few runs say nothing of the speed
    assert answer["machine"]["finished runs before"] == "0 (empty) and 205 (full)"
    figures = answer["figures"]
    assert {"steps/s", "a step: WAL, bytes", "claim_v1: ms", "complete_v1: ms", "sweep_v1: ms", "show: ms"} <= set(
        figures
    )
    for of_sides in figures.values():
        assert set(of_sides) == {"empty", "full", "full, ordered ids"}
    assert all(rate > 0 for rate in figures["steps/s"].values())
