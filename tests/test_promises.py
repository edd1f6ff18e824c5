"""`audit --run`: which promises of the checklist a run kept, by what is recorded of it."""

import json

import pytest
from benches import ERROR, Bench
from commanding import in_process
from conftest import eventually
from pipelines import ONE_TRY, agent, diamond, line, pipeline

from app import operations
from app.pipelines.names import AUDIT_RULES
from app.runs.database import engine
from app.runs.invariants import check
from app.runs.orders import Orders
from app.runs.promises import History, judge
from app.runs.reads import Reads
from app.runs.store import Paid, Store

AGENTS = """
    - {id: order, output_schema: ordered, retry_policy: {initial_ms: 1}}
    - id: pay
      depends_on: [order]
      gate: "{{order.sum}} > 0"
      requires_human_approval: true
      approval_timeout_ms: 600000
"""
HANDLERS = """
    from app.agents import NotHappened, effects_once

    def order(ctx):
        if ctx.run.number == 1:
            raise ValueError("not yet")
        return {"sum": 7}

    @effects_once
    def pay(ctx):
        return ctx.once("pay", lambda: {"paid": ctx.inputs["order"]["sum"]}, check=NotHappened)
"""
ORDERED = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}


@pytest.fixture
def bench(database_url):
    store = Store(engine(database_url, pool_max=4))
    made = Bench(store)
    made.orders = Orders(store.engine)
    yield made
    store.engine.dispose()


def promises(bench, run_id, **aliases):
    """Rule -> (verdict, evidence as one text)."""
    reads = Reads(bench.store.engine)
    with bench.store.engine.connect() as connection:
        violations = check(connection, run_id)
    history = History(
        reads.run(run_id), reads.event_list(run_id), reads.effect_list(run_id), violations, bench.definition, aliases
    )
    return {promise.rule: (promise.verdict, " ".join(promise.evidence)) for promise in judge(history)}


def broken(bench, run_id):
    return {rule for rule, (verdict, _) in promises(bench, run_id).items() if verdict == "broken"}


def test_a_run_by_real_workers_keeps_its_promises(system, here, write_skill, capsys):
    """A retry, a gate, an approval and an effect: each is named with its evidence, and the command ends with 0."""
    folder = write_skill(AGENTS, HANDLERS, files={"schemas/ordered.json": json.dumps(ORDERED)})
    name = system.publish(here, folder)
    system.start_worker()
    run_id = operations.start(here, name, {}).run_id
    eventually(lambda: system.states(run_id)["pay"] == "suspended", what="the question")
    operations.decide(here, run_id, "pay", approved=True, by="ann")
    assert system.ended(run_id)["state"] == "completed"
    cli = in_process(capsys)
    answer = cli("audit", "--run", str(run_id), "--json")
    assert (answer.code, answer.json["ok"], answer.json["run"]) == (0, True, str(run_id))
    found = {entry["rule"]: (entry["verdict"], " ".join(entry["evidence"])) for entry in answer.json["promises"]}
    assert tuple(found) == AUDIT_RULES
    kept = {rule: evidence for rule, (verdict, evidence) in found.items() if verdict == "kept"}
    for rule, evidence in {
        "consistency-undeclared": "pinned by attempt and hash",
        "no-failure-boundary": "1 output behind a gate that held; 0 attempts refused",
        "not-idempotent": "2 outputs committed, each once a generation; 2 other attempts.",
        "effect-without-check": "1 effect by ctx.once, each once; 0 open.",
        "key-not-stable": "2 steps attempted more than once, each time with the same key.",
        "no-trace": "gapless; each attempt has its start and end. Tracing is off",
        "retries-beyond-deadline": "4 attempts, of which 1 failed: within their limits.",
        "approval-without-expiry": "pay: approved by ann, of the digest ",
        "schema-lacks-field": "1 output fit their schemas.",
    }.items():
        assert evidence in kept[rule], rule
    text = cli("audit", "--run", "last").out
    assert "kept            approval-without-expiry    pay: approved by ann, of the digest " in text
    assert "not applicable  join-without-failure-mode" in text


def test_each_rule_has_its_judgement(bench):
    """No rule of the checklist is forgotten, and what never came up is not called kept."""
    run = bench.start(line("a"))
    found = promises(bench, run)
    assert tuple(found) == AUDIT_RULES
    assert {verdict for rule, (verdict, _) in found.items() if rule != "no-trace"} == {"not applicable"}


def test_join_and_dead_letter_are_judged_by_what_happened(bench):
    """A join that began after its branches, a step that was given up, and a resume."""
    run = bench.start(diamond(retry_policy=ONE_TRY))
    bench.do(run, "a", "b")
    bench.fail(bench.claim(run, "c")[0])
    bench.resume(run)
    bench.do(run, "c", "d")
    found = promises(bench, run)
    assert found["join-without-failure-mode"] == ("kept", "d began once each of its 2 branches was completed.")
    assert found["no-dead-letter"] == ("kept", "1 step given up, each with its dead letter.")
    assert found["no-resume"][0] == "kept"
    assert found["retries-beyond-deadline"] == ("kept", "5 attempts, of which 1 failed: within their limits.")
    assert broken(bench, run) == set()


ONE_MORE = """insert into stepfast.attempts select (jsonb_populate_record(t, jsonb_build_object(
    'id', gen_random_uuid(), 'number', {number}, 'state', 'failed', 'output', null, 'output_hash', null, 'key', {key},
    'error', jsonb_build_object('code', '{code}', 'message', 'x')))).* from stepfast.attempts t where agent = 'a' and number = 1"""


