"""The same on RabbitMQ, with quorum queues."""

import os
import signal
from contextlib import suppress

import celery
import kombu
import pytest
import stepfast
from conftest import eventually
from hosting import UNSWEPT, fetch

from app import operations, rabbitmq
from app.execution import dead_queue, queues

pytestmark = [
    pytest.mark.rabbitmq,
    pytest.mark.slow,
    pytest.mark.skipif(not rabbitmq.installed(), reason=rabbitmq.MISSING),
]

DIAMOND = """
    - {id: a}
    - {id: b, depends_on: [a], idempotent: true}
    - {id: c, depends_on: [a], idempotent: true}
    - {id: d, depends_on: [b, c]}
"""
HANDLERS = """
    import os, pathlib, threading

    def a(ctx): return {}

    def b(ctx):
        if ctx.run.input.get("fails"):
            raise ValueError("no")
        file = pathlib.Path(ctx.run.input["folder"]) / "b-pids"
        with file.open("a") as pids:
            pids.write(f"{os.getpid()}\\n")
        pause = threading.Event()
        for _ in range(3000):
            if (file.parent / "go").exists():
                return {}
            pause.wait(0.01)

    def c(ctx): return {}
    def d(ctx): return {}
"""


@pytest.fixture
def on_rabbit(system, rabbit, monkeypatch):
    _empty(rabbit)
    system.use(system.database_url, rabbit)
    with system.here(monkeypatch) as current:
        yield current


def _empty(url):
    """What earlier tests left at the broker, which is one for all of them."""
    with kombu.Connection(url) as connection:
        for name in (queues.STRAYS, dead_queue.QUEUE):
            with connection.channel() as channel, suppress(connection.channel_errors):
                channel.queue_purge(name)


def _take(url, name):
    """One message of a queue, or None; a queue that nobody has used yet does not exist."""
    with kombu.Connection(url) as connection, connection.channel() as channel:
        try:
            return kombu.Queue(name, no_declare=True)(channel).get(no_ack=True)
        except connection.channel_errors:
            return None


def test_run_survives_the_death_of_its_worker(system, on_rabbit, write_skill, tmp_path):
    """Fan-out, join, and SIGKILL of the worker in between, on quorum queues."""
    name = system.publish(on_rabbit, write_skill(DIAMOND, HANDLERS))
    victim = system.start_worker(concurrency=2)
    started = operations.start(on_rabbit, name, {"folder": str(tmp_path)})
    pids = tmp_path / "b-pids"
    eventually(lambda: pids.exists() and pids.read_text(), what="b")
    eventually(lambda: system.states(started.run_id)["c"] == "completed", what="c")
    os.killpg(victim.pid, signal.SIGKILL)
    system.start_worker(concurrency=2)
    eventually(lambda: len(pids.read_text().split()) == 2, within_s=25, what="b elsewhere")
    (tmp_path / "go").touch()
    run = system.ended(started.run_id)
    assert run["state"] == "completed"
    assert [len(step["tries"]) for step in run["steps"]] == [1, 2, 1, 1]


def test_strays_are_kept_and_dead_letters_are_sent(system, on_rabbit, write_skill):
    """What is malformed or unknown goes to the dead-letter exchange; a discarded step's letter to a queue of its own."""
    from app.celery import celery

    folder = write_skill(
        DIAMOND.replace("b, depends_on: [a]", "b, depends_on: [a], retry_policy: {max_attempts: 1}"), HANDLERS
    )
    name = system.publish(on_rabbit, folder)
    for queue in ("agents", "of_a_skill"):
        # Sent before any worker was there: the first thing that one of them meets.
        celery.send_task("stepfast.unknown", (), queue=queue)
        celery.send_task("stepfast.step", ("no-uuid", "a", "0" * 64), queue=queue)
    # A letter is sent at least once: where a sweep finds it just when the task sends it, twice.
    system.start_worker(queues="agents,handlers,of_a_skill", **UNSWEPT)
    strays = [eventually(lambda: _take(system.broker_url, queues.STRAYS), what="a stray").headers for _ in range(4)]
    found = sorted((headers["x-death"][0]["queue"], headers["task"]) for headers in strays)
    assert found == [
        (queue, task) for queue in ("agents", "of_a_skill") for task in ("stepfast.step", "stepfast.unknown")
    ]
    started = operations.start(on_rabbit, name, {"fails": True})
    assert system.ended(started.run_id)["state"] == "failed"
    letter = eventually(lambda: _take(system.broker_url, dead_queue.QUEUE), what="the dead letter")
    assert letter.payload["run_id"] == str(started.run_id)
    assert letter.properties["message_id"] == letter.payload["id"]


def test_dead_letter_queue_is_capped(system, on_rabbit, write_skill):
    """At most dead_queue_max wait: the oldest leave first."""
    folder = write_skill("- {id: b, retry_policy: {max_attempts: 1}}", HANDLERS)
    name = system.publish(on_rabbit, folder)
    system.start_worker(STEPFAST_DEAD_QUEUE_MAX="2", **UNSWEPT)
    runs = []
    for _ in range(4):
        runs.append(str(operations.start(on_rabbit, name, {"fails": True}).run_id))
        # Two that are there together may be sent twice, or the later one first.
        eventually(lambda: len(system.logged("dead_letter.published")) == len(runs), what="its letter")
    left = [_take(system.broker_url, dead_queue.QUEUE) for _ in range(3)]
    assert [letter and letter.payload["run_id"] for letter in left] == [*runs[-2:], None]


def test_message_of_an_application_starts_its_run(system, on_rabbit, rabbit, write_skill):
    """The client's message, and a foreign Celery app's, reach queues that neither may declare in its own way."""
    name = system.publish(on_rabbit, write_skill("- {id: a}", "def a(ctx): return {}\n"))
    system.start_worker(**UNSWEPT)
    client = stepfast.Client(system.database_url, rabbit)
    for _ in range(2):
        assert client.enqueue(name, {}).result(timeout_s=20) == {"a": {}}
    foreign = celery.Celery("host", broker=rabbit, set_as_current=False)
    foreign.send_task("stepfast.start", (name, {}), queue=kombu.Queue("agents", no_declare=True))
    ended = "select from stepfast.runs where state = 'completed'"
    eventually(lambda: len(fetch(system.database_url, ended)) == 3, what="the third run")
