"""`resume --from`, `--plan` and `--failed`: a resume does what its plan said, and bulk resumes send a canary."""

import re

import commanding
import pytest
from commanding import complete, give_up
from pipelines import ONE_TRY, agent, line, pipeline

from app import operations
from app.cli import bulk
from app.pipelines.model import FailureMode, OnRefused, Prompt
from app.runs import failed
from app.runs.database import engine
from app.runs.orders import Orders
from app.runs.store import Bid, Ending, Paid, Store

PRICED = Paid("claude-sonnet-5-5", "req_1", {"input_tokens": 10}, 0.25)
PLAN_KEYS = {
    *("run_id", "pipeline", "pinned", "published", "published_changes", "agents", "effects", "approvals", "loops"),
    *("saved_usd", "estimate_usd", "unpriced"),
}
AGENT_KEYS = {
    "past_ttl",
    *("agent", "verdict", "reason", "generation", "changed", "published_changes", "cost_usd", "effects", "approval"),
}


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """`stepfast` inside this process; each call gives a `commanding.Answer`."""
    monkeypatch.setenv("STEPFAST_HOME", str(tmp_path / "home"))
    return commanding.in_process(capsys)


@pytest.fixture
def store(system, here):
    opened = engine(system.database_url, pool_max=1)
    yield Store(opened)
    opened.dispose()


def _begin(store, definition, run_input=None):
    store.publish(definition)
    return store.enqueue(definition.name, run_input or {})[0]


def _failed(store, definition, *done, given_up, **error):
    run_id = _begin(store, definition)
    for name in done:
        complete(store, definition, run_id, name, {"done": True}, PRICED)
    give_up(store, definition, run_id, given_up, **error)
    return run_id


def _verdicts(plan) -> dict[str, str]:
    return {entry["agent"]: entry["verdict"] for entry in plan["agents"]}


STEPS = """
    import pathlib

    def _do(ctx):
        with (pathlib.Path(ctx.run.input["folder"]) / ctx.run.agent).open("a") as file:
            file.write("x")
        return {"of": sorted(ctx.inputs)}

    def a(ctx): return _do(ctx)
    def b(ctx):
        if not (pathlib.Path(ctx.run.input["folder"]) / "mended").exists():
            raise ValueError("not mended")
        return _do(ctx)
    def c(ctx): return _do(ctx)
    def d(ctx): return _do(ctx)
"""


@pytest.mark.parametrize(
    ("mode", "options", "expected"),
    [
        (FailureMode.HALT_PIPELINE, [], {"a": "reuse", "b": "re-run", "c": "reuse", "d": "re-run"}),
        (FailureMode.HALT_PIPELINE, ["--from", "b"], {"a": "reuse", "b": "re-run", "c": "reuse", "d": "re-run"}),
        (FailureMode.HALT_PIPELINE, ["--from", "a"], {"a": "re-run", "b": "re-run", "c": "reuse", "d": "re-run"}),
        (FailureMode.SKIP_DEPENDENTS, [], {"a": "reuse", "b": "re-run", "c": "reuse", "d": "re-run"}),
        (FailureMode.CONTINUE, [], {"a": "reuse", "b": "re-run", "c": "reuse", "d": "stale"}),
    ],
)
def test_resume_does_what_its_plan_said(cli, system, here, write_skill, tmp_path, mode, options, expected):
    """What the plan re-runs is executed once more, what it reuses is not, and planning changes nothing."""
    on = {"queue": "handlers", "idempotent": True, "retry_policy": ONE_TRY}
    definition = pipeline(
        agent("a", handler="handlers:a", **on),
        agent("c", handler="handlers:c", **on),
        agent("b", "a", "c", handler="handlers:b", **on, failure_mode=mode),
        agent("d", "b", handler="handlers:d", **on),
    )
    write_skill("- {id: unused}", STEPS)
    system.start_worker()
    operations.publish(here, definition)
    run_id = operations.start(here, definition.name, {"folder": str(tmp_path)}).run_id
    before = system.ended(run_id)
    plan = cli("resume", run_id, "--plan", *options, "--json").json
    assert plan.keys() == PLAN_KEYS
    assert all(entry.keys() == AGENT_KEYS for entry in plan["agents"])
    assert system.run(run_id) == before
    assert _verdicts(plan) == expected
    (tmp_path / "mended").touch()
    resumed = cli("resume", run_id, *options, "--watch", "--json")
    assert (resumed.code, resumed.json["state"]) == (0, "completed")
    for step, was, planned in zip(resumed.json["steps"], before["steps"], plan["agents"], strict=True):
        again = len(step["tries"]) - len(was["tries"])
        assert again == (1 if planned["verdict"] == "re-run" else 0), step["agent"]
        assert step["generation"] == planned["generation"]


