"""The named points at which a crash test ends a process."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, eventually

from app import crashpoints, settings
from app.crashpoints import NO_AGENT, CrashPoint
from app.crashtest import cells
from app.errors import NotReady
from app.pipelines.model import Agent, Pipeline

REACHING = """
import sys
from pathlib import Path
from app import crashpoints
from app.crashpoints import CrashPoint, reach
crashpoints.use(Path(sys.argv[1]) if sys.argv[1] else None)
reach(CrashPoint.CLAIM_AFTER, "coder")
print("alive")
"""


@pytest.fixture
def folder(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path


def _process(folder) -> subprocess.Popen:
    """A process that comes to claim.after for the coder."""
    return subprocess.Popen([sys.executable, "-c", REACHING, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_nothing_happens_unless_it_is_armed(folder):
    """Without the variable a point is silent, also where an order lies about; another agent's order is not obeyed."""
    crashpoints.arm(folder, CrashPoint.CLAIM_AFTER, "coder")
    assert _process("").communicate()[0] == "alive\n"
    (folder / "claim.after:coder").rename(folder / "claim.after:reviewer")
    assert _process(folder).communicate()[0] == "alive\n"
    assert [note.struck for note in crashpoints.notes(folder)] == [False]


def test_point_kills_once(folder):
    """The first process that comes to it is ended by SIGKILL; the next one lives."""
    crashpoints.arm(folder, CrashPoint.CLAIM_AFTER, "coder")
    dying = _process(folder)
    assert (dying.communicate()[0], dying.returncode) == ("", -signal.SIGKILL)
    assert _process(folder).communicate()[0] == "alive\n"
    first, second = crashpoints.notes(folder)
    assert (first.struck, first.pid, first.point, first.agent) == (True, dying.pid, CrashPoint.CLAIM_AFTER, "coder")
    assert not second.struck


def test_two_processes_do_not_both_die(folder):
    """Who removes the order dies: of many that come at once, one."""
    crashpoints.arm(folder, CrashPoint.CLAIM_AFTER, "coder")
    processes = [_process(folder) for _ in range(4)]
    for process in processes:
        process.communicate()
    assert sorted(process.returncode for process in processes) == [-signal.SIGKILL, 0, 0, 0]


def test_point_stops_until_it_is_continued(folder):
    """A process that is stopped goes on from the very place."""
    crashpoints.arm(folder, CrashPoint.CLAIM_AFTER, "coder", stops=True)
    process = _process(folder)
    eventually(lambda: any(note.struck for note in crashpoints.notes(folder)), what="the stop")
    assert process.poll() is None
    os.kill(process.pid, signal.SIGCONT)
    assert (process.communicate()[0], process.returncode) == ("alive\n", 0)


def test_settings_know_the_variable_and_refuse_bad_values(folder):
    """An unknown point is refused with the nearest known name; so is a folder that others may write to, or none."""
    named = {"STEPFAST_CRASH_POINTS": str(folder)}
    assert settings.parse({}).crash_points is None
    assert settings.parse(named).crash_points == folder
    (folder / "claim.aftr:coder").touch()
    with pytest.raises(NotReady, match=r"there is no such point. Did you mean claim.after\?"):
        settings.parse(named)
    (folder / "claim.aftr:coder").unlink()
    folder.chmod(0o777)
    with pytest.raises(NotReady, match="where others may write"):
        settings.parse(named)
    with pytest.raises(NotReady, match="cannot be read"):
        settings.parse({"STEPFAST_CRASH_POINTS": str(folder / "nothing")})


def test_every_point_has_a_cell():
    """Of a pipeline that has all that points are about, no point is forgotten; of another, what it lacks is listed."""
    asks = Agent("asks", model="claude-sonnet-5-5", gate="1 == 1", requires_human_approval=True)
    does = Agent("does", handler="handlers:does", depends_on=("asks",))
    pipeline = Pipeline("all", "1.0.0", (asks, does))
    later = ("check", "fail", "dead_letter", "approve", "sweep")
    of_dead = {point for point in CrashPoint if point.label.startswith(later)}
    reached = {(point, agent.id) for point in set(CrashPoint) - of_dead for agent in pipeline.agents}
    planned = cells.every(pipeline, reached | {(CrashPoint.SWEEP_BEFORE, NO_AGENT)}, frozenset({"asks", "does"}), 0)
    assert cells.not_reached(planned) == []
    assert len({cell.name for cell in planned}) == len(planned)
    assert [cell.name for cell in cells.chosen(planned, ["check.*:does", "sweep.before"])] == [
        "sweep.before",
        "check.before:does",
        "check.after:does",
    ]
    few = cells.every(Pipeline("few", "1.0.0", (does,)), {(CrashPoint.CLAIM_AFTER, "does")}, frozenset(), 0)
    assert CrashPoint.CLAIM_AFTER not in cells.not_reached(few)
    assert of_dead - {CrashPoint.SWEEP_AFTER} < set(cells.not_reached(few))


def test_every_point_is_documented():
    """docs/crashtest.md has a row for each point, in the words of the code, and one for each fault."""
    text = (ROOT / "docs" / "crashtest.md").read_text()
    for point in CrashPoint:
        assert f"| `{point.label}` | {point.where} |" in text
    for fault in cells.Fault:
        assert f"`{fault}`" in text or f"`.{fault.rpartition('.')[2]}`" in text
