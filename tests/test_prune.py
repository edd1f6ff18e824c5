"""Retention: what may go goes, in batches that anybody may kill; what somebody may still need stays."""

import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from uuid import UUID, uuid4

import pytest
from benches import ERROR, FREE, Bench
from commanding import in_process, process
from conftest import eventually
from pipelines import ONE_TRY, agent, line, pipeline
from sqlalchemy import text

from app.errors import KeyConflict
from app.runs import prune
from app.runs.database import engine
from app.runs.invariants import check
from app.runs.metrics import Metrics
from app.runs.orders import Orders
from app.runs.prune import BATCH_RUNS_MAX, Pruning
from app.runs.reads import Reads
from app.runs.store import Store

MONTH = timedelta(days=30)
SHARED = pipeline(agent("a", key_parts=({"path": ["input", "order"]},), key_inputs=(("input", "order"),)))
UNKNOWN = {**ERROR, "code": "outcome_unknown"}


@pytest.fixture
def bench(database_url):
    store = Store(engine(database_url, pool_max=6))
    yield Bench(store)
    store.engine.dispose()


def later(bench, days: int = 40) -> None:
    """Moves the database's clock on."""
    bench.sql("update stepfast.meta set clock_offset = clock_offset + :days * interval '1 day'", days=days)


def pruned(bench, *, dry_run=False, older_than=MONTH) -> tuple[int, dict[str, int]]:
    """How many runs went, and why others stayed, once all batches are through."""
    pruning = Pruning(bench.store.engine, older_than)
    list(pruning.count_events())
    kept: dict[str, int] = {}
    count = 0
    for batch in pruning.batches(dry_run=dry_run):
        count += batch.pruned
        kept |= {why: kept.get(why, 0) + runs for why, runs in batch.kept.items()}
    return count, kept


def rows(bench, *tables: str) -> list[int]:
    return [bench.sql(f"select count(*) from stepfast.{table}") for table in tables]


def violations(bench):
    with bench.store.engine.connect() as connection:
        return check(connection)


OF_A_RUN = ("runs", "steps", "attempts", "events", "dead_letters", "approvals", "requests", "effects")


def test_ended_run_goes_with_all_that_is_recorded_of_it(bench):
    """Nothing of it stays but its definition: not its steps, attempts, events, letters, approvals, requests, effects, own keys."""
    run = bench.start(line("a", "b"))
    bid, _ = bench.claim(run, "a")
    bench.store.begin_effect(bid.step, bid.attempt_id, "mail")
    bench.fail(bid)
    bench.resume(run)
    bench.do(run, "a", "b")
    bench.sql("select stepfast.request_v1('cancel', :r, 'me')", r=run)
    bench.sql("update stepfast.requests set state = 'refused', ended_at = now(), answer = '{}'")
    later(bench)
    assert pruned(bench, dry_run=True) == (1, {})
    assert rows(bench, "runs") == [1]
    assert pruned(bench) == (1, {})
    assert rows(bench, *OF_A_RUN, "keys") == [0] * 9
    assert rows(bench, "pipelines", "pipeline_names") == [1, 1]


def _unfinished(bench):
    bench.start(line("a"))


def _executing_in_a_failed_run(bench):
    run = bench.start(pipeline(agent("a", retry_policy=ONE_TRY), agent("b")))
    bench.claim(run, "b")
    bench.fail(bench.claim(run, "a")[0])
    bench.sql("update stepfast.dead_letters set resolved_at = now(), resolution = 'discarded'")


def _dead_letter(bench):
    bench.fail(bench.claim(bench.start(line("a")), "a")[0])


def _unknown_key(bench):
    run = bench.start(pipeline(agent("a", handler="h.py:f")))
    bench.fail(bench.claim(run, "a", repeatable=False)[0], error=UNKNOWN)
    bench.sql("update stepfast.dead_letters set resolved_at = now(), resolution = 'discarded'")


def _reserved_key(bench):
    bench.do(bench.start(line("a")), "a")
    bench.sql("update stepfast.keys set state = 'reserved', ended_at = null")


def _request(bench):
    run = bench.start(line("a"))
    bench.do(run, "a")
    bench.sql("select stepfast.request_v1('resume', :r, 'me')", r=run)


