"""`stepfast`, the client: a run starts with the host's commit, and only then, whatever dies or is away."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
import sqlalchemy
import stepfast
from conftest import ROOT, eventually
from hosting import UNSWEPT, fetch, plain, silent_broker
from sqlalchemy.orm import Session, scoped_session, sessionmaker

RUNS = "select count(*) from stepfast.runs"
NOWHERE = "redis://127.0.0.1:1/0"


def _count(url) -> int:
    return fetch(url, RUNS)[0][0]


def _hosts(url, engine):
    """By name: a connection of each library, in a transaction that is committed or rolled back by the caller."""
    psycopg_connection = psycopg.connect(plain(url), row_factory=psycopg.rows.dict_row)
    session = Session(engine)
    scoped = scoped_session(sessionmaker(engine))
    sqlalchemy_connection = engine.connect()
    return {
        "psycopg": psycopg_connection,
        "Connection": sqlalchemy_connection,
        "Session": session,
        "scoped_session": scoped,
    }


def test_import_is_light():
    """`import stepfast` loads no driver and no framework, and takes under 0.1 s of CPU."""
    code = (
        "import sys, time; began = time.process_time(); import stepfast; took = time.process_time() - began;"
        "print(took, *sorted({m.split('.')[0] for m in sys.modules}))"
    )
    fastest = 9.0
    for _ in range(3):
        took, *loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd="/").split()
        fastest = min(fastest, float(took))
    assert {"psycopg", "sqlalchemy", "django", "flask", "kombu", "celery", "jsonschema", "app"}.isdisjoint(loaded)
    assert fastest < 0.1


def test_versions_of_the_two_packages_are_one():
    """They are released together."""
    import tomllib

    versions = {
        tomllib.loads((ROOT / name).read_text())["project"]["version"]
        for name in ("pyproject.toml", "client/pyproject.toml")
    }
    assert len(versions) == 1


@pytest.mark.parametrize("name", ["psycopg", "Connection", "Session", "scoped_session"])
def test_run_is_as_good_as_the_hosts_transaction(database_url, engine, client, pipeline, name):
    """Rolled back it never started; committed it did; and others do not see it before."""
    hosts = _hosts(database_url, engine)
    host = hosts[name]
    client.enqueue(pipeline, {"order": 1}, connection=host)
    host.rollback()
    run = client.enqueue(pipeline, {"order": 2}, connection=host)
    assert _count(database_url) == 0
    host.commit()
    assert fetch(database_url, "select id, input->>'order' from stepfast.runs") == [(run.id, "2")]
    assert client.run(run.id).status().state == "pending"
    for each in hosts.values():
        each.close()


@pytest.mark.parametrize("name", ["psycopg", "Connection", "Session"])
def test_reading_leaves_the_hosts_connection_as_it_was(database_url, engine, client, pipeline, name):
    """A status that is asked for outside a transaction opens none."""
    hosts = _hosts(database_url, engine)
    host = hosts[name]
    run = client.enqueue(pipeline, {"order": 1}, connection=host)
    host.commit()
    assert run.status().steps == {"check": "available", "ship": "pending"}
    if name == "psycopg":
        assert host.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    else:
        assert not host.in_transaction()
    for each in hosts.values():
        each.close()


@pytest.mark.parametrize(
    ("run_input", "said"),
    [
        ({"order": "seven"}, "'seven' is not of type 'integer'"),
        ({}, "'order' is a required property"),
        ([], "must be a JSON object"),
        ({"order": float("nan")}, "no JSON"),
        ({"order": 1, "x": "\x00"}, "NUL"),
        ({"order": 1, "x": "\ud800"}, "no JSON"),
        ({"order": 1, "x": "y" * 1_000_001}, "1,000,"),
    ],
)
def test_input_is_refused_at_the_call(database_url, client, pipeline, run_input, said):
    """What the pipeline's input_schema, or Postgres, does not take: one sentence, and nothing is written."""
    with pytest.raises(stepfast.InvalidInput, match=said):
        client.enqueue(pipeline, run_input)
    assert _count(database_url) == 0


