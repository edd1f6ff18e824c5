"""What happened in a while: each figure of the report, its bounds, and the indexes that serve it."""

import json
from datetime import timedelta

import pytest
from benches import CALM_MS, ERROR, Bench
from pipelines import agent, line, pipeline
from sqlalchemy import text

from app.errors import NotReady
from app.runs import report as reporting
from app.runs.database import engine
from app.runs.report import PARTS, report, statement
from app.runs.store import Ending, Paid, Store

DAY = timedelta(hours=24)


def paid(cost, model="claude-sonnet-5-5"):
    return Paid(model, "req", {"input_tokens": 100, "output_tokens": 10}, cost)


@pytest.fixture
def bench(database_url):
    store = Store(engine(database_url, pool_max=2))
    yield Bench(store)
    store.engine.dispose()


def _report(bench, since=DAY, pipeline=None):
    found = report(bench.store.engine, since=since, pipeline=pipeline)
    json.dumps(found)
    return found


def _lose(bench):
    """The bench's worker was in doubt for two seconds, and is dead."""
    bench.sql("update stepfast.workers set suspect_since = stepfast.now() where ended_at is null")
    bench.pass_time(2)
    bench.sql("update stepfast.workers set ended_at = stepfast.now() where ended_at is null")
    bench.sweep()
    bench.worker_id = bench.sql(
        "insert into stepfast.workers (host, pid, code_version, started_at, lease_until)"
        " values ('other', 2, 1, stepfast.now(), stepfast.now() + interval '900 hours') returning id"
    )


def test_an_empty_day(bench):
    """Nothing happened: figures are nought, and no list has a row."""
    found = _report(bench)
    assert (found["cost_usd"], found["wasted_usd"], found["fence_refusals"], found["retries_total"]) == (0, 0, 0, 0)
    assert not any(found[name] for name in ("runs", "recoveries", "workers_lost", "costs", "wasted", "dead_letters"))


def test_a_worker_that_died_its_recovery_and_what_that_wasted(bench):
    """Who died, from the first doubt to the next attempt, the refused commit with its price, the lost call with a guess."""
    run = bench.start(line("a", "b"))
    late, _ = bench.claim(run, "a")
    dead = bench.worker_id
    _lose(bench)
    bench.pass_time(3)
    bid, _ = bench.claim(run, "a")
    assert bench.store.complete(late.step, late.attempt_id, {}, paid(0.02)).outcome == "stale"
    bench.store.complete(bid.step, bid.attempt_id, {}, paid(0.02))
    bench.claim(run, "b")
    _lose(bench)
    bid, _ = bench.claim(run, "b")
    bench.store.complete(bid.step, bid.attempt_id, {}, paid(0.05))
    found = _report(bench)
    assert found["fence_refusals"] == 1
    (recovered,) = found["recoveries"]
    assert (recovered["reason"], recovered["count"], recovered["begun_again"]) == ("died", 2, 2)
    assert (round(recovered["max_s"]), round(recovered["p50_s"], 1)) == (5, pytest.approx(3.5, abs=0.2))
    lost = found["workers_lost"][-1]
    assert (lost["worker"], lost["host"], lost["pid"], lost["steps"], lost["agents"]) == (dead, "h", 1, 1, ["tested.a"])
    by = {entry["how"]: entry for entry in found["wasted"]}
    assert (by["fenced"]["calls"], by["fenced"]["cost_usd"]) == (1, 0.02)
    assert (by["lost"]["calls"], by["lost"]["cost_usd"], by["lost"]["estimate_usd"]) == (1, None, 0.05)
    assert found["cost_usd"] == pytest.approx(0.09)
    assert found["wasted_usd"] == pytest.approx(0.02)


