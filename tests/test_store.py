"""The database's functions: who may write, and what is decided together."""

import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from benches import CALM_MS, ERROR, Bench
from pipelines import agent, diamond, line, pipeline
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.errors import KeyConflict, Misuse, NotPossible, UnknownName
from app.runs import statements
from app.runs.database import engine, is_outage
from app.runs.store import StepKey, Store


@pytest.fixture
def bench(database_url):
    store = Store(engine(database_url, pool_max=16))
    yield Bench(store)
    store.engine.dispose()


def test_mark_that_a_step_was_sent_waits_for_no_disk(bench):
    """A start pays for one flush less. What a claim or a completion writes after it is flushed, and the mark with it."""
    run = bench.start(line("a"))
    with bench.store.engine.connect().execution_options(isolation_level="READ COMMITTED") as connection:
        taken = connection.execute(statements.TAKE_UNSENT, {"run": run, "limit": 10}).all()
        assert [(sent.run_id, sent.agent) for sent in taken] == [(run, "a")]
        assert connection.scalar(text("show synchronous_commit")) == "off"
        connection.commit()
        assert connection.scalar(text("show synchronous_commit")) == "on"


def test_line_runs_to_its_end(bench):
    """Each completion releases the next step, and the last one completes the run."""
    run = bench.start(line("a", "b", "c"))
    assert bench.states(run) == {"a": "available", "b": "pending", "c": "pending"}
    assert bench.do(run, "a").ready == (StepKey(run, "b"),)
    ended = bench.do(run, "b", "c")
    assert ended.run_state == "completed"
    assert set(bench.states(run).values()) == {"completed"}


def test_events_are_numbered_without_gaps(bench):
    """A run's events have the sequence 1, 2, 3, …, given under the run's lock."""
    run = bench.start(diamond())
    bench.do(run, "a", "b", "c", "d")
    with bench.store.engine.connect() as connection:
        rows = connection.execute(
            text("select seq, name from stepfast.events where run_id = :r order by seq"), {"r": run}
        ).all()
    assert [row.seq for row in rows] == list(range(1, len(rows) + 1))
    assert [rows[0].name, rows[-1].name] == ["run.enqueued", "run.completed"]


def test_claim_hands_over_what_the_agent_reads(bench):
    """Outputs come with the claim, and the attempt pins the attempts and hashes that it read."""
    run = bench.start(diamond(), {"topic": "x"})
    first, _ = bench.claim(run, "a")
    bench.complete(first, {"found": 1})
    bench.do(run, "b", "c")
    bid, claim = bench.claim(run, "d")
    assert claim.input == {"topic": "x"}
    assert claim.outputs == {"a": {"found": 1}, "b": {"by": "b"}, "c": {"by": "c"}}
    reads = bench.sql("select reads from stepfast.attempts where id = :a", a=bid.attempt_id)
    assert reads["a"]["attempt"] == str(first.attempt_id)
    assert len(reads["a"]["hash"]) == 64


def test_only_one_of_many_claims_a_step(bench):
    """dbos-transact-py conflicts_when_duplicate_execution_wins: of sixteen at once one gets it, the others are stale."""
    run = bench.start(line("a"))
    barrier = threading.Barrier(16)

    def claim(_):
        bid = bench.bid(run, "a")
        barrier.wait()
        return bench.store.claim(bid).outcome

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(claim, range(16)))
    assert sorted(outcomes) == ["claimed"] + ["stale"] * 15


def test_repeated_claim_of_one_attempt_answers_the_same(bench):
    """A claim whose reply was lost is asked again, and holds."""
    run = bench.start(line("a"))
    bid, first = bench.claim(run, "a")
    assert bench.store.claim(bid) == first
    assert bench.sql("select count(*) from stepfast.attempts") == 1


def test_repeated_completion_of_one_attempt_answers_the_same(bench):
    """dbos-transact-py replays_its_own_lost_commit: completed by my attempt is success."""
    run = bench.start(line("a", "b"))
    bid, _ = bench.claim(run, "a")
    first = bench.complete(bid)
    assert bench.complete(bid) == first
    assert bench.sql("select count(*) from stepfast.events where name = 'step.completed'") == 1


def test_lost_session_is_an_outage_and_the_next_call_has_another(bench):
    """What the driver raises is told as SQLAlchemy would, without what was given, and every session of the pool is new."""
    run = bench.start(line("a"))
    bid, _ = bench.claim(run, "a")
    with psycopg.connect(
        bench.store.engine.url.set(drivername="postgresql").render_as_string(), autocommit=True
    ) as other:
        others = "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        other.execute(f"select pg_terminate_backend(pid, 5000) {others}")
    with pytest.raises(DBAPIError) as lost:
        bench.complete(bid, {"by": "what was paid for"})
    assert lost.value.connection_invalidated
    assert is_outage(lost.value)
    assert "paid for" not in str(lost.value)
    assert bench.store.lost_a_session_within(10)
    assert bench.complete(bid).run_state == "completed"
    assert bench.store.engine.pool.checkedout() == 0


