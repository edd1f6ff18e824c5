"""The article's claims, one test each: what goes wrong when agents are chained as if it were prompt engineering.

Each docstring gives the article's point in our words. The pipeline is the bundled twin of the article's (examples/bugfix)
with real workers, the real SDK, the simulator over HTTP, and a real git repository.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import psycopg
import pytest
import yaml
from conftest import ROOT, eventually
from deploying import EXAMPLE, commits_of, git

from app import embedded, operations
from app.cli.sample_repository import make_repository, run_input
from app.errors import NotPossible
from app.execution import canvas
from app.runs.database import migrate
from app.simulator.script import load, parse
from app.simulator.server import Simulator

AGENTS = ["researcher", "coder", "reviewer", "deployer"]
RULES = yaml.safe_load((EXAMPLE / "simulator.yaml").read_text())["rules"]
RESEARCHER, CODER, REVIEWER = ({**rule, "delay_ms": 0} for rule in RULES)
# A twin of the article's own file: its fields and values.
ARTICLES_FILE = ROOT / "tests" / "data" / "article" / "multi-agent-orchestration.skill.yaml"
FIVE = """
    - {id: one, idempotent: true}
    - {id: two, depends_on: [one], idempotent: true}
    - {id: three, depends_on: [two], idempotent: true}
    - {id: four, depends_on: [three], idempotent: true}
    - {id: five, depends_on: [four], idempotent: true}
"""
FIVE_HANDLERS = """
    import pathlib, threading

    def _begin(ctx):
        folder = pathlib.Path(ctx.run.input["folder"])
        with (folder / "begun").open("a") as file:
            file.write(f"{ctx.run.agent}\\n")
        return folder

    def one(ctx):
        _begin(ctx)

    two = three = five = one

    def four(ctx):
        folder = _begin(ctx)
        pause = threading.Event()
        for _ in range(3000):
            if (folder / "go").exists():
                return {}
            pause.wait(0.01)
"""


class Story:
    """The twin's pipeline, published, with a fresh repository and a simulator that answers for its agents."""

    def __init__(self, system, here, simulator, folder: Path) -> None:
        self.system, self.here, self.simulator = system, here, simulator
        self.repo = folder / "repo"
        make_repository(EXAMPLE / "repository", self.repo)
        self.name = system.publish(here, EXAMPLE)
        self.answer()

    def answer(self, *first: dict) -> None:
        """These rules before the usual ones."""
        self.simulator.use(parse({"rules": [*first, RESEARCHER, CODER, REVIEWER]}))

    def start(self, **options):
        return operations.start(self.here, self.name, run_input(self.repo), **options).run_id

    def run(self, **options) -> dict:
        return self.system.ended(self.start(**options))

    def calls(self) -> Counter:
        """How often each agent asked the model."""
        firsts = {rule["match"]["system"]: name for rule, name in zip(RULES, AGENTS, strict=False)}
        asked = [str(request.body["system"]) for request in self.simulator.requests]
        return Counter(name for text in asked for first, name in firsts.items() if text.startswith(first))


@pytest.fixture
def story(system, monkeypatch, tmp_path):
    with Simulator(seed=1) as simulator:
        system.environ |= {"ANTHROPIC_BASE_URL": simulator.url, "STEPFAST_SKILLS": str(EXAMPLE)}
        with system.here(monkeypatch) as here:
            yield Story(system, here, simulator, tmp_path)


def _slow(rule: dict, **changes) -> dict:
    return {**rule, **changes}


def test_no_agent_acts_on_stale_state(story):
    """Stale state: what an agent reads is the committed output of the agent before it, pinned by attempt and hash."""
    story.system.start_worker()
    run = story.run()
    tries = {step["agent"]: step["tries"][-1] for step in run["steps"]}
    for agent, before in (("coder", "researcher"), ("reviewer", "coder"), ("deployer", "reviewer")):
        read = tries[agent]["reads"][before]
        assert (read["attempt"], read["hash"]) == (tries[before]["id"], tries[before]["output_hash"])
        assert tries[agent]["started_at"] >= tries[before]["ended_at"]


def test_no_task_is_dropped_silently(story):
    """Dropped tasks: an agent that fails for good leaves a dead letter, and a run that says failed."""
    story.answer({"match": CODER["match"], "status": 400})
    story.system.start_worker()
    run = story.run()
    assert [step["state"] for step in run["steps"]] == ["completed", "discarded", "pending", "pending"]
    with psycopg.connect(story.system.database_url.replace("+psycopg", "")) as connection:
        letters = connection.execute(
            "select agent, code from stepfast.dead_letters where resolved_at is null"
        ).fetchall()
    assert letters == [("coder", "author_mistake")]
    assert story.system.logged("step.discarded")[0]["run_id"] == run["id"]