def _recent(bench):
    run = bench.start(line("a"))
    bench.fail(bench.claim(run, "a")[0])
    later(bench)
    Orders(bench.store.engine).discard_letter(bench.sql("select id from stepfast.dead_letters"), "me")
    later(bench, -40)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_unfinished, None),
        (_executing_in_a_failed_run, "unfinished"),
        (_dead_letter, "dead_letter"),
        (_unknown_key, "key"),
        (_reserved_key, "key"),
        (_request, "request"),
        (_recent, "recent"),
    ],
)
def test_what_somebody_may_need_stays(bench, make, why):
    """An unfinished run, an open dead letter, a reserved or unknown key, an order that waits, what happened since."""
    make(bench)
    later(bench)
    before = rows(bench, *OF_A_RUN, "keys")
    assert pruned(bench) == (0, {why: 1} if why else {})
    assert rows(bench, *OF_A_RUN, "keys") == before


def test_young_run_stays(bench):
    """The age counts from its end."""
    bench.do(bench.start(line("a")), "a")
    later(bench, 29)
    assert pruned(bench) == (0, {})


def test_completed_key_outlives_its_run(bench):
    """A later run with that key takes the recorded output without a call, twice where its reply was lost; the rules hold.

    What the first one saw of the world counts for the second.
    """
    first = bench.start(SHARED, {"order": "7"})
    bid, _ = bench.claim(first, "a")
    seen = [{"name": "repo", "value": "f00", "probe": "head"}]
    bench.store.complete(bid.step, bid.attempt_id, {"paid": 7}, FREE, observed=seen)
    later(bench)
    assert pruned(bench) == (1, {})
    second = bench.start(SHARED, {"order": "7"})
    bid, claim = bench.claim(second, "a")
    assert (claim.outcome, claim.output, bench.store.claim(bid).output) == ("reuse", {"paid": 7}, {"paid": 7})
    bench.store.complete(bid.step, bid.attempt_id, claim.output, FREE, reused_from=claim.reused_from)
    assert bench.run_state(second) == "completed"
    assert bench.sql("select observed from stepfast.attempts") == seen
    assert violations(bench) == []
    later(bench)
    assert pruned(bench) == (1, {})
    assert bench.sql("select output from stepfast.keys") == {"paid": 7}


def test_key_that_only_looks_like_its_runs_outlives_it(bench):
    """Who starts a run chooses its id, and may give the same text as input: another run with that order may come."""
    bench.definition = SHARED
    bench.store.publish(SHARED)
    order = str(uuid4())
    start = (
        "select run_id from stepfast.enqueue_v1('tested', jsonb_build_object('order', cast(:o as text)), p_run => :r)"
    )
    bid, _ = bench.claim(bench.sql(start, o=order, r=UUID(order)), "a")
    bench.complete(bid, {"paid": 7})
    later(bench)
    assert pruned(bench) == (1, {})
    _, claim = bench.claim(bench.start(SHARED, {"order": order}), "a")
    assert (claim.outcome, claim.output) == ("reuse", {"paid": 7})


def test_key_that_names_its_run_somewhere_goes_with_it(bench):
    """Wherever run_id stands in it. A field of the input that is called so is none."""
    parts = ({"path": ["input", "order"]}, {"text": "-"}, {"path": ["run_id"]})
    field = ({"path": ["input", "run_id"]},)
    both = pipeline(agent("a", key_parts=parts), agent("b", key_parts=field))
    bench.do(bench.start(both, {"order": "7", "run_id": "8"}), "a", "b")
    later(bench)
    assert pruned(bench) == (1, {})
    assert bench.sql("select array_agg(agent || ' ' || key) from stepfast.keys") == ["b 8"]


def test_start_key_outlives_its_run(bench):
    """Starting again with the key of a run that was pruned starts nothing, and gives its id; another input is refused."""
    run = bench.start(line("a"), {"x": 1}, key="order-7")
    bench.do(run, "a")
    later(bench)
    assert pruned(bench) == (1, {})
    assert bench.store.enqueue("tested", {"x": 1}, key="order-7") == (run, False)
    with pytest.raises(KeyConflict):
        bench.store.enqueue("tested", {"x": 2}, key="order-7")
    assert rows(bench, "runs", "steps") == [0, 0]
    assert bench.store.enqueue("tested", {"x": 1}, key="order-8")[1]