def test_fence_refuses_whoever_lost_the_claim(bench):
    """Absurd checkpoint_write_on_failed_run_raises, dbos-transact-py workflow_outcome_is_owned_by_the_pending_row.

    An attempt that was rescued can write nothing any more.
    """
    run = bench.start(line("a", "b"))
    old, _ = bench.claim(run, "a")
    bench.sql("update stepfast.workers set ended_at = stepfast.now()")
    assert [entry["code"] for entry in bench.sweep().rescued] == ["worker_lost"]
    bench.worker_id = bench.sql(
        "insert into stepfast.workers (host, pid, code_version, started_at, lease_until)"
        " values ('h', 2, 1, stepfast.now(), stepfast.now() + interval '1 hour') returning id"
    )
    new, claim = bench.claim(run, "a")
    assert claim.outcome == "claimed"
    assert bench.complete(old, {"by": "the old one"}).outcome == "stale"
    assert bench.fail(old).outcome == "stale"
    assert bench.store.begin_effect(old.step, old.attempt_id, "k") == {"state": "stale"}
    assert bench.complete(new).outcome == "completed"
    assert bench.complete(old, {"by": "the old one"}).outcome == "stale"
    assert bench.sql("select output from stepfast.attempts where id = :a", a=new.attempt_id) == {"by": "a"}


def test_output_of_an_ended_attempt_cannot_be_changed(bench):
    """Outputs are immutable rows of their attempt, whoever writes."""
    run = bench.start(line("a"))
    bench.do(run, "a")
    with pytest.raises(DBAPIError, match="is ended and may not change"):
        bench.sql("update stepfast.attempts set output = '{}'")


@pytest.mark.slow
def test_two_last_branches_that_commit_at_once_release_their_join(bench):
    """300 joins, each with both branches committing at a barrier: every join is released once, by a committer."""
    joins = 300
    definition = pipeline(agent("b"), agent("c"), agent("d", "b", "c"))
    runs = [bench.start(definition) for _ in range(joins)]
    bids = {run: [bench.claim(run, name)[0] for name in ("b", "c")] for run in runs}
    with ThreadPoolExecutor(2) as pool:
        barrier = threading.Barrier(2)

        def commit(number):
            released = []
            for run in runs:
                barrier.wait()
                released.append(bench.complete(bids[run][number]).ready)
            return released

        first, second = pool.map(commit, (0, 1))
    for run, one, other in zip(runs, first, second, strict=True):
        assert one + other == (StepKey(run, "d"),)
    assert bench.sweep().unsent is False


def test_key_starts_one_run(bench):
    """Starting twice with one key gives one run; another input is refused, with both hashes."""
    definition = line("a")
    bench.store.publish(definition)
    first, created = bench.store.enqueue("tested", {"x": 1}, key="k")
    assert (created, bench.store.enqueue("tested", {"x": 1}, key="k")) == (True, (first, False))
    with pytest.raises(KeyConflict, match=r"[0-9a-f]{64}, not [0-9a-f]{64}"):
        bench.store.enqueue("tested", {"x": 2}, key="k")
    assert bench.store.enqueue("tested", {"x": 2}, key="k", tenant="other")[1] is True


def test_many_starts_at_once_with_one_key_give_one_run(bench):
    """Sixteen callers race for one key."""
    bench.store.publish(line("a"))
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda _: bench.store.enqueue("tested", {"x": 1}, key="k"), range(16)))
    assert len({run for run, _ in results}) == 1
    assert sorted(created for _, created in results) == [False] * 15 + [True]


@pytest.mark.parametrize(
    ("name", "run_input", "error"), [("nope", {}, UnknownName), ("tested", [1], Misuse), ("tested", None, Misuse)]
)
def test_bad_starts_are_refused(bench, name, run_input, error):
    """Unknown pipelines and inputs that are no object are refused at the call."""
    bench.store.publish(line("a"))
    with pytest.raises(error):
        bench.store.enqueue(name, run_input)


def test_version_with_other_content_is_refused(bench):
    """One name and version has one content; a new version moves the name; a run keeps what it was started with."""
    old, new = line("a"), pipeline(agent("a"), version="2")
    run = bench.start(old)
    with pytest.raises(Misuse, match="new version"):
        bench.store.publish(pipeline(agent("z")))
    assert bench.store.publish(new) is True
    assert bench.store.publish(new) is False
    assert bench.sql("select pipeline_hash from stepfast.runs where id = :r", r=run) == old.hash
    second, _ = bench.store.enqueue("tested", {})
    assert bench.sql("select pipeline_hash from stepfast.runs where id = :r", r=second) == new.hash


