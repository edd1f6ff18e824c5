"""The anomalies that a chain of agents has, on real workers: each would happen without the declaration that prevents it."""

import subprocess

import pytest
from conftest import eventually

from app import operations
from app.runs.invariants import check

# Every handler writes a line when it begins, and goes on once its own gate file is there.
WAITING = """
    import pathlib
    import time

    FOLDER = pathlib.Path({folder!r})

    def _pass(ctx, output):
        name = ctx.run.agent
        with (FOLDER / "began").open("a") as stream:
            stream.write(f"{{name}} {{ctx.run.generation}}\\n")
        while not (FOLDER / f"{{name}}.{{ctx.run.generation}}").exists():
            if ctx.remaining_s() < 1:
                raise RuntimeError("nobody let it pass")
            time.sleep(0.02)
        return output
"""


@pytest.fixture
def world(tmp_path):
    folder = tmp_path / "world"
    folder.mkdir()
    return folder


def _let(world, *names):
    for name in names:
        (world / name).touch()


def _began(world, line):
    file = world / "began"
    return eventually(lambda: file.exists() and line in file.read_text().splitlines(), what=f"the beginning of {line}")


def _rules_hold(here):
    with here.store.engine.connect() as connection:
        assert check(connection) == []


def _outputs(found):
    tries = {entry["id"]: entry for step in found["steps"] for entry in step["tries"]}
    return {step["agent"]: tries[step["attempt_id"]]["output"] for step in found["steps"] if step["attempt_id"]}


def test_lost_update(system, here, write_skill, world):
    """A person's override while the dependent executes on the old output is not lost: that commit is refused."""
    handlers = (
        WAITING.format(folder=str(world))
        + """
    def price(ctx): return {"n": 1}
    def offer(ctx): return _pass(ctx, {"n": ctx.inputs["price"]["n"]})
    """
    )
    name = system.publish(
        here, write_skill("- {id: price}\n- {id: offer, depends_on: [price], idempotent: true}", handlers)
    )
    system.start_worker()
    run = operations.start(here, name, {}).run_id
    _began(world, "offer 1")
    operations.override(here, run, "price", {"n": 2}, by="ann", reason=None)
    _began(world, "offer 2")
    _let(world, "offer.1", "offer.2")
    found = system.ended(run)
    assert _outputs(found) == {"price": {"n": 2}, "offer": {"n": 2}}
    eventually(lambda: system.logged("step.stale_claim"), what="the refusal of the first commit")
    _rules_hold(here)


def test_stale_read(system, here, write_skill, world):
    """A snapshot reads the old output while the new one is made, and says so; a strong dependent waits for the new one."""
    handlers = (
        WAITING.format(folder=str(world))
        + """
    def price(ctx):
        return {"n": ctx.run.generation} if ctx.run.generation == 1 else _pass(ctx, {"n": 2})
    def start(ctx): return _pass(ctx, {})
    def strict(ctx): return {"n": ctx.inputs["price"]["n"]}
    def loose(ctx): return {"n": ctx.inputs["price"]["n"]}
    """
    )
    skill = """
    - {id: price, idempotent: true}
    - {id: start, idempotent: true}
    - {id: strict, depends_on: [price, start]}
    - id: loose
      depends_on: [{agent: price, consistency: snapshot, max_staleness_ms: 600000, on_stale: fail}, start]
    """
    name = system.publish(here, write_skill(skill, handlers))
    system.start_worker()
    run = operations.start(here, name, {}).run_id
    eventually(lambda: system.states(run)["price"] == "completed", what="the first price")
    operations.resume(here, run, by="me", from_agent="price")
    _began(world, "price 2")
    _let(world, "start.1")
    eventually(lambda: system.states(run)["loose"] == "completed", what="the one that does not wait")
    assert system.states(run)["strict"] == "pending"
    _let(world, "price.2")
    found = system.ended(run)
    outputs = _outputs(found)
    assert (outputs["strict"], outputs["loose"]) == ({"n": 2}, {"n": 1})
    (loose,) = (step["tries"][-1] for step in found["steps"] if step["agent"] == "loose")
    assert loose["stale_reads"]["price"]["superseded"] is True
    assert [line["agent"] for line in system.logged("step.stale_read")] == ["loose"]
    _rules_hold(here)


