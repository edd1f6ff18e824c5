"""The outbox of traces: who exports which run, what one export takes, what is given up, and what it says of cost."""

import tracemalloc
from contextlib import contextmanager
from dataclasses import replace

import pytest
from benches import ERROR, Bench
from conftest import eventually
from pipelines import agent, line, pipeline
from receiving import receiving
from test_timeline import PAID, lose_worker
from test_traces import environ, whole
from working import emitting

from app.execution import tracing
from app.pipelines.model import Tracing
from app.runs.database import engine
from app.runs.store import Ending, Paid, Store

OTLP = Tracing(enabled=True, provider="otlp", log_inputs=True, log_outputs=True)
LANGFUSE = replace(OTLP, provider="langfuse")
LATE = "traces.late"
DAY_S = 86_400


@pytest.fixture
def receiver():
    with receiving() as made:
        yield made


@pytest.fixture
def bench(database_url):
    opened = engine(database_url, pool_max=4)
    yield Bench(Store(opened))
    opened.dispose()


@pytest.fixture
def exporting(system, monkeypatch):
    """Has this process export what is due, with these settings, as a worker does. Gives the events that it emits."""

    @contextmanager
    def export(**settings: str):
        system.environ |= settings
        with system.here(monkeypatch) as here, emitting() as emitted:
            tracing.start(lambda: here, here.settings)
            try:
                yield emitted
            finally:
                tracing.stop()

    return export


def done(bench, definition, *, of=OTLP):
    """A run of the definition, all of which was done. Returns its id."""
    name = f"{of.provider}-{len(definition.agents)}"
    definition = replace(definition, name=name, tracing=of)
    run_id = bench.start(definition)
    bench.do(run_id, *(one.id for one in definition.agents))
    return run_id


def due(bench, run_id):
    return bench.sql("select due_at from stepfast.traces where run_id = :r", r=run_id)


def late(emitted):
    return [fields for event, fields in emitted if event == LATE]


def test_a_run_is_left_to_workers_that_reach_its_provider(bench, receiver, exporting):
    """One that has another provider's keys alone neither exports it nor says that it did."""
    with receiving() as langfuse:
        first = done(bench, line("a"))
        second = done(bench, line("a"), of=LANGFUSE)
        with exporting(**environ(langfuse, "langfuse")):
            whole(langfuse, second)
            assert langfuse.of(first) == []
        assert due(bench, first) is not None
        with exporting(**environ(receiver, "otlp")):
            whole(receiver, first)


def test_what_nobody_can_export_is_given_up_after_a_day(bench, receiver, exporting):
    """A run whose provider no worker reaches is due for that long, and not for ever."""
    first = done(bench, line("a"), of=LANGFUSE)
    bench.pass_time(DAY_S + 60)
    second = done(bench, line("a"), of=LANGFUSE)
    with exporting(**environ(receiver, "otlp")):
        eventually(lambda: due(bench, first) is None, what="giving it up")
    assert due(bench, second) is not None


def test_a_provider_that_is_away_delays_no_other(bench, receiver, exporting):
    """Five runs for one that answers nothing, and one for another, which has it at once."""
    with receiving() as away:
        away.hangs.set()
        for _ in range(5):
            done(bench, line("a"), of=LANGFUSE)
        run_id = done(bench, line("a"))
        with exporting(**environ(away, "langfuse"), **environ(receiver, "otlp")):
            whole(receiver, run_id)
            eventually(lambda: away.requests, what="an export that was tried")
            away.hangs.clear()
            away.released.set()


def test_a_run_that_is_refused_delays_no_other(bench, receiver, exporting):
    """What a provider says no to is told, and what comes after it is exported."""
    refused = done(bench, line("a"))
    run_id = done(bench, line("a"))
    receiver.refuses = lambda spans: spans[0].trace == refused.hex
    with exporting(**environ(receiver, "otlp")) as emitted:
        whole(receiver, run_id)
        assert receiver.of(refused) == []
        (told,) = late(emitted)
        assert (told["provider"], "413" in told["message"]) == ("otlp", True)


def test_a_run_that_cannot_be_shown_delays_no_other(bench, receiver, exporting):
    """Of a newer version, say: others are exported, and another worker may yet show it."""
    newer = done(bench, line("a", "b"))
    bench.sql("update stepfast.pipelines set definition = '{}'")
    run_id = done(bench, line("a"))
    with exporting(**environ(receiver, "otlp")) as emitted:
        whole(receiver, run_id)
        assert len(late(emitted)) == 1
    assert due(bench, newer) is not None