def test_retry_waits_in_the_database(bench):
    """A failed attempt becomes available again when its time has come, not before."""
    run = bench.start(line("a"))
    bid, _ = bench.claim(run, "a")
    assert bench.fail(bid, retry_ms=60_000).outcome == "retryable"
    assert bench.sweep().due == 0
    bench.pass_time(61)
    assert bench.sweep(lease_ms=CALM_MS).due == 1
    _, claim = bench.claim(run, "a")
    assert (claim.number, claim.failures) == (2, 1)


def test_discard_fails_the_run_and_starts_nothing_new(bench):
    """aws-durable-execution 8-6 fail-fast: executing steps finish and are recorded, the rest stay pending, one dead letter says why."""
    run = bench.start(diamond())
    bench.do(run, "a")
    b, _ = bench.claim(run, "b")
    c, _ = bench.claim(run, "c")
    assert bench.fail(b).run_state == "failed"
    assert bench.complete(c).ready == ()
    assert bench.states(run) == {"a": "completed", "b": "discarded", "c": "completed", "d": "pending"}
    (payload,) = bench.store.unpublished_dead_letters(10)
    assert (payload["code"], payload["agent"], payload["run_id"], payload["version"]) == ("broken", "b", str(run), 1)


def test_halt_holds_back_what_had_not_started(bench):
    """Available and waiting siblings of a discarded step go back to pending, and a late message for them is stale."""
    run = bench.start(diamond())
    bench.do(run, "a")
    b, _ = bench.claim(run, "b")
    bench.fail(b)
    assert bench.states(run)["c"] == "pending"
    assert bench.claim(run, "c")[1].outcome == "stale"


def test_executing_sibling_that_fails_later_waits_for_the_resume(bench):
    """In a failed run nothing new starts, also no retry."""
    run = bench.start(diamond())
    bench.do(run, "a")
    b, _ = bench.claim(run, "b")
    c, _ = bench.claim(run, "c")
    bench.fail(b)
    assert bench.fail(c, retry_ms=1).outcome == "pending"
    bench.resume(run, "me")
    assert bench.states(run) == {"a": "completed", "b": "available", "c": "available", "d": "pending"}


def test_resume_continues_from_the_last_checkpoint(bench):
    """aws-durable-execution 1-9 replay skips success, dbos-transact-py fork_from_failure: completed steps stay.

    The discarded one may be claimed with a fresh budget; its dead letter is resolved.
    """
    run = bench.start(line("a", "b", "c"))
    bench.do(run, "a")
    bid, _ = bench.claim(run, "b")
    bench.fail(bid)
    assert bench.resume(run, "me") == ("b",)
    assert bench.sql("select resolution from stepfast.dead_letters") == "resumed"
    _, claim = bench.claim(run, "b")
    assert (claim.outcome, claim.failures, claim.number, claim.generation) == ("claimed", 0, 2, 1)
    with pytest.raises(NotPossible, match="running"):
        bench.resume(run, "me")


def test_one_open_dead_letter_for_a_discarded_step(bench):
    """Failing again after a resume opens a new one; the old one stays resolved."""
    run = bench.start(line("a"))
    for _ in range(2):
        bid, _ = bench.claim(run, "a")
        bench.fail(bid)
        assert bench.sql("select count(*) from stepfast.dead_letters where resolved_at is null") == 1
        bench.resume(run, "me")
    assert bench.sql("select count(*) from stepfast.dead_letters where resolved_at is null") == 0


def test_fingerprint_ignores_numbers_and_ids(bench):
    """Errors that differ only in numbers and ids share a fingerprint; another message has another."""
    found = []
    for message in ("Timed out after 31 s in 0f3e9a77-aaaa", "Timed out after 29 s in 1b3e9a77-bbbb", "Refused."):
        run = bench.start(line("a"))
        bid, _ = bench.claim(run, "a")
        bench.fail(bid, error=ERROR | {"message": message})
        found.append(bench.sql("select error_fingerprint from stepfast.dead_letters where run_id = :r", r=run))
    assert found[0] == found[1] != found[2]


def test_dead_worker_loses_its_steps_and_they_go_on(bench):
    """A worker whose advisory lock is free for the grace is dead; its repeatable step is available again."""
    run = bench.start(line("a"))
    bench.claim(run, "a")
    # Nobody holds the lock of this made-up worker: the first look notes it, the second one, after the grace, decides.
    assert bench.sweep(grace_ms=1_000).lost == ()
    bench.pass_time(2)
    swept = bench.sweep(grace_ms=1_000)
    assert swept.lost == (bench.worker_id,)
    assert [(entry["agent"], entry["reason"]) for entry in swept.rescued] == [("a", "died")]
    assert bench.states(run) == {"a": "available"}
    assert bench.sql("select worker_losses from stepfast.steps") == 1