def test_unknown_pipeline_leaves_the_transaction_usable(database_url, client, pipeline):
    """It is refused before anything is written: the host may catch it and go on."""
    with psycopg.connect(plain(database_url)) as host:
        with pytest.raises(stepfast.UnknownName, match="stepfast publish"):
            client.enqueue("nothing", {"order": 1}, connection=host)
        client.enqueue(pipeline, {"order": 1}, connection=host)
    assert _count(database_url) == 1


def test_text_that_looks_like_a_nul_is_none(client, pipeline, database_url):
    """A backslash and `u0000` is text."""
    with pytest.raises(stepfast.InvalidInput, match="Additional properties"):
        client.enqueue(pipeline, {"order": 1, "x": "\\u0000"})


def test_published_schema_counts_at_once(system, here, write_skill, client, pipeline):
    """A client that checked against the old definition checks against the new one after a publish."""
    client.enqueue(pipeline, {"order": 1})
    folder = write_skill("- {id: check}", "def check(ctx): return {}\n", files={})
    file = folder / "tested.skill.yaml"
    file.write_text(file.read_text().replace("1.0.0", "2.0.0"))
    system.publish(here, folder)
    assert client.enqueue(pipeline, {"anything": True}).created


def test_key_starts_one_run(database_url, client, pipeline):
    """The same key with the same input is the same run; with another input it is refused."""
    first = client.enqueue(pipeline, {"order": 1}, key="k")
    again = client.enqueue(pipeline, {"order": 1}, key="k")
    assert (first.created, again.created, again.id) == (True, False, first.id)
    with pytest.raises(stepfast.KeyConflict, match="another key"):
        client.enqueue(pipeline, {"order": 2}, key="k")
    assert client.enqueue(pipeline, {"order": 2}, key="k", tenant="other").created
    assert _count(database_url) == 2


def test_two_hundred_at_once_with_one_key_start_one_run(database_url, engine, client, pipeline):
    """Whichever library, each in a transaction of its own: one creates, all get the same id."""
    pool = sqlalchemy.create_engine(database_url, pool_size=16, max_overflow=0)

    def start(number):
        if number % 2:
            with Session(pool) as session, session.begin():
                return client.enqueue(pipeline, {"order": 1}, key="one", connection=session)
        with pool.begin() as connection:
            return client.enqueue(pipeline, {"order": 1}, key="one", connection=connection)

    with ThreadPoolExecutor(16) as threads:
        handles = list(threads.map(start, range(200)))
    pool.dispose()
    assert len({handle.id for handle in handles}) == 1
    assert [handle.created for handle in handles].count(True) == 1
    assert _count(database_url) == 1


def test_key_that_an_open_transaction_holds_is_not_waited_for_without_end(engine, client, pipeline):
    """Whether its run will have been, that one's commit decides: a sentence after five seconds, and no driver's error."""
    with engine.connect() as first, engine.connect() as second:
        client.enqueue(pipeline, {"order": 1}, key="k", connection=first)
        began = time.monotonic()
        with pytest.raises(stepfast.NotReady, match="Another transaction holds"):
            client.enqueue(pipeline, {"order": 1}, key="k", connection=second)
        assert time.monotonic() - began < 9


