"""`make history` in its smallest form: that it fills, works on all sides, and says what it found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


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
