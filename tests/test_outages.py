"""What is away, is interrupted, or misbehaves, under real workers."""

import base64
import json
import os
import signal
from pathlib import Path

import pytest
from conftest import eventually, valkey
from sqlalchemy.engine import make_url
from test_running import GATED, _began

from app import operations
from app.crashtest.proxy import Proxy

HANDLERS = (
    GATED
    + """
    import asyncio

    def only(ctx):
        return _pass(ctx, "only")

    def cancelled(ctx):
        raise asyncio.CancelledError
"""
)


def _start(system, here, write_skill, tmp_path, agents):
    name = system.publish(here, write_skill(agents, HANDLERS))
    return operations.start(here, name, {"folder": str(tmp_path)}).run_id


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_lost_broker_connection_does_not_end_a_worker(system, here, write_skill, tmp_path, pool):
    """Every connection to the broker is cut while a message is in flight: the worker reconnects and goes on."""
    worker = system.start_worker(pool=pool, concurrency=2)
    run_id = _start(
        system,
        here,
        write_skill,
        tmp_path,
        "- {id: only, idempotent: true}\n- {id: last, depends_on: [only], handler: 'handlers:only', idempotent: true}",
    )
    eventually(lambda: _began(tmp_path, "only"), what="the step")
    with valkey(system.broker_url) as client:
        client.client_kill_filter(_type="normal", skipme=True)
        client.client_kill_filter(_type="pubsub", skipme=True)
    (tmp_path / "only-go").touch()
    assert system.ended(run_id)["state"] == "completed"
    assert worker.poll() is None, worker.log.read_text()[-2000:]


def test_message_that_meets_an_outage_is_held(system, here, write_skill, tmp_path):
    """A process's very first message, while Postgres is away: it is not failed, acknowledged and missed for seconds."""
    name = system.publish(here, write_skill("- {id: only}", "def only(ctx): return {}\n"))
    address = make_url(system.database_url)
    with Proxy(Path(address.query["host"]) / f".s.PGSQL.{address.query['port']}") as proxy:
        way = address.set(host=proxy.host, port=proxy.port, query={"sslmode": "disable"})
        url = way.render_as_string(hide_password=False)
        system.start_worker(pool="prefork", concurrency=1, STEPFAST_DATABASE_URL=url)
        proxy.cut()
        run_id = operations.start(here, name, {}).run_id
        eventually(
            lambda: system.logged("step.commit_retried"), what="a message in the hands of a worker that is cut off"
        )
        proxy.heal()
        run = system.ended(run_id)
    assert (run["state"], run["steps"][0]["sends"]) == ("completed", 1)


def test_interrupted_handler_with_effects_is_not_repeated(system, here, write_skill, tmp_path):
    """Rule 7, when a whole process group is told to end at once: what may have happened waits for a person."""
    worker = system.start_worker(pool="prefork", concurrency=1)
    run_id = _start(system, here, write_skill, tmp_path, "- {id: only}")
    eventually(lambda: _began(tmp_path, "only"), what="the step")
    system.start_worker(pool="prefork", concurrency=1)
    os.killpg(worker.pid, signal.SIGQUIT)
    worker.wait(30)
    run = system.ended(run_id, within_s=45)
    assert run["steps"][0]["tries"][-1]["error"]["code"] == "outcome_unknown"
    assert len(_began(tmp_path, "only")) == 1


def test_exception_that_is_none_ends_the_attempt(system, here, write_skill, tmp_path):
    """asyncio.CancelledError is a BaseException: it fails the attempt, and does not leave the step executing."""
    system.start_worker()
    run_id = _start(system, here, write_skill, tmp_path, "- {id: cancelled, retry_policy: {max_attempts: 1}}")
    run = system.ended(run_id)
    assert run["steps"][0]["tries"][0]["error"]["code"] == "handler_failed"


def test_worker_that_was_taken_for_dead_registers_anew(system, here, write_skill, tmp_path):
    """Its claims are refused until it has: they would be taken away again at once."""
    system.start_worker(concurrency=1)
    first = _start(system, here, write_skill, tmp_path, "- {id: only, idempotent: true}")
    (tmp_path / "only-go").touch()
    system.ended(first)
    with here.store.engine.connect() as connection:
        connection.exec_driver_sql("update stepfast.workers set ended_at = stepfast.now()")
    second = operations.start(here, "tested", {"folder": str(tmp_path)}).run_id
    run = system.ended(second)
    assert (run["state"], run["steps"][0]["worker_losses"]) == ("completed", 0)


def test_task_events_carry_no_error_text(system, here, write_skill, tmp_path):
    """Flower shows a failed attempt by its code."""
    folder = write_skill(
        "- {id: only, retry_policy: {max_attempts: 1}}", "def only(ctx):\n    raise ValueError('password=hunter2')\n"
    )
    name = system.publish(here, folder)
    system.start_worker()
    with valkey(system.broker_url) as client, client.pubsub() as heard:
        heard.psubscribe("*")
        system.ended(operations.start(here, name, {}).run_id)
        told = eventually(lambda: _failure(heard), what="the event of the failed task")
    assert "handler_failed" in told
    assert "hunter2" not in told


def _failure(heard) -> str | None:
    """The next task-failed among the events that workers send, as text."""
    message = heard.get_message(timeout=1)
    if message is None or message["type"] != "pmessage":
        return None
    text = base64.b64decode(json.loads(message["data"])["body"]).decode()
    return text if "task-failed" in text else None