DIES = """
import os, signal, sys
import sqlalchemy, stepfast
engine = sqlalchemy.create_engine(sys.argv[1])
client = stepfast.Client(broker=sys.argv[2])
with engine.connect() as connection:
    run = client.enqueue(sys.argv[3], {"order": 1}, key="k", connection=connection)
    if sys.argv[4] == "after":
        connection.commit()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("when", "started"), [("before", False), ("after", True)])
def test_host_that_dies_started_what_it_committed(system, pipeline, database_url, broker_url, when, started):
    """SIGKILL at the instruction before, or after, the commit: its run never was, or is carried out."""
    argv = [sys.executable, "-c", DIES, database_url, broker_url, pipeline, when]
    assert subprocess.run(argv, cwd="/", check=False).returncode == -signal.SIGKILL
    found = fetch(database_url, "select id from stepfast.runs")
    assert len(found) == started
    if started:
        system.start_worker(queues="handlers")
        assert system.ended(found[0][0])["state"] == "completed"


def test_absent_broker_costs_the_host_nothing(system, pipeline, database_url, engine):
    """Refused connections, and one that is taken and never answered: the commit is as fast, and the sweep starts the run."""
    system.start_worker(queues="handlers")
    with silent_broker() as hangs:
        for broker in (NOWHERE, hangs):
            client = stepfast.Client(broker=broker)
            spent, runs = [], []
            for number in range(10):
                with Session(engine) as session:
                    runs.append(client.enqueue(pipeline, {"order": number}, connection=session))
                    began = time.perf_counter()
                    session.commit()
                    spent.append(time.perf_counter() - began)
            assert sorted(spent)[5] < 0.05
            for run in runs:
                assert system.ended(run.id)["state"] == "completed"


def test_process_that_ends_does_not_wait_for_a_broker():
    """What is not sent 50 ms after the end is left to the sweep."""
    code = (
        "import sys, time, atexit; began = []; atexit.register(lambda: print(time.monotonic() - began[0]));"
        "import kombu.connection; from stepfast.messages import sender; sender(sys.argv[1]).send('x'); began.append(time.monotonic())"
    )
    with silent_broker() as hangs:
        took = float(subprocess.check_output([sys.executable, "-c", code, hangs], text=True, cwd="/"))
    assert took < 0.5


def test_message_starts_a_run_before_the_sweep_would(system, here, client, pipeline, engine, database_url, broker_url):
    """With a broker, a committed run is sent at once: workers that sweep every 10 minutes carry it out all the same."""
    system.start_worker(**UNSWEPT)
    import celery

    foreign = celery.Celery("host", broker=broker_url, set_as_current=False)
    for start in (
        lambda: _by_session(client, pipeline, engine),
        lambda: _by_session(stepfast.Client(broker=foreign), pipeline, engine),
        lambda: client.enqueue(pipeline, {"order": 2}),
    ):
        run = start()
        assert run.result(timeout_s=20) == {"check": {"order": 2}, "ship": {"shipped": 2}}


def _by_session(client, pipeline, engine):
    with Session(engine) as session:
        with session.begin_nested():
            run = client.enqueue(pipeline, {"order": 2}, connection=session)
        session.commit()
        return client.run(run.id, connection=session.get_bind().connect())


def test_message_of_a_rolled_back_run_is_not_sent(client, pipeline, engine, monkeypatch):
    """Nothing is sent for a rollback; a savepoint that is released sends nothing yet."""
    sent = []
    monkeypatch.setattr(client, "look_after", sent.append)
    with Session(engine) as session:
        with session.begin_nested():
            client.enqueue(pipeline, {"order": 1}, connection=session)
        assert sent == []
        session.rollback()
        session.commit()
        assert sent == []
        run = client.enqueue(pipeline, {"order": 1}, connection=session)
        session.commit()
    assert sent == [str(run.id)]


def test_run_that_waits_behind_others_sends_no_message(client, pipeline, engine, monkeypatch, database_url):
    """Once the places of its queue at the broker are taken, a claim there sends it; a host that commits late is unsure."""
    sent = []
    monkeypatch.setattr(client, "look_after", sent.append)
    take = "update stepfast.steps set sent_at = now(), sends = 1 where state = 'available'"
    with engine.connect() as host:
        started = [str(client.enqueue(pipeline, {"order": n}, connection=host).id) for n in range(8)]
        host.commit()
        assert sent == started
        with psycopg.connect(plain(database_url)) as connection:
            connection.execute(take)
        client.enqueue(pipeline, {"order": 8}, connection=host)
        host.commit()
        assert sent == started
        monkeypatch.setattr("stepfast.client._WAITS_S", 0.0)
        late = client.enqueue(pipeline, {"order": 9}, connection=host)
        host.commit()
    assert sent == [*started, str(late.id)]


def test_forked_host_sends_too(system, pipeline, database_url, broker_url):
    """Gunicorn's way: the parent has sent, and its child sends by a thread and a connection of its own."""
    system.start_worker(**UNSWEPT)
    code = """
import os, sys
import stepfast
client = stepfast.Client(sys.argv[1], sys.argv[2])
client.enqueue(sys.argv[3], {"order": 1}).result(timeout_s=20)
child = os.fork()
if child == 0:
    try:
        client.enqueue(sys.argv[3], {"order": 2}).result(timeout_s=20)
    except BaseException as error:
        print(repr(error))
        os._exit(1)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    argv = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, database_url, broker_url, pipeline]
    done = subprocess.run(argv, cwd="/", check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_result_of_a_run_that_is_not_committed_is_not_waited_for(client, pipeline, engine):
    """Nothing could ever happen: one sentence at once, instead of the timeout."""
    with Session(engine) as session:
        run = client.enqueue(pipeline, {"order": 1}, connection=session)
        with pytest.raises(stepfast.Misuse, match="Commit first"):
            run.result(timeout_s=60)


def test_result_is_waited_for_at_most_so_long(client, pipeline):
    """Without a worker nothing ends; the error is a TimeoutError, too."""
    run = client.enqueue(pipeline, {"order": 1})
    with pytest.raises(TimeoutError, match="has not ended"):
        run.result(timeout_s=0.1)


def test_failed_run_says_why(system, client, pipeline):
    """`result` raises with the dead letter's sentence, and `status` and `events` tell the same."""
    system.start_worker(queues="handlers")
    run = client.enqueue(pipeline, {"order": 1, "broken": True})
    with pytest.raises(stepfast.RunFailed, match="the shop is closed") as failed:
        run.result(timeout_s=20)
    assert failed.value.state == "failed"
    assert "handler_failed" in run.status().error
    names = [event.name for event in run.events()]
    assert (names[0], names[-1]) == ("run.enqueued", "run.failed")
    assert run.events(after_seq=len(names) - 1)[0].name == "run.failed"


