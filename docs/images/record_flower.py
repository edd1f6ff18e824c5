# noqa: INP001  # a script, no package
"""Photographs Flower's pages of real runs: `python docs/images/record_flower.py` (needs Debian's chromium).

A worker is killed, a call is retried, a gate refuses, a handler breaks, and one run waits for a person.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import sync_playwright

PICTURES = Path(__file__).parent
STEPFAST = Path(sys.executable).with_name("stepfast")
CHROMIUM = "/usr/bin/chromium"
SIZE = {"width": 1280, "height": 960}
TIMEOUT_S = 90.0
POLL_S = 0.2

SKILL = """
name: release
version: 1.2.0
agents:
  - {id: researcher, model: claude-sonnet-5-5, output_schema: findings}
  - id: coder
    model: claude-sonnet-5-5
    depends_on: [researcher]
    output_schema: code_diff
    retry_policy: {initial_ms: 1500}
  - {id: writer, model: claude-haiku-5-5, depends_on: [researcher], output_schema: notes}
  - id: reviewer
    model: claude-opus-5-5
    depends_on: [coder, writer]
    gate: "{{coder.confidence}} >= 0.85"
    output_schema: review_result
  - id: publisher
    depends_on: [reviewer]
    gate: "{{reviewer.approved}} == true"
    requires_human_approval: true
"""
SCHEMAS = {
    "findings": {"cause": "string", "file": "string"},
    "code_diff": {"diff": "string", "confidence": "number", "summary": "string"},
    "notes": {"title": "string", "text": "string"},
    "review_result": {"approved": "boolean", "comments": "string"},
}
HANDLERS = """
def publisher(ctx):
    if ctx.run.input["issue"].startswith("#12"):
        raise ConnectionError("the index refused the connection on attempt 1 of 1")
    return {"published": True}
"""
DIFF = """\
--- a/paging.py
+++ b/paging.py
@@ -5,7 +5,7 @@
         raise ValueError("a page holds at least one entry")
