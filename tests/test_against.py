"""The bench against peers in its short form, so that `make bench` stays alive. Its figures mean nothing here."""

import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BENCH = (sys.executable, str(ROOT / "bench" / "against.py"), "--quick")
# The processes of one turn: the side's script and two workers.
OF_A_TURN = 3


def _stats() -> list[list[str]]:
    """For each process: its state, parent, group and session, as /proc has them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            found.append(file.read_text().rpartition(")")[2].split())
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_bench_measures_stepfast(tmp_path):
    """Each row has a figure of ours, with what it was measured on, as a table, as JSON and as a chart."""
    written = tmp_path / "against.json"
    done = subprocess.run([*BENCH, "--peers", "", "--json", written], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(written.read_text())
    assert document["machine"]["postgres"]["fsync"] == "on"
    for row in document["rows"]:
        (ours,) = row["sides"]
        assert ours["values"][0] > 0
        assert row["title"] in done.stdout
        assert f"{ours['median']:.1f}" in done.stdout
    ET.fromstring(written.with_suffix(".svg").read_text())


@pytest.mark.slow
def test_peer_that_cannot_be_installed_is_said_so(tmp_path):
    """A side without a figure stands in the table with the reason: dropped silently, it would look beaten."""
    (tmp_path / "bench-celery.txt").write_text("no requirement\n")
    code = (
        "import pathlib, sys; sys.path[:0] = ['bench']; import against;"
        f"against.REQUIREMENTS = against.ENVIRONMENTS = pathlib.Path({str(tmp_path)!r});"
        "sys.exit(against.main(sys.argv[1:]))"
    )
    asked = ("--quick", "--peers", "celery", "--rows", "steps", "--json", tmp_path / "against.json")
    done = subprocess.run([sys.executable, "-c", code, *asked], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("plain Celery chain"))
    assert "not installed: ERROR: Invalid requirement" in line


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_end_takes_all_of_the_bench_along(tmp_path, number):
    """Ctrl-C in the middle of a turn leaves no worker and no server behind."""
    asked = ("--peers", "", "--rows", "steps", "--json", str(tmp_path / "against.json"))
    bench = subprocess.Popen([*BENCH, *asked], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        session = None
        while session is None:
            assert time.monotonic() < deadline
            stats = _stats()
            ours = {stat[3] for stat in stats if stat[1] == str(bench.pid)}
            session = next((s for s in ours if sum(stat[3] == s for stat in stats) >= OF_A_TURN), None)
            time.sleep(0.02)
        bench.send_signal(number)
        _, said = bench.communicate(timeout=60)
    finally:
        bench.kill()
    assert bench.returncode in (130, 143), said
    assert "Stopping the servers." in said
    assert not [stat for stat in _stats() if stat[3] == session and stat[0] != "Z"]
