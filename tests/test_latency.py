"""`make latency` in its short form: it runs, and prints each figure beside its goal."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"


def _said(*argv: object) -> str:
    return subprocess.check_output([sys.executable, *map(str, argv)], text=True, cwd="/")


@pytest.mark.timeout(120)
def test_latency_prints_its_figures_beside_the_goals():
    """Every first request and every next one is found: a run has four."""
    said = _said(BENCH / "latency.py", "--short", "--part", "waits", "--part", "commands")
    for name in ("operations.start", "stepfast.enqueue", "stepfast.enqueue, connecting"):
        assert re.search(rf"{name} to the first request, p50 +[\d.]+ ms +goal 15", said), said
    assert re.search(r"step.completed to the next request, samples +18\b", said), said
    assert re.search(r"stepfast runs, p50 of 1 +[\d.]+ s +goal 0.8", said), said


@pytest.mark.timeout(120)
def test_waiting_prints_its_figures_beside_the_goals():
    """All runs wait at once, and none of their calls is made twice."""
    said = _said(BENCH / "waiting.py", "--runs", "6", "--call-s", "2")
    assert re.search(r"calls in flight, most +6\b", said), said
    assert re.search(r"wall / ideal +[\d.]+ +goal 1.2", said), said
    assert re.search(r"a worker's memory, most +[\d.]+ MB PSS +goal 350", said), said
    assert re.search(r"calls beyond one a step +0\b", said), said
