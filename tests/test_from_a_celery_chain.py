"""docs/from-a-celery-chain.md, before and after: both run, and give the same."""

import os
import re
import subprocess
import sys

from conftest import ROOT, eventually

from app import operations

TEXT = (ROOT / "docs" / "from-a-celery-chain.md").read_text()
BEFORE, HANDLERS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
(SKILL,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
URL = "example.invalid/a"


def _result_of_the_chain(system, folder) -> str:
    """Starts the plain chain on a plain worker, and waits for its result."""
    (folder / "chained.py").write_text(BEFORE)
    environ = os.environ | {
        "BROKER_URL": system.broker_url,
        "RESULT_URL": system.broker_url,
        "PYTHONPATH": str(folder),
    }
    argv = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "chained",
        "worker",
        "-P",
        "solo",
        "-n",
        "plain@%h",
        "--without-mingle",
        "-l",
        "INFO",
    ]
    log = folder / "plain.log"
    with log.open("wb") as stream:
        worker = subprocess.Popen(argv, cwd=folder, env=environ, stdout=stream, stderr=stream, start_new_session=True)
    try:
        eventually(lambda: b"ready." in log.read_bytes(), what="a plain worker")
        code = f"import chained; print(chained.start({URL!r}).get(timeout=20))"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=environ, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()
    finally:
        worker.kill()
        worker.wait()


def test_chain_and_pipeline_give_the_same(system, here, tmp_path):
    """The chain's result is the last agent's output."""
    before = _result_of_the_chain(system, tmp_path)
    folder = tmp_path / "skills" / "digest"
    folder.mkdir(parents=True)
    (folder / "digest.skill.yaml").write_text(SKILL)
    (folder / "handlers.py").write_text(HANDLERS)
    name = system.publish(here, folder)
    system.start_worker()
    run = system.ended(operations.start(here, name, {"url": URL}).run_id)
    assert run["steps"][-1]["tries"][-1]["output"] == {"summary": before}
    assert len([line for line in (SKILL + HANDLERS).splitlines() if line.strip()]) <= 10
