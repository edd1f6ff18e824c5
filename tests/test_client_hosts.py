"""`stepfast` in hosts that go wrong: errors, rollbacks and poolers leave them as they were."""

import json
import traceback

import pgbouncer
import psycopg
import pytest
import sqlalchemy
import stepfast
from hosting import fetch, plain
from sqlalchemy.orm import Session
from stepfast.databases import OwnDatabase
from stepfast.operating import resume_failed, since


def test_order_that_was_rolled_back_is_not_waited_for(database_url, engine, pipeline):
    """Nobody will answer it, and that is said."""
    client = stepfast.Client(database_url)
    run = client.enqueue(pipeline, {"order": 1})
    with Session(engine) as session:
        order = client.run(run.id, connection=session).cancel(by="ann")
        session.rollback()
        with pytest.raises(stepfast.UnknownName, match="rolled back"):
            order.wait()


def test_read_that_fails_leaves_the_connection_as_it_was(empty_database_url):
    """Outside a transaction nothing of ours is open afterwards: the host's next statement is its own."""
    made = sqlalchemy.create_engine(empty_database_url)
    with psycopg.connect(plain(empty_database_url)) as bare, made.connect() as connection:
        for host in (bare, connection):
            with pytest.raises(stepfast.NotReady, match="stepfast migrate"):
                stepfast.Client().enqueue("p", {}, connection=host)
        assert bare.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        assert not connection.in_transaction()
    made.dispose()


def test_session_that_is_closed_sends_nothing_later(database_url, engine, pipeline):
    """`close` without a commit is a rollback; the next commit of the same session is another transaction."""
    client, sent = stepfast.Client(), []
    client.look_after = sent.append
    session = Session(engine)
    client.enqueue(pipeline, {"order": 1}, connection=session)
    session.close()
    run = client.enqueue(pipeline, {"order": 2}, connection=session)
    session.commit()
    session.close()
    assert sent == [str(run.id)]


def test_input_is_checked_as_postgres_gets_it(system, here, write_skill, database_url):
    """A tuple becomes an array, and a number as a key a text: so the schema sees them."""
    schema = {
        "type": "object",
        "properties": {"7": {"type": "array"}},
        "patternProperties": {"^x": {}},
        "required": ["7"],
    }
    folder = write_skill("- {id: a}", "def a(ctx): return {}\n", files={"schemas/given.json": json.dumps(schema)})
    file = folder / "tested.skill.yaml"
    file.write_text(file.read_text() + "input_schema: given\n")
    name = system.publish(here, folder)
    assert stepfast.Client(database_url).enqueue(name, {7: (1, 2)}).created
    assert fetch(database_url, "select input from stepfast.runs") == [({"7": [1, 2]},)]


def test_url_keeps_its_own_options(database_url):
    """What the URL sets stays set, beside ours."""
    joined = f"{database_url}{'&' if '?' in database_url else '?'}options=-csearch_path%3Dmine"
    found = OwnDatabase(joined).read("select current_setting('search_path'), current_setting('statement_timeout')")
    assert [tuple(row) for row in found] == [("mine", "10s")]


@pytest.mark.skipif(pgbouncer.SERVER is None, reason=pgbouncer.MISSING)
def test_pooler_that_refuses_options_serves(database_url, pipeline, tmp_path):
    """PgBouncer refuses settings at the start of a session: the client goes without."""
    with pgbouncer.running(tmp_path / "pgbouncer", database_url) as url:
        client = stepfast.Client(url)
        run = client.enqueue(pipeline, {"order": 1})
        assert run.status().state == "pending"


def test_what_an_agent_wrote_does_not_command_a_terminal(system, here, write_skill, database_url):
    """A dead letter's message is shown with its control characters as text, on its line."""
    raising = "def a(ctx): raise ValueError('\\x1b[2J\\x1b]0;gone\\x07\\nRun x goes on.')\n"
    name = system.publish(here, write_skill("- {id: a, retry_policy: {max_attempts: 1}}", raising))
    system.start_worker(queues="handlers")
    client, said = stepfast.Client(database_url), []
    assert system.ended(client.enqueue(name, {}).id)["state"] == "failed"
    options = {"by": "ann", "pipeline": None, "begin": None, "plan": True}
    resume_failed(client.database(), tell=said.append, **options)
    (line,) = said
    assert "gone" in line
    assert line.isprintable()


def test_age_beyond_all_time_is_refused():
    """A sentence, and no traceback."""
    with pytest.raises(stepfast.Misuse, match="no age"):
        since("999999d")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"key": ""}, "The key is empty"),
        ({"key": "a\0b"}, "The key holds a NUL"),
        ({"key": "\ud800"}, "The key holds a NUL or half of a surrogate pair"),
        ({"tenant": "a\0b"}, "The tenant holds a NUL"),
        ({"labels": {"a\0b": 1}}, "The labels holds a NUL"),
        ({"labels": {"a": "a\0b"}}, "The labels holds a NUL"),
    ],
)
def test_texts_that_postgres_cannot_keep_are_refused_at_the_call(database_url, client, pipeline, engine, options, said):
    """One sentence of ours, on any connection, and its transaction stays usable."""
    with engine.connect() as connection:
        for host in (None, connection):
            with pytest.raises(stepfast.InvalidInput, match=said):
                client.enqueue(pipeline, {"order": 1}, connection=host, **options)
        connection.execute(sqlalchemy.text("select 1"))
    assert fetch(database_url, "select count(*) from stepfast.runs") == [(0,)]


def test_order_with_a_nul_is_refused_at_the_call(client, pipeline):
    """Who orders, an agent's name and a reason are texts, too."""
    run = client.enqueue(pipeline, {"order": 1})
    with pytest.raises(stepfast.InvalidInput, match="The reason holds a NUL"):
        run.cancel(by="ann", reason="a\0b")
    with pytest.raises(stepfast.InvalidInput, match="The pipeline's name holds a NUL"):
        client.enqueue("a\0b", {"order": 1})


def test_row_that_postgres_refuses_is_not_shown(client, pipeline, engine, monkeypatch):
    """What a constraint says goes on with the row, in which the input stands: the client's error ends before it."""
    monkeypatch.setattr("stepfast.client.PRIORITY_MAX", 99)
    with engine.connect() as connection:
        for host in (None, connection):
            with pytest.raises(stepfast.InvalidInput, match="priority") as caught:
                client.enqueue(pipeline, {"order": 7_654_321}, connection=host, priority=50)
            assert "7654321" not in "".join(traceback.format_exception(caught.value))


def test_sqlalchemy_on_another_driver_is_refused(client, engine, monkeypatch):
    """Its driver is named: statements are written for psycopg."""
    monkeypatch.setattr(engine.dialect, "driver", "asyncpg")
    with engine.connect() as connection, Session(engine) as session:
        for host in (connection, session):
            with pytest.raises(stepfast.Misuse, match="on psycopg, and this connection's driver is asyncpg"):
                client.enqueue("p", {}, connection=host)


def test_events_are_all_there(client, pipeline, database_url):
    """Also of a run with more than a page of them; `after_seq` goes on where somebody stopped."""
    run = client.enqueue(pipeline, {"order": 1})
    with psycopg.connect(plain(database_url)) as connection:
        connection.execute(
            "insert into stepfast.events (run_id, seq, name, at) select %s, n, 'step.deferred', now()"
            " from generate_series(2, 20_001) n",
            (run.id,),
        )
    assert [event.seq for event in run.events()] == list(range(1, 20_002))
    assert [event.seq for event in run.events(after_seq=19_999)] == [20_000, 20_001]