def test_plan_says_what_changed(cli, store, here, write_skill):
    """The run stays on its definition: the published one, and in what it differs; the handler's code of this machine."""
    old = pipeline(
        agent("ask", prompt=Prompt("You plan.", "Plan.")),
        agent("act", "ask", handler="handlers:act", queue="handlers"),
    )
    folder = write_skill("- {id: unused}", "def act(ctx): return {}\n")
    run_id = _begin(store, old)
    complete(store, old, run_id, "ask", {"done": True}, PRICED)
    bid, _ = _claimed(store, old, run_id, "act", code_hash="0" * 64)
    store.complete(bid.step, bid.attempt_id, {}, Paid())
    assert "published now" not in cli("resume", run_id, "--plan", "--from", "act").out
    store.publish(
        pipeline(
            agent("ask", prompt=Prompt("You plan well.", "Plan."), timeout_ms=5, schema={"type": "object"}),
            agent("act", "ask", handler="handlers:act", queue="handlers", gate="{{ask.n}} > 1"),
            agent("more", "act"),
            version="2",
        )
    )
    plan = cli("resume", run_id, "--plan", "--from", "act", "--json").json
    assert (plan["pinned"]["version"], plan["published"]["version"]) == ("1", "2")
    assert plan["published_changes"] == {
        "ask": ["prompt", "schema", "definition (timeout_ms)"],
        "act": ["definition (gate)"],
        "more": ["it is new"],
    }
    assert [entry["changed"] for entry in plan["agents"]] == [[], ["handler code"]]
    shown = cli("resume", run_id, "--plan", "--from", "act").out
    assert "The run stays on the definition that it pinned, 1 (" in shown
    assert (
        "It differs in ask: prompt, schema, definition (timeout_ms); act: definition (gate); more: it is new." in shown
    )
    assert folder.exists()


def _claimed(store, definition, run_id, name, **options):
    from uuid import uuid4

    from app.runs.store import StepKey

    fields = {"timeout_ms": 60_000, "wait_ms": 1_000, "repeatable": False, **options}
    bid = Bid(StepKey(run_id, name), definition.by_id[name], definition.hash, uuid4(), 1, **fields)
    claim = store.claim(bid)
    assert claim.outcome == "claimed"
    return bid, claim


def test_plan_counts_money_effects_and_approvals(cli, store):
    """What is not paid again, what would be, which effects a new generation repeats, and who is asked again."""
    definition = pipeline(
        agent("ask"),
        agent("check", "ask"),
        agent("pay", "check", handler="handlers:pay", queue="handlers", requires_human_approval=True),
        agent("tell", "pay", handler="handlers:tell", queue="handlers"),
    )
    run_id = _begin(store, definition)
    complete(store, definition, run_id, "ask", {}, PRICED)
    complete(store, definition, run_id, "check", {}, PRICED)
    bid, _ = _claimed(store, definition, run_id, "pay")
    store.suspend(bid.step, bid.attempt_id, "d1", {}, None)
    Orders(store.engine).decide(run_id, "pay", approved=True, digest="d1", by="ann", reason=None)
    bid, _ = _claimed(store, definition, run_id, "pay")
    store.begin_effect(bid.step, bid.attempt_id, "charge-7")
    store.end_effect(bid.step, bid.attempt_id, "charge-7", {"receipt": 1})
    store.complete(bid.step, bid.attempt_id, {}, Paid())
    give_up(store, definition, run_id, "tell")
    plain = cli("resume", run_id, "--plan", "--json").json
    assert _verdicts(plain) == {"ask": "reuse", "check": "reuse", "pay": "reuse", "tell": "re-run"}
    assert (plain["saved_usd"], plain["estimate_usd"], plain["effects"], plain["approvals"]) == (0.5, 0, [], [])
    plan = cli("resume", run_id, "--plan", "--from", "check", "--json").json
    assert (plan["saved_usd"], plan["estimate_usd"], plan["unpriced"]) == (0.25, 0.25, [])
    assert plan["effects"] == [{"agent": "pay", "key": "charge-7", "state": "happened"}]
    assert plan["approvals"] == ["pay"]
    shown = cli("resume", run_id, "--plan", "--from", "check")
    assert "Effects that would be repeated: pay: charge-7 (happened)." in shown.out
    assert "Approval will be asked again for pay." in shown.out
    assert "Not paid again: $0.2500. To be spent, as before: $0.2500." in shown.out
    assert shown.following == ["resume", str(run_id)[:8], "--from", "check"]


