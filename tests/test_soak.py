"""The soak in its short form: what CI can afford of `make soak`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_nothing_is_lost_and_nothing_done_twice():
    """dbos-transact-py PostgresChaosMonkey: workers killed, broker wiped, Postgres crashed; every promise is a count."""
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "soak.py", "--short", "--part", "faults", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    (part,) = json.loads(done.stdout)["parts"]
    figures = part["figures"]
    assert figures["workers killed"] + figures["processes of a pool killed"] >= 1
    assert (figures["broker wiped"], figures["Postgres restarted by a crash"]) == (1, 1)
    assert (figures["runs lost"], figures["effects doubled"], figures["outputs committed twice"]) == (0, 0, 0)


def test_promise_that_is_not_held_is_exit_code_1():
    """A soak that cannot fail proves nothing: a count above its bound is said, and ends in 1."""
    code = (
        "import contextlib, sys; sys.path[:0] = ['bench']; import soak;"
        "soak.systems.system = lambda *_: contextlib.nullcontext();"  # it is the sentence that is tested
        "soak.PARTS = {'faults': lambda found, *_: found.count('effects doubled', 1)}; sys.exit(soak.main([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "NOT HELD: effects doubled <= 0" in done.stdout