@pytest.mark.parametrize(
    ("rule", "damage"),
    [
        (
            "consistency-undeclared",
            ["update stepfast.attempts set reads = jsonb_set(reads, '{a,hash}', '\"0\"') where agent = 'b'"],
        ),
        (
            "no-failure-boundary",
            ["update stepfast.pipelines set definition = jsonb_set(definition, '{agents,1,gate}', '\"1 > 2\"')"],
        ),
        (
            "not-idempotent",
            [
                ONE_MORE.format(number=9, key="null", code="x")
                .replace("'failed'", "'completed'")
                .replace("'output', null, 'output_hash', null", "'output', '{}'::jsonb")
                .replace("'error', jsonb_build_object('code', 'x', 'message', 'x')", "'error', null")
            ],
        ),
        (
            "effect-without-check",
            [
                "insert into stepfast.effects select run_id, 'a', '', 1, 'mail', 'begun', attempt_id, null, now(), null from stepfast.steps where agent = 'a'"
            ],
        ),
        ("key-without-run", ["delete from stepfast.keys where agent = 'a'"]),
        ("key-not-stable", [ONE_MORE.format(number=9, key="'another'", code="x")]),
        ("no-trace", ["delete from stepfast.events where seq = 3"]),
        (
            "no-dead-letter",
            [
                "update stepfast.steps set state = 'pending', ended_at = null where agent = 'b'",
                "update stepfast.steps set state = 'available' where agent = 'b'",
                "update stepfast.steps set state = 'discarded', ended_at = now() where agent = 'b'",
            ],
        ),
        (
            "retries-beyond-deadline",
            [ONE_MORE.format(number=number, key="null", code="broken") for number in (7, 8, 9, 10)],
        ),
        ("retries-beyond-deadline", ["update stepfast.runs set deadline_at = now() - interval '1 hour'"]),
        (
            "approval-without-expiry",
            [
                "insert into stepfast.approvals (id, run_id, agent, generation, subject, digest, attempt_id, shown, state, requested_at) select gen_random_uuid(), run_id, 'b', 1, 'step', 'd', attempt_id, '{}', 'requested', now() from stepfast.steps where agent = 'b'"
            ],
        ),
        ("unbounded-output", [ONE_MORE.format(number=9, key="null", code="max_tokens")]),
        (
            "schema-lacks-field",
            [
                ONE_MORE.format(number=9, key="null", code="author_mistake").replace(
                    "'message', 'x'", "'message', 'It has no value.'"
                )
            ],
        ),
        ("retired-model", ["update stepfast.attempts set model = 'claude-other' where agent = 'a'"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damage_breaks_its_promise(bench, rule, damage):
    """Whatever contradicts a promise is found by its rule: a judgement that can go wrong."""
    run = bench.start(line("a", "b"))
    bench.do(run, "a", "b")
    assert broken(bench, run) == set()
    bench.sql("alter table stepfast.attempts disable trigger user")
    for statement in damage:
        bench.sql(statement)
    assert rule in broken(bench, run)


def test_retired_model_answers_by_its_alias(bench):
    """That is as it was announced; another model is not."""
    run = bench.start(pipeline(agent("a", model="claude-3-opus")))
    bid, _ = bench.claim(run, "a")
    bench.store.complete(bid.step, bid.attempt_id, {}, Paid(model="claude-opus-5-5"))
    assert promises(bench, run, **{"claude-3-opus": "claude-opus-5-5"})["retired-model"][0] == "kept"
    assert promises(bench, run)["retired-model"][0] == "broken"


def test_unknown_outcome_is_no_breach(bench):
    """A death that left an outcome for a person is as it was promised; nothing was repeated."""
    run = bench.start(pipeline(agent("a", handler="h.py:f")))
    bench.fail(bench.claim(run, "a", repeatable=False)[0], error={**ERROR, "code": "outcome_unknown"})
    found = promises(bench, run)
    assert broken(bench, run) == set()
    assert found["failure-mode-undeclared"] == ("kept", "a is discarded under halt_pipeline: the run is failed.")


def test_command_says_what_is_broken_and_what_goes_together(here, bench, capsys):
    """A breach ends with 1 and the command that explains the run; a file and a run are not asked at once."""
    run = bench.start(line("a"))
    bench.do(run, "a")
    bench.sql("delete from stepfast.events where seq = 2")
    cli = in_process(capsys)
    told = cli("audit", "--run", str(run))
    assert told.code == 1
    assert "broken          no-trace" in told.out
    assert told.following == ["explain", str(run)[:8]]
    cli("audit").refuses(2, "Name a SKILL, or --run RUN")
    cli("audit", "x.yaml", "--run", "last").refuses(2, "--run goes without a SKILL")
    cli("audit", "--run", "last", "--format", "sarif").refuses(2, "as text or JSON")
    cli("audit", "--run", "ffff").refuses(2, "No run has an id that begins with")


def test_effect_that_a_fenced_attempt_began_is_open(bench):
    """It is no effect of the attempt that completed the step, which did something else on the new input."""
    run = bench.start(line("a", "b"))
    bench.do(run, "a")
    late, _ = bench.claim(run, "b")
    bench.store.begin_effect(late.step, late.attempt_id, "pay 7")
    bench.orders.override(run, "a", {"sum": 8}, "ann", None)
    bid, _ = bench.claim(run, "b")
    bench.store.begin_effect(bid.step, bid.attempt_id, "pay 8")
    bench.store.end_effect(bid.step, bid.attempt_id, "pay 8", {})
    bench.complete(bid)
    assert promises(bench, run)["effect-without-check"] == ("kept", "1 effect by ctx.once, each once; 1 open.")