def test_plan_names_effects_that_are_not_on_record(cli, store):
    """A handler that is not repeatable, and did not record its effects, does again whatever it does."""
    definition = pipeline(agent("pay", handler="handlers:pay", queue="handlers"), agent("last", "pay"))
    run_id = _begin(store, definition)
    bid, _ = _claimed(store, definition, run_id, "pay")
    store.complete(bid.step, bid.attempt_id, {}, Paid())
    give_up(store, definition, run_id, "last")
    plan = cli("resume", run_id, "--plan", "--from", "pay", "--json").json
    assert plan["effects"] == [{"agent": "pay", "key": None, "state": "unrecorded"}]
    assert plan["unpriced"] == ["last"]


LOOPED = pipeline(
    agent("coder"),
    agent("deployer", "coder", handler="handlers:deploy", queue="handlers", requires_human_approval=True,
          gate="{{coder.sure}} == true", on_refused=OnRefused("coder", 2)),
)  # fmt: skip


def _refused(store, run_id, rerun):
    """The deployer's gate refuses; `rerun` is None where its rounds are used up."""
    bid, _ = _claimed(store, LOOPED, run_id, "deployer")
    error = {"code": "gate_refused", "who": "operator", "message": "No.", "next_step": "", "details": {}}
    store.fail(
        bid.step, bid.attempt_id, error, Paid(), Ending("rerun" if rerun else "discard", rerun=rerun, feedback={})
    )


def test_plan_knows_what_a_gate_refused(cli, store):
    """What was never executed repeats nothing, and nobody is asked before a gate that would refuse the same again."""
    run_id = _begin(store, LOOPED)
    for rerun in ("coder", "coder", None):
        complete(store, LOOPED, run_id, "coder", {"sure": False}, PRICED)
        _refused(store, run_id, rerun)
    plan = cli("resume", run_id, "--plan", "--json").json
    assert _verdicts(plan) == {"coder": "reuse", "deployer": "re-run"}
    assert plan["agents"][1]["reason"] == "it was discarded; its gate would refuse the same values"
    assert (plan["effects"], plan["approvals"], plan["loops"]) == ([], [], [])
    plan = cli("resume", run_id, "--plan", "--from", "coder", "--json").json
    assert (plan["effects"], plan["approvals"]) == ([], ["deployer"])
    assert plan["loops"] == [{"agent": "deployer", "rerun": "coder", "rounds": 2}]
    shown = cli("resume", run_id, "--plan", "--from", "coder").out
    assert "Approval will be asked for deployer." in shown
    assert (
        "Where the gate of deployer refuses, coder and what depends on it are done again, at most 2 more times."
        in shown
    )
    Orders(store.engine).override(run_id, "coder", {"sure": True}, "ann", None)
    plan = cli("resume", run_id, "--plan", "--json").json
    assert (plan["agents"][1]["reason"], plan["approvals"]) == ("it was discarded", ["deployer"])