def test_live_worker_is_left_alone(bench):
    """While the lock is held and the lease is fresh, nothing is rescued, however often is looked."""
    run = bench.start(line("a"))
    bench.claim(run, "a")
    with bench.store.engine.connect() as holder:
        holder.execute(text("select pg_advisory_lock(7083, :id)"), {"id": bench.worker_id})
        for _ in range(3):
            bench.pass_time(10)
            assert bench.sweep().lost == ()
        holder.execute(text("select pg_advisory_unlock_all()"))
    assert bench.states(run) == {"a": "executing"}


def test_expired_lease_is_a_death(bench):
    """Absurd claim_timeout_releases_run_to_new_worker: a frozen process keeps its lock; its lease runs out."""
    run = bench.start(line("a"))
    bench.claim(run, "a")
    with bench.store.engine.connect() as holder:
        holder.execute(text("select pg_advisory_lock(7083, :id)"), {"id": bench.worker_id})
        bench.pass_time(3_601)
        # First it is suspect: after Postgres was frozen every lease is old, and a beat may be on its way.
        assert bench.sweep(grace_ms=1_000).lost == ()
        bench.pass_time(2)
        assert bench.sweep(grace_ms=1_000).lost == (bench.worker_id,)
        holder.execute(text("select pg_advisory_unlock_all()"))
    assert bench.states(run) == {"a": "available"}


def test_nobody_is_dead_for_a_lease_after_postgres_started(bench):
    """Every lock is free and every lease old then: waiting is better than paying twice."""
    run = bench.start(line("a"))
    bench.claim(run, "a")
    bench.pass_time(7_200)
    assert bench.sweep(lease_ms=100_000_000).lost == ()
    assert bench.states(run) == {"a": "executing"}


def test_death_under_an_unrepeatable_handler_is_unknown(bench):
    """Rule 7: what may have had its effect is never repeated by itself; plain resume refuses, naming both ways out."""
    definition = pipeline(agent("a", handler="handlers:a"))
    run = bench.start(definition)
    bench.claim(run, "a", repeatable=False)
    bench.sql("update stepfast.workers set ended_at = stepfast.now()")
    assert [entry["code"] for entry in bench.sweep().rescued] == ["outcome_unknown"]
    assert (bench.states(run), bench.run_state(run)) == ({"a": "discarded"}, "failed")
    assert bench.sql("select state from stepfast.keys") == "unknown"
    with pytest.raises(NotPossible, match=r"override .* --output FILE.* resume .* --from a"):
        bench.resume(run, "me")


def test_worker_losses_have_a_limit_of_their_own(bench):
    """A step under which workers keep dying is discarded after max_worker_losses, not after max_attempts."""
    run = bench.start(line("a"))
    for number in range(6):
        bench.worker_id = bench.sql(
            "insert into stepfast.workers (host, pid, code_version, started_at, lease_until)"
            " values ('h', 1, 1, stepfast.now(), stepfast.now() + interval '1 hour') returning id"
        )
        # From the second loss on only a process that executes nothing else may have it.
        assert bench.claim(run, "a")[1].outcome == ("claimed" if number < 2 else "alone")
        assert number < 2 or bench.claim(run, "a", alone=True)[1].outcome == "claimed"
        bench.sql("update stepfast.workers set ended_at = stepfast.now() where ended_at is null")
        bench.sweep()
        assert bench.states(run) == {"a": "available" if number < 5 else "discarded"}
    assert bench.sql("select failures from stepfast.steps") == 0


def test_overstaying_attempt_is_taken_away(bench):
    """Past its own deadline an attempt is rescued although its worker lives."""
    run = bench.start(line("a"))
    bench.sql("update stepfast.workers set lease_until = stepfast.now() + interval '9 hours'")
    bid, _ = bench.claim(run, "a", timeout_ms=1_000)
    with bench.store.engine.connect() as holder:
        holder.execute(text("select pg_advisory_lock(7083, :id)"), {"id": bench.worker_id})
        bench.pass_time(2)
        # It is given time for a commit that waited for Postgres, from when it is first seen late.
        assert bench.sweep(grace_ms=1_000).rescued == ()
        bench.pass_time(2)
        assert [entry["reason"] for entry in bench.sweep(grace_ms=1_000).rescued] == ["overstayed its time"]
        holder.execute(text("select pg_advisory_unlock_all()"))
    assert bench.complete(bid).outcome == "stale"
