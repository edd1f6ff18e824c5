"""People and loops, with real workers: approvals, rejections, review rounds, failure modes that let a run go on."""

import pytest
from conftest import eventually
from pipelines import agent, pipeline

from app import operations
from app.errors import InvalidOutput, NotPossible, UnknownName
from app.pipelines.model import FailureMode, OnRefused, RetryPolicy

ONE_TRY = RetryPolicy(max_attempts=1)
HANDLERS = """
    import pathlib

    def _note(ctx, text):
        with (pathlib.Path(ctx.run.input["folder"]) / ctx.run.agent).open("a") as file:
            file.write(text + " ")

    def plan(ctx):
        _note(ctx, "planned")
        return {"amount": 7}

    def pay(ctx):
        _note(ctx, f"paid {ctx.inputs['plan']['amount']}")
        return {}

    def coder(ctx):
        confidence = 0.5 if ctx.feedback is None else ctx.feedback["read"]["coder"]["confidence"] + 0.4
        _note(ctx, str(confidence))
        return {"confidence": confidence}

    def reviewer(ctx):
        return {"approved": True}

    def breaks(ctx):
        raise ValueError("no")

    def after(ctx):
        _note(ctx, ",".join(sorted(ctx.inputs)))
        return {}
"""
PAID = pipeline(
    agent("plan", handler="handlers:plan", queue="handlers"),
    agent("pay", "plan", handler="handlers:pay", queue="handlers", requires_human_approval=True),
)


@pytest.fixture
def folder(tmp_path, write_skill):
    write_skill("- {id: unused}", HANDLERS)
    return tmp_path


def _notes(folder, name) -> list[str]:
    file = folder / name
    return file.read_text().split() if file.exists() else []


def _start(here, definition, folder):
    operations.publish(here, definition)
    return operations.start(here, definition.name, {"folder": str(folder)}).run_id


def _suspended(system, run_id):
    eventually(lambda: system.run(run_id)["state"] == "suspended", what="a question to a person")


def test_approved_step_is_executed_once(system, here, folder):
    """The run waits for a person without a worker, also while none runs; the approval lets it go on."""
    worker = system.start_worker()
    run_id = _start(here, PAID, folder)
    _suspended(system, run_id)
    assert _notes(folder, "pay") == []
    worker.kill()
    worker.wait()
    assert operations.decide(here, run_id, "pay", approved=True, by="ann") == "approved"
    system.start_worker()
    assert system.ended(run_id)["state"] == "completed"
    assert _notes(folder, "pay") == ["paid", "7"]
    with pytest.raises(NotPossible):
        operations.decide(here, run_id, "pay", approved=True, by="ann")


def test_changed_input_is_asked_again(system, here, folder):
    """pydantic-ai #5536 the other way round: what was approved is what is done, and nothing else."""
    system.start_worker()
    run_id = _start(here, PAID, folder)
    _suspended(system, run_id)
    asked = operations_digest(here, run_id)
    operations.override(here, run_id, "plan", {"amount": 9_000}, by="ann")
    eventually(lambda: operations_digest(here, run_id) != asked, what="another question")
    with pytest.raises(NotPossible):
        operations.decide(here, run_id, "pay", approved=True, by="bob", digest=asked)
    _suspended(system, run_id)
    operations.decide(here, run_id, "pay", approved=True, by="bob", digest=operations_digest(here, run_id))
    system.ended(run_id)
    assert _notes(folder, "pay") == ["paid", "9000"]


def operations_digest(here, run_id) -> str:
    from app.runs.reads import Reads

    return Reads(here.store.engine).approval_list(run_id)[-1]["digest"]


def test_review_loop_ends(system, here, folder):
    """A refused gate feeds what it read back to the coder, in a new generation, until it holds or the rounds are used up."""

    def loop(name, at_least):
        return pipeline(
            agent("coder", handler="handlers:coder", queue="handlers", idempotent=True),
            agent(
                "reviewer",
                "coder",
                handler="handlers:reviewer",
                queue="handlers",
                gate=f"{{{{coder.confidence}}}} >= {at_least}",
                on_refused=OnRefused("coder", max_rounds=2),
            ),
            version=name,
        )

    system.start_worker()
    run = system.ended(_start(here, loop("1", 0.85), folder))
    assert (run["state"], _notes(folder, "coder")) == ("completed", ["0.5", "0.9"])
    assert [step["generation"] for step in run["steps"]] == [2, 2]
    (folder / "coder").unlink()
    run = system.ended(_start(here, loop("2", 9), folder))
    assert (run["state"], len(_notes(folder, "coder"))) == ("failed", 3)


