"""The Procfile, and how its processes are started, watched and stopped."""

import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, eventually

from app.cli import processes
from app.cli.processes import OrderlyExit, Processes, procfile
from app.errors import NotReady
from app.pipelines.model import Queue


@pytest.fixture
def start(tmp_path):
    """Processes with a PATH and nothing else, and what was said about them."""
    said = []

    def start(hurry=lambda: False, **commands):
        return Processes(commands, {"PATH": os.environ["PATH"]}, tmp_path / "logs", said.append, hurry)

    start.said = said
    return start


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def _ended(group: int) -> bool:
    """Whether nothing of a process group lives; init may be slow to bury the dead."""
    members = [stat.rpartition(")")[2].split() for stat in _stats()]
    return all(state == "Z" for state, _parent, of, *_ in members if int(of) == group)


def _stats() -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            found.append(file.read_text())
    return found


def test_the_procfile_serves_every_queue():
    """One worker a queue of the definitions, named after it; threads for what waits, processes for what computes."""
    commands = procfile()

    assert list(commands) == ["release", "agents", "handlers", "flower"]
    for queue, pool in ((Queue.AGENTS, "threads"), (Queue.HANDLERS, "prefork")):
        assert re.fullmatch(rf"celery -A app worker -n {queue}-\$\$@%h -Q {queue} -P {pool} .*", commands[queue])


def test_release_migrates_and_publishes_what_skills_name(empty_database_url):
    """The release line is enough for an empty database: its tables, and each skill whose handlers workers may import."""
    environ = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "STEPFAST_DATABASE_URL": empty_database_url,
        "STEPFAST_SKILLS": str(ROOT / "examples" / "bugfix"),
    }
    for published in ("bugfix 1.0.0 is published, as", "bugfix 1.0.0 is published already, as"):
        done = subprocess.run(
            ["/bin/sh", "-c", procfile()["release"]], cwd=ROOT, env=environ, capture_output=True, text=True, check=True
        )
        assert published in done.stdout


def test_what_ends_is_started_again_and_the_reason_is_said(start, tmp_path):
    """A killed process is back within seconds; what was logged before stays."""
    pids = tmp_path / "pids"
    with start(service=f"sh -c 'echo $$ >> {pids}; exec sleep 100'") as running:
        running.wait_ready(lambda _name, _pid: pids.exists())
        os.kill(int(_lines(pids)[0]), signal.SIGKILL)
        eventually(lambda: len(_lines(pids)) == 2, within_s=5, what="a second process")

    (sentence,) = start.said
    assert sentence.startswith("service was ended by SIGKILL, and starts again in 1 s. See ")


def test_what_cannot_start_is_refused_with_the_end_of_its_log(start):
    """One sentence with the log's end, and nothing is tried again; the others are stopped."""
    with pytest.raises(NotReady, match=r"(?s)broken ended with exit code 4; the end of its log:\nno such luck"):  # noqa: SIM117
        with start(broken="sh -c 'echo no such luck; exit 4'", other="sleep 100") as running:
            running.wait_ready(lambda name, _pid: name == "other")
    assert start.said == []


def test_what_ignores_the_end_is_killed_with_its_children(start, tmp_path, monkeypatch):
    """TERM first; after the time for it, or at once in a hurry, the whole process group."""
    deaf = "sh -c 'trap \"\" TERM; sleep 100 & echo $$ > {}; wait; sleep 100'"
    for file, timeout_s, hurry in ((tmp_path / "slow", 0.2, False), (tmp_path / "hurried", 60.0, True)):
        monkeypatch.setattr(processes, "STOP_TIMEOUT_S", timeout_s)
        with start(lambda hurry=hurry: hurry, deaf=deaf.format(file)) as running:
            running.wait_ready(lambda _name, _pid, file=file: bool(_lines(file)))
        eventually(lambda file=file: _ended(int(_lines(file)[0])), within_s=5, what="the end of the group")


def test_each_start_keeps_one_old_log(start, tmp_path):
    """Logs are bounded by the life of a system, and only their owner reads them."""
    for word in ("first", "second", "third"):
        with start(service=f"sh -c 'echo {word}; exec sleep 100'") as running:
            running.wait_ready(lambda _name, _pid: bool(_lines(tmp_path / "logs" / "service.log")))

    logs = tmp_path / "logs"
    assert {path.name: path.read_text() for path in logs.iterdir()} == {
        "service.log": "third\n",
        "service.log.old": "second\n",
    }
    assert (logs.stat().st_mode & 0o777, (logs / "service.log").stat().st_mode & 0o777) == (0o700, 0o600)


def test_no_signal_interrupts_an_orderly_exit():
    """The first Ctrl-C raises; one that comes while things are stopped only asks for a hurry."""
    stopped = []
    with pytest.raises(KeyboardInterrupt), OrderlyExit() as stack:  # noqa: PT012  # it is raised within
        stack.callback(lambda: stopped.append("first in, last out"))
        stack.callback(lambda: signal.raise_signal(signal.SIGINT))
        signal.raise_signal(signal.SIGINT)

    assert stopped == ["first in, last out"]
    assert stack.hurry


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_other_endings_leave_with_their_own_code(number, code):
    """TERM and HUP end a command as Ctrl-C does, with the exit code that a shell expects."""
    with pytest.raises(SystemExit) as ended, OrderlyExit():
        signal.raise_signal(number)
    assert ended.value.code == code


def test_what_is_held_is_done_whole():
    """An interruption waits until what must not be torn is done."""
    done = []
    with pytest.raises(KeyboardInterrupt), OrderlyExit() as stack:  # noqa: PT012  # it is raised within
        with stack.held():
            signal.raise_signal(signal.SIGINT)
            done.append("whole")
        done.append("not reached")
    assert done == ["whole"]


def test_an_interruption_that_python_dropped_is_raised_again():
    """What is raised inside a destructor is lost; nobody presses Ctrl-C in vain."""

    class Dying:
        pass

    dying = Dying()

    def interrupted(_reference):
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), OrderlyExit():  # noqa: PT012  # it is raised within
        _reference = weakref.ref(dying, interrupted)
        del dying
        threading.Event().wait(5)
        pytest.fail("it was lost")
