"""A night on real parts: a paid answer that does not fit, a worker that is killed, a gate that refuses, an approval."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from conftest import System, eventually

from app import operations
from app.execution import worker
from app.execution.worker import Worker
from app.runs.reads import Reads
from app.simulator.script import parse
from app.simulator.server import Simulator

AGENTS = """
    - id: researcher
      model: claude-sonnet-5-5
      output_schema: finding
      retry_policy: {initial_ms: 50}
    - id: coder
      model: claude-sonnet-5-5
      depends_on: [researcher]
      output_schema: change
      retry_policy: {initial_ms: 50}
    - id: reviewer
      depends_on: [coder]
      idempotent: true
      gate: "{{coder.confidence}} >= 0.85"
    - id: deployer
      depends_on: [reviewer, coder]
      requires_human_approval: true
"""
HANDLERS = """
    from app.agents import effects_once

    def reviewer(ctx):
        return {"approved": True}

    @effects_once
    def deployer(ctx):
        place = ctx.run.input["place"]
        return ctx.once("push", lambda: {"pushed_to": place}, check=lambda: None)
"""


def _schema(**properties: str) -> str:
    described = {name: {"type": kind} for name, kind in properties.items()}
    return json.dumps(
        {"type": "object", "properties": described, "required": list(properties), "additionalProperties": False}
    )


FILES = {
    "schemas/finding.json": _schema(summary="string"),
    "schemas/change.json": _schema(diff="string", confidence="number"),
    "prompts/researcher.md": "# System\n\nYou research.\n\n# User\n\nLook at {{input.issue}}.\n",
    "prompts/coder.md": "# System\n\nYou write code.\n\n# User\n\nRepair it: {{researcher.summary}}\n",
}
SECRET = "sk-ant-api03-verysecretindeed"
ISSUE = {"issue": f"the total is wrong ({SECRET})", "place": "production"}
SUMMARY = "A sum starts at one."


def researched(**changes: object) -> dict:
    return {"match": {"system": "You research"}, "reply": {"summary": SUMMARY}} | changes


def coded(confidence: float = 0.9, **changes: object) -> dict:
    reply = {"diff": "-start = 1\n+start = 0\n", "confidence": confidence}
    return {"match": {"system": "You write code"}, "reply": reply} | changes


@dataclass
class Night:
    """Servers, the skill `night` in its folder, and the simulator that its workers ask."""

    system: System
    simulator: Simulator
    folder: Path

    @property
    def here(self) -> Worker:
        """The test's process as a client: a command that ran in it has closed the one before."""
        return worker.current()

    def answers(self, *rules: dict) -> None:
        self.simulator.use(parse({"rules": list(rules)}))

    def start(self) -> UUID:
        return operations.start(self.here, "night", ISSUE).run_id

    def until(self, run_id: UUID, agent: str, state: str) -> None:
        eventually(lambda: self.system.states(run_id)[agent] == state, what=f"{agent} {state}")

    def eventful(self) -> tuple[UUID, int]:
        """A run up to its approval. Its researcher's first answer did not fit, and under its coder a worker was killed.

        Returns it, and the pid of the killed process.
        """
        self.answers(researched(times=1, invalid_json=True), researched(), coded(times=1, delay_ms=60_000), coded())
        killed = self.system.start_worker()
        run_id = self.start()
        self.until(run_id, "coder", "executing")
        eventually(lambda: len(self.simulator.requests) == 3, what="the coder's call")
        dead = Reads(self.here.store.engine).executing_pid(run_id, "coder")
        self.system.start_worker()
        os.killpg(killed.pid, signal.SIGKILL)
        self.until(run_id, "deployer", "suspended")
        return run_id, dead


@contextmanager
def night(system: System, monkeypatch, write_skill) -> Iterator[Night]:
    folder = write_skill(AGENTS, HANDLERS, name="night", files=FILES)
    with Simulator(seed=1) as simulator:
        system.environ["ANTHROPIC_BASE_URL"] = simulator.url
        with system.here(monkeypatch) as here:
            system.publish(here, folder)
            yield Night(system, simulator, folder)