def test_retries_dead_letters_costs_and_slow_agents(bench):
    """By agent and code; by fingerprint, open and all; by pipeline and model, with what has no price; by p95."""
    run = bench.start(pipeline(agent("slow"), agent("quick"), agent("bad")))
    for seconds, name in ((30, "slow"), (1, "quick")):
        bid, _ = bench.claim(run, name)
        bench.pass_time(seconds)
        cost = paid(0.1) if name == "slow" else paid(None, "claude-unknown")
        bench.store.complete(bid.step, bid.attempt_id, {}, cost)
    bid, _ = bench.claim(run, "bad")
    unfit = ERROR | {"code": "invalid_output"}
    bench.store.fail(bid.step, bid.attempt_id, unfit, paid(0.3), Ending("retry", retry_ms=1))
    bench.pass_time(1)
    bench.sweep(lease_ms=CALM_MS)
    bench.fail(bench.claim(run, "bad")[0])
    bench.resume(run)
    found = _report(bench)
    assert found["retries"] == [{"pipeline": "tested", "agent": "bad", "code": "invalid_output", "count": 1}]
    (letter,) = found["dead_letters"]
    assert (letter["count"], letter["open"], letter["run_id"], letter["code"]) == (1, 0, str(run), "broken")
    assert [(entry["model"], entry["calls"], entry["cost_usd"], entry["unpriced"]) for entry in found["costs"]] == [
        ("claude-sonnet-5-5", 2, 0.4, 0),
        ("claude-unknown", 1, None, 1),
    ]
    assert [(entry["agent"], round(entry["p95_s"])) for entry in found["slowest"]] == [("slow", 30), ("quick", 1)]
    assert (found["resumed"], found["runs"]) == (1, {"running": 1})
    (wasted,) = found["wasted"]
    assert (wasted["how"], wasted["code"], wasted["cost_usd"]) == ("failed", "invalid_output", 0.3)


def test_only_what_was_asked_for(bench):
    """Another pipeline's runs, and what was before, are left out; a part of a list is the part that matters most."""
    old = bench.start(pipeline(agent("a"), name="one"))
    bench.fail(bench.claim(old, "a")[0])
    bench.pass_time(3 * 3600)
    for _ in range(2):
        new = bench.start(pipeline(agent("a"), name="two"))
        bench.fail(bench.claim(new, "a")[0])
    assert _report(bench)["runs"] == {"failed": 3}
    assert _report(bench, since=timedelta(hours=2))["runs"] == {"failed": 2}
    assert _report(bench, pipeline="one")["dead_letters"][0]["count"] == 1
    assert [entry["count"] for entry in _report(bench)["dead_letters"]] == [2, 1]
    assert _report(bench, pipeline="three")["runs"] == {}


def test_sums_are_of_all_also_of_what_no_list_has_room_for(bench):
    """Costs, calls without a price, dead workers and rescued steps count whole; each list ends after its 20 rows."""
    many = range(reporting.ROWS_MAX + 5)
    run = bench.start(pipeline(*(agent(f"a{number}") for number in many)))
    for number in many:
        bench.claim(run, f"a{number}")
        _lose(bench)
    for number in many:
        bid, _ = bench.claim(run, f"a{number}")
        bench.store.complete(bid.step, bid.attempt_id, {}, paid(None if number < 3 else 0.01, f"claude-{number}"))
    found = _report(bench)
    assert {name: len(found[name]) for name in ("costs", "workers_lost")} == {"costs": 20, "workers_lost": 20}
    assert found["cost_usd"] == pytest.approx(0.22)
    assert (found["unpriced_total"], found["workers_lost_total"], found["rescued_total"]) == (3, 25, 25)
    assert not any(name.endswith("_of_all") for part in ("costs", "workers_lost") for name in found[part][0])


def test_each_part_is_served_by_an_index(bench):
    """No part reads a whole table of what is kept for years: each finds the rows of its time by an index."""
    indexes = {
        "runs": {"runs_created"},
        "dead_letters": {"dead_letters_created"},
        "slowest": {"attempts_started"},
        "costs": {"attempts_started", "events_at"},
        "wasted": {"attempts_started", "events_at"},
    }
    now = bench.sql("select stepfast.now()")
    with bench.store.engine.connect() as connection:
        connection.execute(text("set enable_seqscan = off"))
        try:
            for name, query in PARTS.items():
                asked = statement(f"explain {query}", now, None)
                plan = "\n".join(connection.execute(asked).scalars())
                for index in indexes.get(name, {"events_at"}):
                    assert index in plan, f"{name}\n{plan}"
        finally:
            connection.execute(text("reset enable_seqscan"))


def test_too_much_is_refused_with_what_to_do(database_url, monkeypatch):
    """A part that takes longer than a statement may is given up, and the answer says how to ask for less."""
    monkeypatch.setattr(reporting, "PARTS", {"runs": "select pg_sleep(30)::text as state, :since, :pipeline, :rows"})
    limited = engine(database_url, pool_max=1)
    with limited.connect() as connection:  # the pool gives it back
        connection.execute(text("set statement_timeout = 50"))
    with pytest.raises(NotReady, match="too much") as caught:
        report(limited, since=DAY, pipeline=None)
    assert "--since 1h" in caught.value.next_step
    limited.dispose()