def test_plan_names_effects_of_what_failed_after_it_began(cli, store):
    """A handler that executed and raised may have done something: its retry by a plain resume does that again, too."""
    definition = pipeline(agent("pay", handler="handlers:pay", queue="handlers"))
    run_id = _begin(store, definition)
    bid, _ = _claimed(store, definition, run_id, "pay")
    store.begin_effect(bid.step, bid.attempt_id, "charge")
    store.end_effect(bid.step, bid.attempt_id, "charge", {})
    error = {"code": "handler_failed", "who": "retry", "message": "No.", "next_step": "", "details": {}}
    store.fail(bid.step, bid.attempt_id, error, Paid(), Ending("discard"))
    plan = cli("resume", run_id, "--plan", "--json").json
    # What is recorded as happened is not done again within its generation; what else it does is not on record.
    assert plan["effects"] == [{"agent": "pay", "key": None, "state": "unrecorded"}]
    plan = cli("resume", run_id, "--plan", "--from", "pay", "--json").json
    assert plan["effects"] == [{"agent": "pay", "key": "charge", "state": "happened"}]


def test_plan_is_refused_where_the_resume_is(cli, store):
    """Not failed, an unknown outcome, an agent that is none: the same words, exit 2."""
    definition = line("first", "second")
    running = _begin(store, definition)
    complete(store, definition, running, "first", {})
    unknown = _failed(store, definition, "first", given_up="second", code="outcome_unknown")
    for options in ([], ["--plan"]):
        cli("resume", running, *options).refuses(2, "The run is running, which does not allow it.")
        cli("resume", unknown, *options).refuses(2, "Nobody knows whether the effect of second happened.", "override")
        cli("resume", unknown, *options, "--from", "secnd").refuses(2, "no agent secnd. Did you mean 'second'?")
    assert _verdicts(cli("resume", unknown, "--plan", "--from", "second", "--json").json)["second"] == "re-run"


def test_resume_from_an_agent_names_what_is_done_again(cli, store):
    """A new generation of it and of all that depends on it."""
    definition = line("first", "second", "third")
    run_id = _begin(store, definition)
    for name in ("first", "second", "third"):
        complete(store, definition, run_id, name, {})
    cli("resume", run_id).refuses(2, "The run is completed")
    assert sorted(cli("resume", run_id, "--from", "second", "--json").json["resumed"]) == ["second", "third"]


def test_options_that_do_not_go_together(cli):
    """A RUN or --failed, and their own options."""
    for arguments in (
        ["last", "--failed"],
        ["--failed", "--from", "a"],
        ["--failed", "--embedded"],
        ["--failed", "--watch"],
    ):
        cli("resume", *arguments).refuses(2, "--failed goes with")
    for arguments in ([], ["last", "--yes"], ["last", "--since", "2h"], ["last", "--pipeline", "p"]):
        cli("resume", *arguments).refuses(2, "Name a RUN, or use --failed")
    cli("resume", "--failed", "--since", "yesterday").refuses(2, "no age such as 2h or 3d")


def test_bulk_leaves_alone_what_a_resume_cannot_mend(cli, store):
    """Refused gates, unknown outcomes, authors' errors and people's decisions: one line each, counted and explained."""
    definition = line("first", "second")
    good = [_failed(store, definition, "first", given_up="second", code="timed_out") for _ in range(2)]
    for code, count in (("gate_refused", 2), ("outcome_unknown", 1), ("author_mistake", 1), ("model_refused", 1)):
        for _ in range(count):
            _failed(store, definition, "first", given_up="second", code=code)
    dropped = _failed(store, definition, "first", given_up="second", message="discarded")
    (letter,) = [entry for entry in cli("dead", "list", "--json").json if entry["run_id"] == str(dropped)]
    cli("dead", "discard", letter["id"])
    rejected = _begin(store, definition)
    bid = commanding.claim(store, definition, rejected, "first")
    store.suspend(bid.step, bid.attempt_id, "d1", {}, None)
    Orders(store.engine).decide(rejected, "first", approved=False, digest=None, by="ann", reason="no")

    cli("resume", "--failed").refuses(2, "2 failed runs would be resumed, and nobody can be asked here.", "--yes")
    planned = cli("resume", "--failed", "--plan")
    assert planned.code == 0
    assert planned.following == ["resume", "--failed"]
    done = cli("resume", "--failed", "--yes")
    assert done.code == 0
    assert "tested, second (timed_out): 2 of 2 resumed." in done.out
    held = [text for text in done.out.splitlines() if text.startswith("Left alone, ")]
    assert held[0].startswith(
        "Left alone, 2 runs of tested, second (gate_refused): a gate refused: the same values would"
    )
    assert len(held) == 6
    assert all(re.search(r"\. See: stepfast explain [0-9a-f]{8}$", text) for text in held)
    assert any("a person rejected it" in text for text in held)
    assert any("a person discarded its dead letter" in text for text in held)
    assert {run["id"] for run in cli("runs", "--state", "running", "--json").json} == {str(run) for run in good}
    document = cli("resume", "--failed", "--yes", "--json").json
    assert (document.keys(), document["kinds"], len(document["held"])) == ({"kinds", "held"}, [], 6)