def test_input_by_plain_sql_fails_the_run(system, here, database_url, pipeline):
    """Whoever is first to work with it checks it; the run fails whatever the failure mode, and says why."""
    system.start_worker(queues="handlers")
    ((run_id, _),) = fetch(
        database_url, "select run_id, created from stepfast.enqueue_v1(%s, %s)", pipeline, json.dumps({"order": "x"})
    )
    run = system.ended(run_id)
    error = run["steps"][0]["tries"][0]["error"]
    assert (run["state"], error["code"]) == ("failed", "invalid_input")
    assert "'x' is not of type 'integer'" in error["message"]
    (discarded,) = system.logged("step.discarded")
    assert discarded["message"] == "The run's input is not one that the pipeline takes."  # the logs quote no input
    assert fetch(database_url, "select held from stepfast.v_failed_runs") == [("invalid_input",)]


def test_host_whose_module_is_app_py(database_url, pipeline, tmp_path):
    """A Flask project's own app.py is no trouble: the client imports nothing of that name."""
    (tmp_path / "app.py").write_text(
        "import sys, stepfast\n"
        f"print(stepfast.enqueue({pipeline!r}, {{'order': 1}}).created, sys.modules.get('app'), 'celery' in sys.modules)\n"
    )
    environ = {"PATH": os.environ["PATH"], "STEPFAST_DATABASE_URL": database_url}
    code = [sys.executable, "-c", "import app"]
    done = subprocess.run(code, cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True <module 'app' from")
    assert done.stdout.endswith("False\n")


def test_what_is_no_connection_is_refused(client, engine):
    """One sentence that names what may be passed."""
    with pytest.raises(stepfast.Misuse, match="a SQLAlchemy Session or Connection"):
        client.enqueue("p", {}, connection=engine)
    with pytest.raises(stepfast.NotReady, match="STEPFAST_DATABASE_URL"):
        stepfast.Client().enqueue("p", {})
    with pytest.raises(stepfast.UnknownName, match="no run's id"):
        client.run("seven")
    with pytest.raises(stepfast.UnknownName, match="There is no run"):
        client.run(uuid4()).status()


def test_database_without_stepfast_is_not_ready(empty_database_url):
    """One sentence, with the command that mends it."""
    with pytest.raises(stepfast.NotReady, match="stepfast migrate"):
        stepfast.Client(empty_database_url).enqueue("p", {})
    with pytest.raises(stepfast.NotReady, match="cannot be reached"):
        stepfast.Client("postgresql://nobody@127.0.0.1:1/none").enqueue("p", {})


def test_celery_of_a_host_starts_runs(system, pipeline, broker_url, database_url):
    """`send_task("stepfast.start")` from a foreign Celery app, as docs/enqueue.md says it."""
    import celery
    from kombu import Queue

    system.start_worker()
    foreign = celery.Celery("host", broker=broker_url, set_as_current=False)
    queue = Queue("agents", no_declare=True)
    for _ in range(2):
        foreign.send_task("stepfast.start", (pipeline, {"order": 3}), task_id=str(uuid4()), queue=queue)
    eventually(lambda: _count(database_url) == 2, what="both runs")


def test_definition_that_moves_under_a_start_is_checked_anew(system, here, write_skill, client, pipeline, database_url):
    """A name that means another definition by now: `enqueue_v1` starts nothing, and the input is checked against that."""
    ((known,),) = fetch(database_url, "select hash from stepfast.v_pipelines")
    args = "p_pipeline => %s, p_input => '{}', p_hash => %s"
    assert fetch(database_url, f"select * from stepfast.enqueue_v1({args})", pipeline, "0" * 64) == []
    assert len(fetch(database_url, f"select * from stepfast.enqueue_v1({args})", pipeline, known)) == 1


def test_bench_prints_its_figures():
    """`bench/enqueue.py` runs, also in short."""
    argv = [sys.executable, ROOT / "bench" / "enqueue.py", "--seconds", "0.1", "--rounds", "1", "--transactions", "20"]
    said = subprocess.check_output(argv, text=True, cwd="/")
    assert "p50" in said
    assert "16 writers: " in said


OLDEST = """
import sys
import sqlalchemy, stepfast
from sqlalchemy.orm import Session

assert sqlalchemy.__version__.startswith("2.0."), sqlalchemy.__version__
engine = sqlalchemy.create_engine(sys.argv[1])
client, sent = stepfast.Client(), []
client.look_after = sent.append
with engine.connect() as connection, Session(engine) as session:
    for host in (connection, session):
        client.enqueue(sys.argv[2], {"order": 1}, connection=host)
        host.rollback()
        run = client.enqueue(sys.argv[2], {"order": 2}, connection=host)
        with host.begin_nested():
            client.enqueue(sys.argv[2], {"order": 2}, connection=host, key="k")
        host.commit()
        assert run.status().state == "pending"
        assert not host.in_transaction()
print(len(sent))
"""


def test_oldest_sqlalchemy_is_supported(database_url, pipeline):
    """2.0, which stands beside the environment's own: transactions, savepoints and the messages after commits."""
    oldest = Path(sys.prefix) / "oldest"
    if not oldest.exists():
        pytest.skip("make has not put SQLAlchemy 2.0 beside this environment")
    argv = [sys.executable, "-c", OLDEST, database_url, pipeline]
    done = subprocess.run(
        argv, cwd="/", env=os.environ | {"PYTHONPATH": str(oldest)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
    assert _count(database_url) == 3


def test_half_imported_opentelemetry_harms_no_host(monkeypatch):
    """Another thread of the host's may be importing it just now: the run is started without a link."""
    from types import ModuleType

    from stepfast.client import _traceparent

    monkeypatch.setitem(sys.modules, "opentelemetry.trace", ModuleType("opentelemetry.trace"))
    assert _traceparent() is None