def test_join_of_two_branches_that_saw_different_generations(system, here, write_skill, world):
    """One branch was done and the other executes when their common source changes: the join sees one generation of it."""
    handlers = (
        WAITING.format(folder=str(world))
        + """
    def source(ctx): return {"n": ctx.run.generation}
    def left(ctx): return {"saw": ctx.inputs["source"]["n"]}
    def right(ctx): return _pass(ctx, {"saw": ctx.inputs["source"]["n"]})
    def join(ctx): return {name: ctx.inputs[name]["saw"] for name in ("left", "right")}
    """
    )
    skill = """
    - {id: source, idempotent: true}
    - {id: left, depends_on: [source], idempotent: true}
    - {id: right, depends_on: [source], idempotent: true}
    - {id: join, depends_on: [left, right]}
    """
    name = system.publish(here, write_skill(skill, handlers))
    system.start_worker()
    run = operations.start(here, name, {}).run_id
    _began(world, "right 1")
    eventually(lambda: system.states(run)["left"] == "completed", what="the left branch")
    operations.resume(here, run, by="me", from_agent="source")
    _let(world, "right.1")  # its commit is refused
    _began(world, "right 2")
    _let(world, "right.2")
    assert _outputs(system.ended(run))["join"] == {"left": 2, "right": 2}
    _rules_hold(here)


OBSERVING = """
    import subprocess

    REPO = {repo!r}

    def repo_head(ctx):
        return subprocess.run(["git", "-C", REPO, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()

    def survey(ctx):
        head = repo_head(ctx)
        ctx.observed("repo", head, probe="repo_head")
        return {{"head": head}}

    def plan(ctx): return {{"head": ctx.inputs["survey"]["head"]}}

    def apply(ctx): return {{"head": repo_head(ctx), "planned": ctx.inputs["plan"]["head"]}}
"""
SURVEY = """
    - {id: survey, idempotent: true}
    - {id: plan, depends_on: [survey], idempotent: true}
    - {id: apply, depends_on: [plan], requires_human_approval: true}
"""


def _commit(repo):
    git = ["git", "-C", str(repo), "-c", "user.name=t", "-c", "user.email=t@t"]
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "more"], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repo(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path / "repo")], check=True)
    _commit(tmp_path / "repo")
    return tmp_path / "repo"


def test_world_that_moves_while_a_person_decides(system, here, write_skill, repo):
    """The repository's head moves before the approval: what was planned for the old one is planned anew, and asked again."""
    name = system.publish(here, write_skill(SURVEY, OBSERVING.format(repo=str(repo))))
    system.start_worker()
    run = operations.start(here, name, {}).run_id
    eventually(lambda: system.run(run)["state"] == "suspended", what="the question")
    new = _commit(repo)
    operations.decide(here, run, "apply", approved=True, by="ann")
    eventually(
        lambda: (found := system.run(run))["state"] == "suspended" and found["steps"][2]["generation"] == 2,
        what="the question about the new plan",
    )
    found = system.run(run)
    assert [step["generation"] for step in found["steps"]] == [2, 2, 2]
    assert found["steps"][0]["stale_reruns"] == 1
    operations.decide(here, run, "apply", approved=True, by="ann")
    assert _outputs(system.ended(run))["apply"] == {"head": new, "planned": new}
    (rerun,) = system.logged("step.rerun")
    assert (rerun["code"], rerun["agent"]) == ("stale_input", "apply")
    # From what to what, the file does not let the logs say.
    assert rerun["message"] == "repo, which survey observed, has changed."
    told = [entry["error"]["message"] for entry in found["steps"][2]["tries"] if entry["error"]]
    assert [new in message for message in told] == [True]
    _rules_hold(here)


def test_world_that_never_stands_still(system, here, write_skill, world):
    """Three times it is done again; then a dead letter tells what was seen, and what is now. A resume allows it again."""
    handlers = """
    import pathlib

    FILE = pathlib.Path({file!r})

    def ticks(ctx):
        if not FILE.with_suffix(".moves").exists():
            return 0
        number = int(FILE.read_text()) + 1 if FILE.exists() else 1
        FILE.write_text(str(number))
        return number

    def survey(ctx):
        ctx.observed("clock", ticks(ctx), probe="ticks")

    def apply(ctx): return {{}}
    """
    skill = "- {id: survey, idempotent: true}\n- {id: apply, depends_on: [survey]}"
    name = system.publish(here, write_skill(skill, handlers.format(file=str(world / "clock"))))
    _let(world, "clock.moves")
    system.start_worker()
    run = operations.start(here, name, {}).run_id
    found = system.ended(run)
    assert found["state"] == "failed"
    assert [step["generation"] for step in found["steps"]] == [4, 4]
    error = found["steps"][1]["tries"][-1]["error"]
    assert error["code"] == "stale_input"
    assert error["message"] == "clock, which survey observed as 7, is 8 now. survey was done again 3 times."
    assert error["details"]["values"] == {"survey.clock": {"old": 7, "new": 8}}
    (world / "clock.moves").unlink()
    operations.resume(here, run, by="me")
    assert system.ended(run)["state"] == "completed"
    _rules_hold(here)
