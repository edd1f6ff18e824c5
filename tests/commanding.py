"""What the command line's tests share: `stepfast` inside this process, and as a process of its own."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from app.runs.store import Bid, Ending, Paid, StepKey

STEPFAST = Path(sys.executable).with_name("stepfast")


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self):
        """Standard output holds one document and nothing else."""
        return json.loads(self.out)

    @property
    def following(self) -> list[str]:
        """The arguments of the one command to type next, which stands last."""
        last = (self.out or self.err).splitlines()[-1]
        program, *arguments = shlex.split(last.removeprefix("Next: "))
        assert last.startswith("Next: ")
        assert Path(program).name == "stepfast"
        return arguments

    def refuses(self, code: int, *said: str) -> None:
        """It ends by one clear sentence and what to do next, without a traceback."""
        assert self.code == code, self
        assert "Traceback" not in self.out + self.err
        assert "bug in Stepfast" not in self.out + self.err
        lines = [line for line in self.err.splitlines() if not line.startswith("{")]
        assert lines[0].startswith("Error: "), self
        assert len(lines) <= 2, self
        for text in said:
            assert text in self.err, self


def in_process(capsys):
    """`main`, as a function whose answer is what it printed."""
    from app import settings
    from app.cli.main import main

    def call(*arguments: object) -> Answer:
        settings.load.cache_clear()
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Answer(code, said.out, said.err)

    return call


def process(*arguments: object, env: dict[str, str], cwd: Path) -> subprocess.Popen:
    """`stepfast` as a user starts it."""
    command = [str(STEPFAST), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(*arguments: object, env: dict[str, str] | None = None, cwd: Path) -> Answer:
    """`stepfast` as a user starts it, once it has ended."""
    running = process(*arguments, env={"PATH": os.environ["PATH"]} if env is None else env, cwd=cwd)
    out, err = running.communicate(timeout=60)
    return Answer(running.returncode, out, err)


def claim(store, definition, run_id, agent: str):
    """Begins an attempt as a worker would."""
    bid = Bid(
        step=StepKey(run_id, agent),
        agent=definition.by_id[agent],
        pipeline_hash=definition.hash,
        attempt_id=uuid4(),
        worker_id=1,
        timeout_ms=60_000,
        wait_ms=1_000,
        repeatable=True,
    )
    assert store.claim(bid).outcome == "claimed"
    return bid


def complete(store, definition, run_id, agent: str, output: dict, paid: Paid = Paid()) -> None:  # noqa: B008
    bid = claim(store, definition, run_id, agent)
    assert store.complete(bid.step, bid.attempt_id, output, paid).outcome == "completed"


def give_up(store, definition, run_id, agent: str, **error: object) -> None:
    """An attempt that ends in a dead letter."""
    bid = claim(store, definition, run_id, agent)
    told = {"code": "broken", "who": "retry", "message": "It broke.", "next_step": "", "details": {}} | error
    assert store.fail(bid.step, bid.attempt_id, told, Paid(), Ending("discard")).outcome == "discarded"