def test_start_during_its_runs_prune_waits_for_it(bench):
    """Whoever starts with a key while its run is being deleted is given that run, too."""
    run = bench.start(line("a"), {"x": 1}, key="order-7")
    bench.do(run, "a")
    later(bench)
    pruning = Pruning(bench.store.engine, MONTH)
    list(pruning.count_events())
    waiting = (
        "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like '%enqueue_v1%'"
        " and datname = current_database()"
    )
    with (
        ThreadPoolExecutor(1) as pool,
        bench.store.engine.connect().execution_options(isolation_level="READ COMMITTED") as pruner,
    ):
        delete = text("select stepfast.prune_runs_v1(:before, '-infinity', gen_random_uuid(), 10, 10, false)->'pruned'")
        assert pruner.execute(delete, {"before": pruning.before}).scalar() == 1
        again = pool.submit(bench.store.enqueue, "tested", {"x": 1}, key="order-7")
        eventually(lambda: bench.sql(waiting), what="a start that waits")
        pruner.commit()
        assert again.result() == (run, False)
    assert rows(bench, "runs", "spent_keys") == [0, 1]


def test_start_whose_run_goes_in_its_midst_is_given_it(bench):
    """Whoever found the run of its key, and not its row a statement later, is given the run that was pruned."""
    run = bench.start(line("a"), {"x": 1}, key="order-7")
    bench.do(run, "a")
    later(bench)
    # Fires where an insert is over, also one that met a key: before the function's next statement.
    bench.sql("""
        create function pause() returns trigger language plpgsql as $$
        begin perform pg_advisory_xact_lock_shared(7); return null; end $$""")
    bench.sql("create trigger pause after insert on stepfast.runs for each statement execute function pause()")
    waiting = "select count(*) from pg_locks l join pg_database d on d.oid = l.database where d.datname = current_database() and l.locktype = 'advisory' and l.objid = 7 and not l.granted"
    with (
        ThreadPoolExecutor(1) as pool,
        bench.store.engine.connect().execution_options(isolation_level="READ COMMITTED") as holder,
    ):
        holder.execute(text("select pg_advisory_xact_lock(7)"))
        again = pool.submit(bench.store.enqueue, "tested", {"x": 1}, key="order-7")
        eventually(lambda: bench.sql(waiting), what="a start that found its run")
        assert pruned(bench) == (1, {})
        holder.rollback()
        assert again.result() == (run, False)
    assert rows(bench, "runs", "spent_keys") == [0, 1]


def test_workers_that_ended_go(bench):
    """Those that ended long ago, but for one under which something still executes."""
    bench.sql("update stepfast.workers set ended_at = stepfast.now()")
    holds = Bench(bench.store)
    run = holds.start(line("a"))
    holds.claim(run, "a")
    bench.sql("update stepfast.workers set ended_at = stepfast.now()")
    later(bench)
    alive = Bench(bench.store)
    young = Bench(bench.store)
    bench.sql("update stepfast.workers set ended_at = stepfast.now() where id = :id", id=young.worker_id)
    assert list(Pruning(bench.store.engine, MONTH).rest()) == [(1, 0)]
    assert bench.sql("select array_agg(id order by id) from stepfast.workers") == [
        holds.worker_id,
        alive.worker_id,
        young.worker_id,
    ]