def test_timeout_does_not_run_the_chain_again(story, tmp_path):
    """Re-run from scratch: when one agent times out, that agent alone is asked again."""
    folder = tmp_path / "impatient"
    shutil.copytree(EXAMPLE, folder)
    text = (folder / "bugfix.skill.yaml").read_text()
    (folder / "bugfix.skill.yaml").write_text(
        text.replace("name: bugfix", "name: impatient").replace("timeout_ms: 60000", "timeout_ms: 400")
    )
    story.system.environ["STEPFAST_SKILLS"] = str(folder)
    story.name = story.system.publish(story.here, folder)
    story.answer(_slow(CODER, delay_ms=30_000, times=1))
    story.system.start_worker()
    run = story.run()
    assert run["state"] == "completed"
    assert story.calls() == {"researcher": 1, "coder": 2, "reviewer": 1}
    assert [entry["error"] and entry["error"]["code"] for entry in run["steps"][1]["tries"]] == ["timed_out", None]


def test_everything_that_happened_can_be_seen(story):
    """No trace: every attempt has a start and an end in the run's events, in order, and the logs carry the run's id."""
    story.system.start_worker()
    run = story.run()
    with psycopg.connect(story.system.database_url.replace("+psycopg", "")) as connection:
        rows = connection.execute("select name, agent from stepfast.events order by seq").fetchall()
    expected = [(name, agent) for agent in AGENTS for name in ("step.claimed", "step.completed")]
    assert rows == [("run.enqueued", None), *expected, ("run.completed", None)]
    for name in ("step.claimed", "step.input", "model.called", "step.output", "step.completed"):
        lines = story.system.logged(name)
        assert {line["trace_id"] for line in lines} == {run["id"].replace("-", "")}
    assert [line["agent"] for line in story.system.logged("step.input")] == AGENTS


def test_deployer_does_not_proceed_when_the_review_fails(story):
    """Failure isolation: the reviewer fails, so the deployer never starts, and the repository is as it was."""
    story.answer({"match": REVIEWER["match"], "stop_reason": "refusal"})
    story.system.start_worker()
    run = story.run()
    assert (run["state"], story.system.states(run["id"])["deployer"]) == ("failed", "pending")
    assert commits_of(story.repo, run["id"]) == []


@pytest.mark.parametrize(
    ("rule", "agent"),
    [
        ({**CODER, "reply": {**CODER["reply"], "confidence": 0.84}}, "reviewer"),
        ({**REVIEWER, "reply": {**REVIEWER["reply"], "approved": False}}, "deployer"),
    ],
)
def test_gates_stand_between_the_agents(story, rule, agent):
    """Explicit gates: an unsure coder never reaches the reviewer, an unapproved change never the deployer."""
    story.answer(rule)
    story.system.start_worker()
    run = story.run()
    (attempt,) = next(step for step in run["steps"] if step["agent"] == agent)["tries"]
    assert (run["state"], attempt["error"]["code"]) == ("failed", "gate_refused")
    assert commits_of(story.repo, run["id"]) == []


def test_message_delivered_twice_changes_nothing(story):
    """Idempotence: every message is delivered twice, and each agent still runs once, with one commit at the end."""
    story.system.start_worker()
    run_id = story.start()
    pipeline = story.here.definition(_hash(story))
    for agent in AGENTS:
        canvas.signature(pipeline, run_id, agent).apply_async()
    run = story.system.ended(run_id)
    for agent in AGENTS:
        canvas.signature(pipeline, run_id, agent).apply_async()
    eventually(lambda: len(story.system.logged("step.stale_claim")) >= len(AGENTS), what="the late messages")
    assert run["state"] == "completed"
    assert [len(step["tries"]) for step in story.system.run(run_id)["steps"]] == [1, 1, 1, 1]
    assert story.calls() == {"researcher": 1, "coder": 1, "reviewer": 1}
    assert len(commits_of(story.repo, run_id)) == 1


def test_step_run_again_gives_the_identical_result(story):
    """Idempotence: the deployer is killed after its commit and before its record; run again, it finds that commit."""
    story.system.start_worker(queues="agents")
    victim = story.system.start_worker(queues="handlers", pool="solo")
    run_id = story.start()
    # Killed when the branch appears: after the effect, and before or after its record, as it happens.
    branches = story.repo / ".git" / "refs" / "heads" / "stepfast"
    eventually(
        lambda: branches.exists() and [ref for ref in branches.iterdir() if ref.suffix != ".lock"], what="the branch"
    )
    os.killpg(victim.pid, signal.SIGKILL)
    with_commit = commits_of(story.repo, run_id)
    story.system.start_worker(queues="handlers", pool="solo")
    run = story.system.ended(run_id, within_s=40)
    assert run["state"] == "completed"
    assert commits_of(story.repo, run_id) == with_commit
    assert run["steps"][3]["tries"][-1]["output"]["commit"] == with_commit[0]