-    return entries // size
+    return -(-entries // size)
"""
RULES = [
    {"match": {"system": "researcher"}, "times": 1, "delay_ms": 8_000, "reply": {"cause": "lost", "file": "lost"}},
    {
        "match": {"system": "researcher"},
        "delay_ms": 900,
        "reply": {"cause": "page_count rounds down, so the last page is missing.", "file": "paging.py"},
    },
    {"match": {"system": "coder"}, "times": 1, "delay_ms": 300, "status": 529},
    {
        "match": {"system": "coder", "user": "#7"},
        "reply": {"diff": DIFF, "confidence": 0.62, "summary": "Round the pages up"},
    },
    {
        "match": {"system": "coder"},
        "delay_ms": 1_200,
        "reply": {"diff": DIFF, "confidence": 0.97, "summary": "Count the last page, also where it is not full"},
    },
    {
        "match": {"system": "writer"},
        "delay_ms": 700,
        "reply": {"title": "Paging", "text": "The last page is shown again, also where it is not full."},
    },
    {
        "match": {"system": "reviewer"},
        "delay_ms": 600,
        "reply": {"approved": True, "comments": "The division now rounds up. One line changes, and no test does."},
    },
]


def write_skill(folder: Path) -> None:
    for name in ("prompts", "schemas"):
        (folder / name).mkdir(parents=True)
    (folder / "release.skill.yaml").write_text(SKILL)
    (folder / "handlers.py").write_text(HANDLERS)
    (folder / "simulator.yaml").write_text(json.dumps({"rules": RULES}))
    for name, fields in SCHEMAS.items():
        properties = {field: {"type": kind} for field, kind in fields.items()}
        schema = {"type": "object", "properties": properties, "required": [*fields], "additionalProperties": False}
        (folder / "schemas" / f"{name}.json").write_text(json.dumps(schema))
    for agent in ("researcher", "coder", "writer", "reviewer"):
        text = f"# System\n\nYou are the {agent}.\n\n# User\n\nThe report: {{{{input.issue}}}}\n"
        (folder / "prompts" / f"{agent}.md").write_text(text)


class System:
    """`stepfast up`, and commands beside it."""

    def __init__(self, folder: Path) -> None:
        self.environ = {"PATH": os.environ["PATH"], "STEPFAST_HOME": str(folder / "home")}
        command = [str(STEPFAST), "up", str(folder / "release"), "--simulate"]
        self.process = subprocess.Popen(command, env=self.environ, stdout=subprocess.PIPE, text=True)  # noqa: S603
        self.flower = self.until(r"Flower +(http\S+)")
        for _ in range(2):
            name, value = self.until(r"export (\w+=.*)").split("=", 1)
            self.environ[name] = shlex.split(value)[0]

    def until(self, pattern: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(pattern, line):
                return found[1]
        raise RuntimeError(f"`stepfast up` ended before it said {pattern}.")

    def command(self, *arguments: str) -> dict:
        words = [str(STEPFAST), *arguments, "--json"]
        done = subprocess.run(words, env=self.environ, capture_output=True, text=True, check=False)  # noqa: S603
        return json.loads(done.stdout)

    def start(self, issue: str, label: str) -> str:
        """A run, with a label."""
        code = (
            "import sys; from app import operations; from app.execution import worker; "
            "print(operations.start(worker.current(), 'release', {'issue': sys.argv[1]}, "
            "labels={'ticket': sys.argv[2]}).run_id)"
        )
        words = [sys.executable, "-c", f"import app.celery; {code}", issue, label]
        return subprocess.check_output(words, env=self.environ, text=True).strip()  # noqa: S603

    def wait(self, run: str, ready: Callable[[dict[str, dict]], object]) -> dict[str, dict]:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            shown = self.command("show", run)
            steps = {step["agent"]: step for step in shown["steps"]}
            if ready(steps) or shown["state"] in {"failed", "completed"}:
                return steps
            if time.monotonic() > deadline:
                raise TimeoutError(run)
            time.sleep(POLL_S)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=TIMEOUT_S)


def is_waiting(steps: dict[str, dict]) -> bool:
    return steps["publisher"]["state"] == "suspended"


def make_runs(system: System) -> str:
    """Several runs, as they go in a week; the last one waits for a person, and is returned."""
    shown = system.start("#41: the last page is missing", "41")
    system.wait(shown, lambda steps: steps["researcher"]["state"] == "executing")
    kill_worker(system)
    system.wait(shown, is_waiting)
    for issue in ("#12: nothing is published", "#7: wrong page count", "#7: again", "#7: and again"):
        run = system.start(issue, issue[1:].partition(":")[0])
        if is_waiting(system.wait(run, is_waiting)):
            system.command("approve", run, "publisher", "--yes")
            system.wait(run, lambda _: False)
    return shown


def kill_worker(system: System) -> None:
    """SIGKILL to the process that executes agents with a model; `up` starts another one."""
    children = Path(f"/proc/{system.process.pid}/task")
    for child in {int(pid) for task in children.iterdir() for pid in (task / "children").read_text().split()}:
        if b"-nagents-" in Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b""):
            os.kill(child, signal.SIGKILL)


def photograph(flower: str, run: str, folder: Path) -> None:
    with sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(viewport=SIZE, color_scheme="light").new_page()
        page.goto(f"{flower}/run/{run}")
        page.get_by_text("Live", exact=True).wait_for()
        page.screenshot(path=folder / "flower-run.png", full_page=True)
        page.goto(f"{flower}/dead-letters")
        page.screenshot(path=folder / "flower-dead-letters.png", clip={"x": 0, "y": 0, "width": 1280, "height": 420})
        browser.close()


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURES
    with tempfile.TemporaryDirectory(prefix="flower-") as name:
        write_skill(Path(name) / "release")
        system = System(Path(name))
        try:
            photograph(system.flower, make_runs(system), target)
        finally:
            system.stop()