def test_bulk_takes_a_pipeline_and_a_time(cli, store):
    """--pipeline and --since narrow it; an unknown pipeline is refused."""
    one, other = pipeline(agent("a"), name="one"), pipeline(agent("a"), name="other")
    old = _failed(store, one, given_up="a")
    with store.engine.connect() as connection:
        connection.exec_driver_sql("update stepfast.runs set ended_at = ended_at - interval '2 hours'")
    new = _failed(store, one, given_up="a")
    _failed(store, other, given_up="a")
    cli("resume", "--failed", "--pipeline", "noone").refuses(2, "No pipeline is published as noone.")

    def counted(*options):
        kinds = cli("resume", "--failed", "--plan", "--json", *options).json["kinds"]
        return {(kind["pipeline"], kind["count"], kind["example"]) for kind in kinds}

    assert counted("--pipeline", "one") == {("one", 2, str(old))}
    assert counted("--pipeline", "one", "--since", "1h") == {("one", 1, str(new))}
    assert counted("--pipeline", "one", "--since", "2000-01-01T00:00") == {("one", 2, str(old))}
    assert counted("--since", "2999-01-01T00:00") == set()


MENDS = """
    import pathlib
    def a(ctx):
        if not (pathlib.Path(ctx.run.input["folder"]) / "mended").exists():
            raise ValueError(f"number {ctx.run.input['n']} broke")
        return {}
"""


@pytest.fixture
def broken(system, here, write_skill, tmp_path):
    """Eight runs of real workers that failed alike."""
    write_skill("- {id: unused}", MENDS)
    system.start_worker()
    definition = pipeline(agent("a", handler="handlers:a", queue="handlers", retry_policy=ONE_TRY))
    operations.publish(here, definition)
    started = [operations.start(here, definition.name, {"folder": str(tmp_path), "n": n}).run_id for n in range(8)]
    for run_id in started:
        assert system.ended(run_id)["state"] == "failed"
    return started


def _attempts(system, run_id) -> int:
    return len(system.run(run_id)["steps"][0]["tries"])


def test_canary_goes_first_and_the_others_follow(cli, system, broken, tmp_path, monkeypatch):
    """One of eight is resumed and watched; then the others, a page at a time, with progress."""
    monkeypatch.setattr(failed, "PAGE_RUNS", 3)
    (tmp_path / "mended").touch()
    done = cli("resume", "--failed", "--yes")
    assert done.code == 0
    assert re.search(r"tested, a \(handler_failed\): run [0-9a-f]{8} goes first", done.err)
    assert [int(n) for n in re.findall(r": (\d) of 8 resumed\.\n", done.err)] == [4, 7, 8]
    assert "8 of 8 resumed." in done.out
    assert [system.ended(run_id)["state"] for run_id in broken] == ["completed"] * 8
    assert [_attempts(system, run_id) for run_id in broken] == [2] * 8


def test_every_canary_goes_before_any_backlog(cli, system, here, write_skill, tmp_path):
    """Two kinds of failure: the second one's canary does not wait behind the runs of the first."""
    odd = MENDS.replace("number {", "{'odd' if ctx.run.input['n'] % 2 else 'even'} number {")
    assert odd != MENDS
    write_skill("- {id: unused}", odd)
    system.start_worker()
    definition = pipeline(agent("a", handler="handlers:a", queue="handlers", retry_policy=ONE_TRY))
    operations.publish(here, definition)
    started = [operations.start(here, definition.name, {"folder": str(tmp_path), "n": n}).run_id for n in range(12)]
    for run_id in started:
        assert system.ended(run_id)["state"] == "failed"
    (tmp_path / "mended").touch()
    done = cli("resume", "--failed", "--yes")
    assert done.code == 0
    told = re.findall(r"goes first|of 6 resumed", done.err)
    assert told == ["goes first", "goes first", "of 6 resumed", "of 6 resumed"]