def test_definitions_that_no_run_has_go(bench):
    """Of those published long ago stay: what a run has, the newest, and what the name means, or meant until lately."""
    versions = [pipeline(agent("a"), version=str(number)) for number in range(5)]
    used = bench.start(versions[0])
    for version in versions[1:]:
        bench.store.publish(version)
    bench.store.publish(versions[2])  # the name goes back
    assert bench.sql("select hash from stepfast.pipeline_names") == versions[2].hash
    assert list(Pruning(bench.store.engine, MONTH).rest()) == []
    later(bench)
    assert list(Pruning(bench.store.engine, MONTH).rest()) == [(0, 2)]
    left = "select array_agg(version order by version) from stepfast.pipelines"
    assert bench.sql(left) == ["0", "2", "4"]
    bench.do(used, "a")
    later(bench)
    assert pruned(bench) == (1, {})
    bench.store.publish(versions[4])
    assert (
        list(Pruning(bench.store.engine, MONTH).rest()) == []
    )  # somebody may be about to start what the name just meant
    later(bench)
    assert list(Pruning(bench.store.engine, MONTH).rest()) == [(0, 2)]
    assert bench.sql(left) == ["4"]


def test_metrics_lose_nothing(bench):
    """What was not counted yet is counted before it goes."""
    bench.do(bench.start(line("a")), "a")
    later(bench)
    assert pruned(bench) == (1, {})
    totals = {total.metric: total.total for total in Metrics(bench.store.engine).totals()}
    assert (totals["runs_ended"], totals["step_seconds_le_Infinity"]) == (1, 1)


def test_every_row_of_a_run_is_found_by_an_index(bench):
    """Each table that falls with a run has an index, whole, that begins with the run's id; the runs are found in their order."""
    without = bench.sql("""
        select coalesce(array_agg(c.conrelid::regclass::text), '{}') from pg_constraint c
        where c.contype = 'f' and c.confrelid = 'stepfast.runs'::regclass and not exists (
            select from pg_index i where i.indrelid = c.conrelid and i.indpred is null and i.indkey[0] = c.conkey[1])
    """)
    assert without == []
    with bench.store.engine.connect() as connection:
        connection.execute(text("set enable_seqscan = off"))
        plan = connection.execute(
            text(
                "explain select id from stepfast.runs where ended_at is not null and ended_at < now()"
                " and (ended_at, id) > (now(), gen_random_uuid()) order by ended_at, id limit 100"
            )
        ).scalars()
        assert any("runs_ended" in row for row in plan)


def test_prune_waits_for_nobody_and_hurts_nobody(bench):
    """While runs are pruned, others of the same shared keys are claimed and completed; each takes the one recorded output."""
    orders = range(30)
    for order in orders:
        bid, _ = bench.claim(bench.start(SHARED, {"order": str(order)}), "a")
        bench.complete(bid, {"paid": order})
    later(bench)

    def again(order: int) -> object:
        run = bench.start(SHARED, {"order": str(order)})
        bid, claim = bench.claim(run, "a")
        assert claim.outcome == "reuse"
        bench.store.complete(bid.step, bid.attempt_id, claim.output, FREE, reused_from=claim.reused_from)
        return claim.output

    with ThreadPoolExecutor(4) as pool:
        taken = pool.map(again, [*orders, *orders])
        while pruned(bench)[0]:
            pass
        assert list(taken) == [{"paid": order} for order in [*orders, *orders]]
    assert pruned(bench) == (0, {})
    assert rows(bench, "runs", "keys") == [60, 30]
    assert violations(bench) == []


def test_held_run_is_skipped(bench):
    """Somebody's lock delays no batch: the run is left to the next prune."""
    runs = [bench.start(line("a")) for _ in range(2)]
    for run in runs:
        bench.do(run, "a")
    later(bench)
    list(Pruning(bench.store.engine, MONTH).count_events())
    with bench.store.engine.connect().execution_options(isolation_level="READ COMMITTED") as holder:
        holder.execute(text("select from stepfast.runs where id = :r for no key update"), {"r": runs[0]})
        assert pruned(bench) == (1, {"busy": 1})
        holder.rollback()
    assert pruned(bench) == (1, {})


RUNS = 2 * BATCH_RUNS_MAX + 50