def test_key_of_the_article_is_the_runs_own(story):
    """Idempotence keys: `{{task_id}}:coder` is the run's id and the agent, and starting twice with one key is one run."""
    story.system.start_worker()
    first, second = story.start(key="ticket-7"), story.start(key="ticket-7")
    run = story.system.ended(first)
    assert first == second
    assert run["steps"][1]["tries"][0]["key"] == f"{first}:coder"
    assert story.calls()["coder"] == 1


def test_everything_is_killed_after_agent_three_of_five_and_goes_on_at_four(system, write_skill, tmp_path, monkeypatch):
    """Partial failure: three of five agents are done, then workers, Postgres and broker are killed; it resumes at four."""
    folder, home, begun = write_skill(FIVE, FIVE_HANDLERS), tmp_path / "own", tmp_path / "begun"
    with embedded.servers(home) as own:
        migrate(own.database_url)
        system.use(own.database_url, own.broker_url)
        with system.here(monkeypatch) as here:
            run_id = operations.start(here, system.publish(here, folder), {"folder": str(tmp_path)}).run_id
            system.start_worker(STEPFAST_LEASE_S="3")
            eventually(lambda: begun.exists() and "four" in begun.read_text(), what="agent four")
        system.stop()
        for pid in embedded.running(home).values():
            os.kill(pid, signal.SIGKILL)
        with embedded.servers(home):
            (tmp_path / "go").touch()
            system.start_worker(STEPFAST_LEASE_S="3")
            run = system.ended(run_id)
            system.stop()
    assert run["state"] == "completed"
    assert begun.read_text().split() == ["one", "two", "three", "four", "four", "five"]


def test_finished_agents_are_not_paid_for_again(story):
    """Partial failure: three agents are done, then every worker is killed; the next ones ask the model nothing."""
    story.system.start_worker(queues="agents")
    run_id = story.start()
    eventually(lambda: story.system.states(run_id)["reviewer"] == "completed", what="three agents")
    story.system.stop()
    before = story.calls()
    story.system.start_worker()
    run = story.system.ended(run_id)
    assert run["state"] == "completed"
    assert story.calls() == before == {"researcher": 1, "coder": 1, "reviewer": 1}
    assert len(commits_of(story.repo, run_id)) == 1


def test_failed_run_is_resumed_not_restarted(story):
    """Partial failure: after the cause is mended, resume asks the failed agent again and nobody else."""
    story.answer({"match": REVIEWER["match"], "status": 403})
    story.system.start_worker()
    run = story.run()
    assert (run["state"], story.calls()) == ("failed", {"researcher": 1, "coder": 1, "reviewer": 1})
    story.answer()  # the count begins anew
    operations.resume(story.here, run["steps"][0]["run_id"], "me")
    assert story.system.ended(run["id"])["state"] == "completed"
    assert story.calls() == {"reviewer": 1}
    with pytest.raises(NotPossible):
        operations.resume(story.here, run["id"], "me")


def test_deployed_commit_passes_the_repositorys_tests(story):
    """The point of it all: a real effect. The repository's test fails before, and passes on the deployer's branch."""
    test = [sys.executable, "-m", "unittest"]
    assert subprocess.run(test, cwd=story.repo, capture_output=True, check=False).returncode != 0
    story.system.start_worker()
    run = story.run()
    git(story.repo, "checkout", "--quiet", run["steps"][3]["tries"][0]["output"]["branch"])
    assert subprocess.run(test, cwd=story.repo, capture_output=True, check=False).returncode == 0


def test_articles_own_file_runs_as_it_stands(system, monkeypatch, tmp_path):
    """The skill file: audited, completed by the starter, and run against the simulator without a change to it."""
    from app.pipelines import starter
    from app.settings import MODEL_ALIASES

    folder = tmp_path / "article"
    folder.mkdir()
    shutil.copy(ARTICLES_FILE, folder)
    starter.complete(folder / ARTICLES_FILE.name, aliases=MODEL_ALIASES, handler_modules=())
    with Simulator(load(folder / "simulator.yaml")) as simulator:
        system.environ |= {"ANTHROPIC_BASE_URL": simulator.url, "STEPFAST_SKILLS": str(folder)}
        with system.here(monkeypatch) as here:
            name = system.publish(here, folder)
            system.start_worker()
            run = system.ended(operations.start(here, name, {}).run_id)
    assert (name, run["state"]) == ("multi-agent-orchestration", "completed")
    (away,) = system.logged("checkpoint.cache_away")
    assert away["message"] == "STEPFAST_REDIS_URL is not set: outputs are read from Postgres."
    assert {line["model"] for line in system.logged("model.aliased")} == {"claude-3-5-sonnet", "claude-3-opus"}


def _hash(story) -> str:
    from app.runs.reads import Reads

    found = Reads(story.here.store.engine).current_hash(story.name)
    assert found is not None
    return found