def test_group_is_left_where_its_canary_fails_again(cli, system, broken):
    """The cause is still there: one run is tried, seven are left for when it is gone; exit 1."""
    done = cli("resume", "--failed", "--yes", "--json")
    (kind,) = done.json["kinds"]
    assert (done.code, kind["resumed"], kind["count"]) == (1, 1, 8)
    assert re.fullmatch(r"the first failed in the same way \(handler_failed: .*number \d broke.*\)", kind["left"])
    assert kind["canary"] == str(broken[0])
    assert [_attempts(system, run_id) for run_id in broken] == [2] + [1] * 7
    again = cli("resume", "--failed", "--yes")
    assert "The others were left, because the first failed in the same way" in again.out
    assert again.following == ["explain", again.following[1]]


def test_canary_is_not_waited_for_without_end(cli, store, monkeypatch):
    """No worker runs: after the bound the group is left, and it is said why."""
    monkeypatch.setattr(bulk, "CANARY_MAX_MS", 300)
    definition = line("first")
    for _ in range(6):
        _failed(store, definition, given_up="first")
    done = cli("resume", "--failed", "--yes")
    assert done.code == 1
    assert "because the first was not past that step in time" in done.out


def test_few_alike_need_no_canary(cli, store):
    """Five at most are resumed at once."""
    definition = line("first")
    for _ in range(5):
        _failed(store, definition, given_up="first")
    (kind,) = cli("resume", "--failed", "--yes", "--json").json["kinds"]
    assert (kind["resumed"], kind["canary"]) == (5, None)


def test_bulk_resumes_runs_of_one_concurrency_key_in_their_order(cli, store):
    """They go one at a time: the others wait for their turn, and nobody has to ask again."""
    keyed = pipeline(agent("a"), concurrency_key="{{input.r}}", concurrency_parts=({"path": ["input", "r"]},))
    store.publish(keyed)
    runs = [store.enqueue(keyed.name, {"r": "one"})[0] for _ in range(3)]
    for run_id in runs:
        give_up(store, keyed, run_id, "a")
    done = cli("resume", "--failed", "--yes")
    assert done.code == 0
    assert "tested, a (broken): 3 of 3 resumed." in done.out
    shown = cli("explain", runs[2]).out
    assert re.match(r"Run \S+ of tested 1 was resumed, and waits for its turn\. It waits for run \S+, which has", shown)
    for run_id in runs:
        complete(store, keyed, run_id, "a", {})
    assert {run["state"] for run in cli("runs", "--json").json} == {"completed"}


def test_resume_says_whose_turn_it_is(cli, store):
    """A run that must wait for another one of its concurrency key is not said to go on now."""
    keyed = pipeline(agent("a"), concurrency_key="{{input.r}}", concurrency_parts=({"path": ["input", "r"]},))
    store.publish(keyed)
    first, second = (store.enqueue(keyed.name, {"r": "one"})[0] for _ in range(2))
    give_up(store, keyed, first, "a")
    said = cli("resume", first).out
    assert (
        f"Run {first} waits for run {str(second)[:8]}, which has the same concurrency key, then goes on with a." in said
    )


def test_bulk_resumes_partial_runs_too(cli, store):
    """The command that `dead` advises mends what it lists: also what was given up in a run that went on without it."""
    definition = pipeline(agent("a"), agent("notify", failure_mode=FailureMode.SKIP_DEPENDENTS))
    runs = []
    for _ in range(2):
        runs.append(_begin(store, definition))
        complete(store, definition, runs[-1], "a", {})
        give_up(store, definition, runs[-1], "notify")
    advised = cli("dead").following
    assert advised == ["resume", "--failed", "--pipeline", "tested"]
    assert "tested, notify (broken): 2 of 2 resumed." in cli(*advised, "--yes").out
    assert {run["state"] for run in cli("runs", "--json").json} == {"running"}
    # What a person let be, and what came late, is nobody's failure any more.
    for run_id in runs:
        give_up(store, definition, run_id, "notify")
    for letter in cli("dead", "list", "--json").json:
        cli("dead", "discard", letter["id"])
    assert "Left alone, 2 runs" in cli("resume", "--failed", "--yes").out
