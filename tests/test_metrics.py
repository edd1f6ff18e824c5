"""Metrics: what Postgres counts of what happened, how things stand, and what Flower's /metrics says of it."""

import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from benches import CALM_MS, Bench
from flowering import LOGIN, Visitor, flower
from pipelines import agent, line, pipeline
from prometheus_client.parser import text_string_to_metric_families

from app.runs.database import engine
from app.runs.metrics import LAG_MS, Metrics
from app.runs.store import Ending, Paid, Store

PAID = Paid("claude-sonnet-5-5", "req_1", {"input_tokens": 100, "output_tokens": 7}, 0.01)


@pytest.fixture
def bench(database_url):
    store = Store(engine(database_url, pool_max=8))
    made = Bench(store)
    made.metrics = Metrics(store.engine)
    yield made
    store.engine.dispose()


def _counted(bench) -> Counter:
    """All counts, once everything that happened is old enough."""
    bench.pass_time(LAG_MS / 1_000 + 1)
    assert bench.metrics.count() == 0
    return Counter({row[:4]: row.total for row in bench.metrics.totals()})


def test_what_happens_is_counted_once(bench):
    """Retries, rescues, dead letters, ends, tokens and durations of every attempt; asking again adds nothing."""
    done = bench.start(line("a", "b"))
    bid, _ = bench.claim(done, "a")
    bench.pass_time(3)
    bench.store.complete(bid.step, bid.attempt_id, {"x": 1}, PAID)
    failing, _ = bench.claim(done, "b")
    bench.store.fail(
        failing.step, failing.attempt_id, {"code": "unavailable", "message": "m"}, PAID, Ending("retry", retry_ms=1)
    )
    bench.pass_time(1)
    bench.sweep(lease_ms=CALM_MS)
    bench.do(done, "b")
    failed = bench.start(line("a", "b"))
    bid, _ = bench.claim(failed, "a")
    bench.sql("update stepfast.workers set lease_until = stepfast.now() - interval '1 hour'")
    bench.sweep()
    bench.sweep()
    bench.sql("update stepfast.workers set ended_at = null, lease_until = stepfast.now() + interval '1 hour'")
    bid, _ = bench.claim(failed, "a")
    bench.fail(bid)

    counted = _counted(bench)
    assert _counted(bench) == counted
    assert counted["runs_ended", "tested", "", "completed"] == 1
    assert counted["runs_ended", "tested", "", "failed"] == 1
    assert counted["retries", "tested", "b", ""] == 1
    assert counted["rescues", "tested", "a", ""] == 1
    assert counted["dead_letters", "tested", "a", "broken"] == 1
    assert counted["tokens_input", "", "", "claude-sonnet-5-5"] == 200
    assert counted["tokens_output", "", "", "claude-sonnet-5-5"] == 14
    assert counted["step_seconds_le_2.5", "tested", "a", ""] == 0
    assert counted["step_seconds_le_5", "tested", "a", ""] == 1
    assert counted["step_seconds_le_Infinity", "tested", "b", ""] == 1
    assert 3 <= counted["step_seconds_sum", "tested", "a", ""] < 5


def test_what_just_happened_waits_until_it_cannot_change(bench):
    """What a statement under way may still commit is not passed over: nothing younger than the lag is counted."""
    bench.do(bench.start(line("a")), "a")
    assert bench.metrics.count() == 0
    assert bench.metrics.totals() == ()
    assert _counted(bench)["runs_ended", "tested", "", "completed"] == 1


def test_counts_outlive_the_runs_they_are_of(bench):
    """Removing history takes nothing away from a counter."""
    bench.do(bench.start(line("a")), "a")
    before = _counted(bench)
    bench.sql("delete from stepfast.runs")
    assert _counted(bench) == before


def test_several_flowers_count_together_what_one_would(bench):
    """Sixteen ask at once, again and again, while runs complete: each end is counted once."""
    definition = line("a")
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            asked = [pool.submit(bench.metrics.count) for _ in range(16)]
            bench.do(bench.start(definition), "a")
            bench.pass_time(LAG_MS / 1_000 + 1)
            for one in asked:
                one.result()
    assert _counted(bench)["runs_ended", "tested", "", "completed"] == 5


def test_a_week_without_a_flower_is_made_up_for_in_pieces(bench, monkeypatch):
    """One question counts for a bounded time, says what is left, and the next ones go on from there."""
    bench.do(bench.start(line("a")), "a")
    bench.pass_time(7 * 24 * 3_600)
    bench.do(bench.start(bench.definition), "a")
    bench.pass_time(LAG_MS / 1_000 + 1)
    monkeypatch.setattr("app.runs.metrics.COUNTING_MAX_S", 0.0)
    left = [bench.metrics.count(), bench.metrics.count()]
    assert left[0] > left[1] > 6 * 24 * 3_600
    monkeypatch.undo()
    assert _counted(bench)["runs_ended", "tested", "", "completed"] == 2


