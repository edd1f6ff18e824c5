"""What the deployer's tests share: a record of effects in memory, an attempt's context, and git as a user types it."""

import os
import signal
import subprocess
import tempfile
from pathlib import Path
from uuid import UUID, uuid4

import yaml

from app.agents import Context
from app.agents.work import Effect, EffectState, Work
from app.cli.sample_repository import make_repository
from app.clock import Deadline
from app.pipelines.model import Agent

EXAMPLE = Path(__file__).parent.parent / "examples" / "bugfix"
REPLIES = {
    rule["match"]["system"]: rule["reply"] for rule in yaml.safe_load((EXAMPLE / "simulator.yaml").read_text())["rules"]
}
CODER = REPLIES["You write the repair of a bug"]
RUN = UUID("3f2a9c1e-7b1d-4c55-9a3e-0d6f1b2c3d4e")
BRANCH = "stepfast/3f2a9c1e-7b1d-1"
ENVIRONMENT = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1"}


class Memory:
    """The record of effects, in memory. Given a file it survives the process."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._effects: dict[str, Effect] = {}

    def begin(self, key: str) -> Effect:
        if self._file and self._file.exists():
            return Effect(EffectState.UNKNOWN)
        if known := self._effects.get(key):
            return known
        self._effects[key] = Effect(EffectState.UNKNOWN)
        if self._file:
            self._file.touch()
        return Effect(EffectState.NEW)

    def finish(self, key: str, output: dict) -> None:
        self._effects[key] = Effect(EffectState.HAPPENED, output)

    def forget(self, key: str) -> None:
        self._effects.pop(key, None)
        if self._file:
            self._file.unlink(missing_ok=True)


class Dies(Memory):
    """Kills its process after the commit and before it is recorded."""

    def finish(self, key: str, output: dict) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Loses(Memory):
    """Cannot record that the commit happened."""

    def finish(self, key: str, output: dict) -> None:
        raise ConnectionError("the database is gone")


def context(given, coder=CODER, *, effects=None, run=RUN, generation=1, timeout_ms=60_000):
    work = Work(
        run_id=run,
        attempt_id=uuid4(),
        pipeline="bugfix",
        agent=Agent(id="deployer", handler="handlers:deployer"),
        generation=generation,
        number=1,
        input=given,
        outputs={"coder": coder},
        deadline=Deadline.after_ms(timeout_ms),
    )
    return Context(work, effects or Memory())


def git(repo, *arguments):
    """Runs git as a user would type it, the repository's own config included."""
    return subprocess.run(
        ["git", *arguments], cwd=repo, env=ENVIRONMENT, check=True, capture_output=True, text=True
    ).stdout.strip()


def commits_of(repo, run=RUN):
    return git(repo, "rev-list", "--all", f"--grep=Stepfast-Run: {run}").split()


def adds(path, header="--- /dev/null\n+++ b/"):
    return f"{header}{path}\n@@ -0,0 +1 @@\n+text\n"


def alive(pid):
    """Whether a process runs. A zombie that nobody reaps does not."""
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc/self").exists():
        return subprocess.run(["ps", "-p", str(pid)], capture_output=True, check=False).returncode == 0
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def example_repository(tmp_path, monkeypatch):
    """The example's repository, and a folder of its own for what the deployer leaves behind. Yields its path."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    make_repository(EXAMPLE / "repository", tmp_path / "repo")
    yield (tmp_path / "repo").resolve()
    assert list(scratch.iterdir()) == [], "a temporary folder was left behind"