@pytest.mark.slow
def test_killed_in_the_middle_prune_goes_on(system, here, tmp_path, monkeypatch):
    """dbos-transact-py garbage_collection_batched_resumable: batches; killed inside one, nothing is half; the next one ends it."""
    bench = Bench(Store(engine(system.database_url, pool_max=8)))
    bench.store.publish(SHARED)
    bench.definition = SHARED

    def one(number: int) -> None:
        run, _ = bench.store.enqueue("tested", {"order": str(number)})
        bench.complete(bench.claim(run, "a")[0], {"paid": number})

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(one, range(RUNS)))
    stays = bench.start(SHARED, {"order": "young"})
    later(bench)
    # The last run's key is held: the batch that holds it waits in the middle of its transaction.
    last = bench.sql("select id from stepfast.runs where ended_at is not null order by ended_at desc, id desc limit 1")
    with bench.store.engine.connect().execution_options(isolation_level="READ COMMITTED") as holder:
        holder.execute(text("select from stepfast.keys where run_id = :r for update"), {"r": last})
        running = process("prune", "--yes", env=system.environ, cwd=tmp_path)
        waiting = (
            "select pid from pg_stat_activity where wait_event_type = 'Lock' and query like '%prune_runs_v1%'"
            " and datname = current_database()"
        )
        pid = eventually(lambda: bench.sql(waiting), what="a prune inside its last batch")
        assert rows(bench, "runs") == [RUNS - 2 * BATCH_RUNS_MAX + 1]
        running.send_signal(signal.SIGKILL)
        running.communicate(timeout=20)
        bench.sql("select pg_terminate_backend(:pid)", pid=pid)
        eventually(lambda: not bench.sql(waiting), what="the end of its session")
        holder.rollback()
    # What is left is whole: its batch is as if it had never begun.
    assert rows(bench, "runs", "steps", "attempts") == [51, 51, 50]
    assert violations(bench) == []
    assert pruned(bench) == (50, {})
    assert rows(bench, "runs", "keys") == [1, RUNS]
    assert bench.run_state(stays) == "pending"
    _, claim = bench.claim(bench.start(SHARED, {"order": "3"}), "a")
    assert (claim.outcome, claim.output) == ("reuse", {"paid": 3})
    bench.store.engine.dispose()


# The command.


@pytest.fixture
def cli(here, capsys):
    return in_process(capsys)


def test_command_asks_counts_and_deletes(cli, here, bench, monkeypatch):
    """A dry run deletes nothing; without a terminal it needs --yes; what stays is told, with what to do about it."""
    run = bench.start(line("a"))
    bench.do(run, "a")
    bench.fail(bench.claim(bench.start(line("a")), "a")[0])
    ended = Bench(bench.store).worker_id
    bench.sql("update stepfast.workers set ended_at = stepfast.now() where id = :id", id=ended)
    later(bench)
    dry = cli("prune", "--dry-run")
    assert dry.out.startswith("1 run that ended before ")
    assert dry.following == ["prune"]
    cli("prune").refuses(2, "1 runs would be deleted", "--yes")
    assert rows(bench, "runs") == [2]
    done = cli("prune", "--yes", "--json").json
    assert done.keys() == {"before", "dry_run", "looked_at", "pruned", "kept", "workers", "definitions"}
    assert (done["looked_at"], done["pruned"], done["kept"]) == (2, 1, {"dead_letter": 1})
    assert (done["workers"], done["definitions"]) == (1, 0)
    told = cli("prune", "--yes")
    assert "1 stay: a dead letter of it is open" in told.out
    assert told.following == ["dead"]
    assert Reads(bench.store.engine).run_list()[0]["pipeline"] == "tested"
    cli("show", str(run)).refuses(2, "No run has an id that begins with")
    cli("prune", "--older-than", "soon").refuses(2, "'soon' is no age such as 30d")


def test_doctor_mentions_what_could_be_pruned(cli, here, bench, monkeypatch):
    """Where many runs ended long ago, it names the command."""
    from app.cli import doctor

    bench.do(bench.start(line("a")), "a")
    later(bench)
    monkeypatch.setattr(doctor, "OLD_RUNS_MENTIONED", 1)
    checks = cli("doctor", "--json").json["checks"]
    assert "stepfast prune --dry-run" in [entry["next"] for entry in checks]


def test_why_a_run_stays_has_a_sentence_for_each(bench):
    """Python and the database name the same reasons."""
    body = bench.sql("select prosrc from pg_proc where proname = 'kept_because'")
    assert {why for why in prune.KEPT if f"'{why}'" in body} == prune.KEPT.keys() - {"busy"}