def test_labels_are_bounded(bench, monkeypatch):
    """What is published after the limit counts as `other`; what had its own labels keeps them."""
    monkeypatch.setattr("app.runs.metrics.SERIES_MAX", 2)
    for name in ("one", "two", "three"):
        bench.do(bench.start(pipeline(agent("a"), name=name)), "a")
        _counted(bench)
    for name in ("one", "three", "four"):
        bench.do(bench.start(pipeline(agent("a"), name=name)), "a")
    counted = _counted(bench)
    ended = {key[1]: total for key, total in counted.items() if key[0] == "runs_ended"}
    assert ended == {"one": 2, "two": 1, "other": 3}
    assert counted["step_seconds_le_Infinity", "other", "other", "other"] == 3


def test_counting_reads_only_what_is_new(bench):
    """Of a long history a minute is found by the index, which reads a part of the pages."""
    run = bench.start(line("a"))
    bench.sql(
        "insert into stepfast.events (run_id, seq, name, at) select :r, n, 'step.claimed',"
        " stepfast.now() - interval '40 days' + n * interval '60 s' from generate_series(1000, 50000) n",
        r=run,
    )
    bench.store.engine.dispose()
    since = bench.sql("select max(at) from stepfast.events where seq < 30000")
    with bench.store.engine.connect() as connection:
        connection.exec_driver_sql("vacuum analyze stepfast.events")
        pages = connection.exec_driver_sql("select pg_relation_size('stepfast.events') / 8192").scalar_one()
        query = "explain (analyze, buffers) select from stepfast.events where at >= '{0}' and at < '{0}'::timestamptz + '60 s'"
        plan = "\n".join(row[0] for row in connection.exec_driver_sql(query.format(since)))
    assert "events_at" in plan, plan
    assert sum(map(int, re.findall(r"shared hit=(\d+)", plan))) < pages, plan


def test_how_things_stand(bench):
    """Runs and steps by state, what waits for people and for workers, and how long."""
    bench.start(line("a"))
    bench.store.take_unsent(None, 10)
    bench.pass_time(60)
    waiting, asking, failed = (bench.start(line("a")) for _ in range(3))
    bid, _ = bench.claim(asking, "a")
    bench.store.suspend(bid.step, bid.attempt_id, "d" * 64, {}, None)
    bid, _ = bench.claim(failed, "a")
    bench.fail(bid)
    bench.claim(waiting, "a")
    standing = bench.metrics.standing()
    age = standing.pop(("queue_age", "agents"))
    assert 60 <= age < 90
    assert {key: value for key, value in standing.items() if value} == {
        ("runs", "pending"): 1,
        ("runs", "running"): 1,
        ("runs", "suspended"): 1,
        ("runs", "failed"): 1,
        ("steps", "executing"): 1,
        ("steps", "sent"): 1,
        ("approvals", ""): 1,
        ("workers", ""): 1,
        ("letters", "broken"): 1,
    }


def _scrape(url: str) -> dict:
    """Each sample of ours, by name and labels."""
    answer = Visitor(url).get("/metrics")
    assert answer.status == 200
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if sample.name.startswith("stepfast_")
    }


def test_flower_tells_the_metrics_to_a_scraper(bench, servers, database_url):
    """Open also where there is a login, without a cost, a tenant or a key; a restarted Flower goes on where it was."""
    run = bench.start(line("a"), {"issue": "private"}, key="private-key", tenant="private-tenant")
    bid, _ = bench.claim(run, "a")
    bench.store.complete(bid.step, bid.attempt_id, {"text": "private"}, PAID)
    bench.pass_time(LAG_MS / 1_000 + 1)
    environ = {"STEPFAST_DATABASE_URL": database_url, "STEPFAST_BROKER_URL": servers.broker_url}
    with flower(environ, f"--basic_auth={LOGIN}") as url:
        first = _scrape(url)
        whole = Visitor(url).get("/metrics").text
    assert first["stepfast_up",] == 1
    assert first["stepfast_runs_ended_total", "completed", "tested"] == 1
    assert first["stepfast_step_duration_seconds_count", "a", "tested"] == 1
    assert first["stepfast_tokens_total", "claude-sonnet-5-5", "input"] == 100
    assert first["stepfast_runs_stuck",] == 0
    assert first["stepfast_queue_age_seconds", "handlers"] == 0
    assert "private" not in whole
    assert "usd" not in whole
    if shutil.which("promtool"):
        subprocess.run(["promtool", "check", "metrics"], input=whole, text=True, check=True)
    with flower(environ) as url:
        assert _scrape(url)["stepfast_runs_ended_total", "completed", "tested"] == 1


def test_metrics_say_that_postgres_is_away(servers):
    """The scrape answers all the same: stepfast_up is 0, and nothing of ours is made up."""
    environ = {"STEPFAST_DATABASE_URL": "postgresql://x@127.0.0.1:1/x", "STEPFAST_BROKER_URL": servers.broker_url}
    with flower(environ) as url:
        assert _scrape(url) == {("stepfast_up",): 0}
