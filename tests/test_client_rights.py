"""The rights of other applications: a client starts and reads, an operator also orders, and neither does more."""

import psycopg
import pytest
import stepfast
from conftest import eventually
from hosting import fetch, publish, role

from app.runs.explain import NOT_BY_RESUME

DENIED = "permission denied"


@pytest.fixture
def pipeline(system, here, write_skill):
    return publish(system, here, write_skill, approval=True)


def test_client_reaches_nothing_else(database_url, pipeline):
    """No table, and no function but enqueue_v1."""
    with role(database_url, "client") as url, psycopg.connect(url, autocommit=True) as connection:
        for statement in (
            "select * from stepfast.runs",
            "insert into stepfast.pipeline_names values ('x', 'y', now())",
            "update stepfast.meta set clock_offset = '1 day'",
            "select stepfast.cancel_v1(gen_random_uuid(), 'me', null)",
            "select stepfast.request_v1('cancel', gen_random_uuid(), 'me')",
            "select stepfast.allow_v1(current_user, 'operator')",
            "select stepfast.now()",
            "create table stepfast.mine (x integer)",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match=DENIED):
                connection.execute(statement)


def test_client_starts_and_reads_and_orders_nothing(system, database_url, pipeline):
    """Orders are refused in a sentence that says what is missing."""
    system.start_worker(queues="handlers")
    with role(database_url, "client") as url:
        client = stepfast.Client(url)
        run = client.enqueue(pipeline, {"order": 1})
        ask = eventually(lambda: run.status().asks, what="the question")[0]
        with pytest.raises(stepfast.NotReady, match="--operator ROLE"):
            run.approve("ship", by="ann", digest=ask.digest)
        assert run.events()[0].name == "run.enqueued"


def test_operator_decides_resumes_and_cancels(system, here, database_url, pipeline):
    """Each order is recorded with who asked and as whom, carried out by a worker, and answered."""
    system.start_worker(queues="handlers")
    with role(database_url, "operator") as url:
        client = stepfast.Client(url)
        run = client.enqueue(pipeline, {"order": 1})
        ask = eventually(lambda: run.status().asks, what="the question")[0]
        assert ask.shown == {"input": {"order": 1}, "outputs": {"check": {"order": 1}}}
        assert run.approve("ship", by="ann", reason="fine", digest=ask.digest).wait() == {"decision": "approved"}
        assert run.result(timeout_s=20)["ship"] == {"shipped": 1}

        other = client.enqueue(pipeline, {"order": 2})
        eventually(lambda: other.status().asks, what="the question")
        assert other.reject("ship", by="bob").wait() == {"decision": "rejected"}
        assert system.ended(other.id)["state"] == "failed"
        assert other.resume(by="bob").wait() == {"agents": ["ship"]}
        eventually(lambda: other.status().asks, what="the question again")
        assert other.cancel(by="bob", reason="no").wait() == {}
        assert other.status().state == "cancelled"
        login = url.partition("://")[2].partition("@")[0]
        rows = fetch(
            database_url, "select action, requested_by, login, state from stepfast.requests order by requested_at"
        )
    assert rows == [
        ("approve", "ann", login, "done"),
        ("reject", "bob", login, "done"),
        ("resume", "bob", login, "done"),
        ("cancel", "bob", login, "done"),
    ]


def test_refused_order_says_why(system, database_url, pipeline):
    """The run's state does not allow it, the digest is not what is asked for, or nothing of that name is there."""
    system.start_worker(queues="handlers")
    client = stepfast.Client(database_url)
    run = client.enqueue(pipeline, {"order": 1})
    eventually(lambda: run.status().asks, what="the question")
    with pytest.raises(stepfast.NotPossible, match="does not allow it"):
        run.resume(by="ann").wait()
    with pytest.raises(stepfast.NotPossible, match="Nothing of ship waits for this decision"):
        run.approve("ship", by="ann", digest="of something else").wait()
    with pytest.raises(stepfast.UnknownName, match="has no agent shop"):
        run.approve("shop", by="ann")
    with pytest.raises(stepfast.InvalidInput, match="who orders it"):
        run.cancel(by="")


def test_order_that_is_rolled_back_was_never_given(system, database_url, pipeline):
    """Orders are written in the host's transaction, as runs are."""
    system.start_worker(queues="handlers")
    client = stepfast.Client(database_url)
    run = client.enqueue(pipeline, {"order": 1})
    eventually(lambda: run.status().asks, what="the question")
    with psycopg.connect(database_url.replace("+psycopg", "")) as host:
        client.run(run.id, connection=host).cancel(by="ann")
        host.rollback()
        request = client.run(run.id, connection=host).approve("ship", by="ann")
        host.commit()
    assert client.run(run.id).result(timeout_s=20)
    assert fetch(database_url, "select id, action from stepfast.requests") == [(request.id, "approve")]


def test_rights_are_given_again_by_migrate(database_url, monkeypatch, capsys):
    """`stepfast migrate --client ROLE` covers what a migration added; a role that is not there is named."""
    from commanding import in_process

    monkeypatch.setenv("STEPFAST_DATABASE_URL", database_url)
    stepfast_command = in_process(capsys)
    with role(database_url, "operator") as url:
        name = url.partition("://")[2].partition("@")[0]
        assert stepfast_command("migrate", "--client", name).code == 0
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("select * from stepfast.v_runs")
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match=DENIED):
                connection.execute("select stepfast.request_v1('cancel', gen_random_uuid(), 'me')")
        stepfast_command("migrate", "--operator", "nobody_of_that_name").refuses(3, "nobody_of_that_name")


def test_views_hold_back_what_no_resume_mends(database_url):
    """The view's list of codes is the one of the command line."""
    ((definition,),) = fetch(database_url, "select pg_get_viewdef('stepfast.v_failed_runs'::regclass)")
    listed = definition.partition("ARRAY[")[2].partition("]")[0]
    assert {code.split("'")[1] for code in listed.split(",")} == set(NOT_BY_RESUME)


def test_views_show_no_contents(database_url):
    """No view but v_outputs and v_approvals has a column for what agents were given or put out."""
    rows = fetch(
        database_url,
        "select table_name, column_name from information_schema.columns where table_schema = 'stepfast'"
        " and table_name like 'v\\_%%' and (data_type = 'jsonb')",
    )
    assert set(rows) == {
        ("v_pipelines", "input_schema"),
        ("v_runs", "labels"),
        ("v_outputs", "output"),
        ("v_events", "data"),
        ("v_approvals", "shown"),
        ("v_requests", "answer"),
    }