@pytest.mark.parametrize("mode", [FailureMode.HALT_PIPELINE, FailureMode.CONTINUE])
def test_resume_of_a_used_up_review_loop_does_what_its_plan_said(system, here, folder, mode):
    """The gated agent is tried once more and nothing else; what ran without it, and may not be repeated, is not."""
    on = {"queue": "handlers", "idempotent": True}
    definition = pipeline(
        agent("coder", handler="handlers:coder", **on),
        agent("reviewer", "coder", handler="handlers:reviewer", **on),
        agent("deployer", "reviewer", handler="handlers:after", gate="{{coder.confidence}} >= 9", failure_mode=mode,
              on_refused=OnRefused("coder", max_rounds=1), reads=("coder", "reviewer"), **on),
        agent("notify", "deployer", handler="handlers:after", queue="handlers"),
    )  # fmt: skip
    system.start_worker()
    run_id = _start(here, definition, folder)
    before = system.ended(run_id)
    plan = operations.plan_resume(here, run_id, "ann")
    kept = "re-run" if mode == FailureMode.HALT_PIPELINE else "stale"
    assert [entry["verdict"] for entry in plan["agents"]] == ["reuse", "reuse", "re-run", kept]
    assert (plan["effects"], plan["loops"]) == ([], [])
    operations.resume(here, run_id, "ann")
    after = system.ended(run_id)
    more = [len(now["tries"]) - len(was["tries"]) for now, was in zip(after["steps"], before["steps"], strict=True)]
    assert more == [0, 0, 1, 0]
    assert [step["generation"] for step in after["steps"]] == [step["generation"] for step in before["steps"]]


@pytest.mark.parametrize(
    ("mode", "after", "state"),
    [
        (FailureMode.HALT_PIPELINE, "pending", "failed"),
        (FailureMode.SKIP_DEPENDENTS, "skipped", "completed"),
        (FailureMode.CONTINUE, "completed", "completed"),
    ],
)
def test_failure_modes_end_as_they_say(system, here, folder, mode, after, state):
    """One branch breaks; what depends on it waits, is skipped, or goes on without its output."""
    definition = pipeline(
        agent("breaks", handler="handlers:breaks", queue="handlers", failure_mode=mode, retry_policy=ONE_TRY),
        agent("after", "breaks", handler="handlers:after", queue="handlers"),
    )
    system.start_worker()
    run = system.ended(_start(here, definition, folder))
    assert [step["state"] for step in run["steps"]] == ["discarded", after]
    assert (run["state"], run["partial"]) == (state, state == "completed")


def test_override_must_fit_and_name_an_agent(system, here, folder):
    """A person's output is checked as an agent's is, and a mistyped agent is told the nearest."""
    schema = {"type": "object", "properties": {"amount": {"type": "number"}}, "required": ["amount"]}
    definition = pipeline(agent("plan", handler="handlers:plan", queue="handlers", schema=schema))
    system.start_worker()
    run_id = _start(here, definition, folder)
    system.ended(run_id)
    with pytest.raises(InvalidOutput, match="amount"):
        operations.override(here, run_id, "plan", {"amount": "much"}, by="ann")
    with pytest.raises(UnknownName, match="plan"):
        operations.override(here, run_id, "plam", {"amount": 1}, by="ann")


def test_cancelled_run_stops(system, here, folder):
    """While it waits for a person: nothing of it is executed any more."""
    system.start_worker()
    run_id = _start(here, PAID, folder)
    _suspended(system, run_id)
    operations.cancel(here, run_id, by="ann", reason="wrong customer")
    assert system.run(run_id)["state"] == "cancelled"
    with pytest.raises(NotPossible):
        operations.decide(here, run_id, "pay", approved=True, by="bob")