def test_a_run_that_never_ends_is_given_up(bench, receiver, exporting):
    """A day after what last happened in it. What happens later is tried anew, however old the run."""
    definition = replace(line("a", "b"), tracing=OTLP)
    run_id = bench.start(definition)
    bench.do(run_id, "a")
    bench.pass_time(DAY_S + 60)
    receiver.status = 400
    with exporting(**environ(receiver, "otlp")):
        eventually(lambda: due(bench, run_id) is None, what="giving it up")
        assert receiver.requests == []
        receiver.status = 200
        bid, _ = bench.claim(run_id, "b")
        bench.fail(bid, retry_ms=60_000)
        names = ["a", "a attempt 1", "b attempt 1"]
        eventually(lambda: sorted(span.name for span in receiver.of(run_id)) == names, what="what was done")


def test_a_database_that_refuses_is_told(bench, receiver, exporting):
    """Once, with its reason; and it is tried again."""
    run_id = done(bench, line("a"))
    bench.sql("alter table stepfast.traces rename to away")
    with exporting(**environ(receiver, "otlp")) as emitted:
        eventually(lambda: late(emitted), what="the warning")
        bench.sql("alter table stepfast.away rename to traces")
        whole(receiver, run_id)
        (told,) = late(emitted)
        assert "stepfast.traces" in told["message"]
        assert "\n" not in told["message"]
        assert "select" not in told["message"].lower()


def test_large_outputs_are_not_in_memory_at_once(bench, receiver, exporting):
    """However many a run has: one at a time is read, and what is shown of it kept."""
    names = [f"a{number}" for number in range(24)]
    definition = replace(pipeline(*(agent(name) for name in names)), tracing=OTLP)
    run_id = bench.start(definition)
    for name in names:
        bench.complete(bench.claim(run_id, name)[0], {"text": "word " * 400_000})
    tracemalloc.start()
    try:
        with exporting(**environ(receiver, "otlp")):
            whole(receiver, run_id)
            eventually(lambda: len(receiver.of(run_id)) == 1 + 2 * len(names), what="all spans", within_s=60)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert receiver.one(run_id, "a23").attributes["output.value"].endswith("... [cut: 2000012 bytes]")
    assert peak_bytes < 20_000_000


def test_what_a_provider_took_of_a_long_run_is_not_sent_again(bench, receiver, exporting):
    """It is exported in parts, each of which is confirmed."""
    names = [f"a{number}" for number in range(40)]
    definition = replace(pipeline(*(agent(name) for name in names)), tracing=OTLP)
    run_id = bench.start(definition)
    bench.do(run_id, *names)
    receiver.refuses = lambda _spans: len(receiver.requests) == 2
    with exporting(**environ(receiver, "otlp")) as emitted:
        eventually(lambda: late(emitted), what="the refusal")
        bench.pass_time(31)
        eventually(lambda: due(bench, run_id) is None, what="the rest")
    ids = [span.id for span in receiver.of(run_id)]
    assert len(ids) == len(set(ids)) == 1 + 2 * len(names)


def test_an_unknown_price_is_no_zero(bench, receiver, exporting):
    """Where one call's price is not known, what it is part of says no cost; a handler's is 0."""
    definition = replace(pipeline(agent("a"), agent("b", "a", handler="handlers:b")), tracing=OTLP)
    run_id = bench.start(definition)
    bid, _ = bench.claim(run_id, "a")
    bench.store.complete(bid.step, bid.attempt_id, {}, Paid("claude-new", "req", PAID.usage, None))
    bench.do(run_id, "b")
    with exporting(**environ(receiver, "otlp")):
        whole(receiver, run_id)
    costs = {span.name: span.attributes.get("stepfast.cost_usd", "unknown") for span in receiver.of(run_id)}
    unknown = ["a", "a attempt 1", "tested"]
    assert (sorted(name for name in costs if costs[name] == "unknown"), costs["b"], costs["b attempt 1"]) == (
        unknown,
        0,
        0,
    )


def test_a_call_whose_answer_came_too_late_counts(bench, receiver, exporting):
    """It was paid for: its attempt, its step and the run say so."""
    run_id = bench.start(replace(line("a"), tracing=OTLP))
    slow, _ = bench.claim(run_id, "a")
    lose_worker(bench)
    bid, _ = bench.claim(run_id, "a")
    assert bench.store.fail(slow.step, slow.attempt_id, ERROR, PAID, Ending("discard")).outcome == "stale"
    bench.store.complete(bid.step, bid.attempt_id, {}, PAID)
    with exporting(**environ(receiver, "otlp")):
        whole(receiver, run_id)
    costs = {span.name: span.attributes["stepfast.cost_usd"] for span in receiver.of(run_id)}
    assert costs == {"tested": 0.02, "a": 0.02, "a attempt 1": 0.01, "a attempt 2": 0.01}
