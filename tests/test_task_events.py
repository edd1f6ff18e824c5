"""Celery's task events, which a worker holds back a little: none is lost or reordered, also where it stops meanwhile."""

import os
import signal
import threading
from collections import defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import eventually

from app import operations

LINE = "    - {id: a}\n    - {id: b, depends_on: [a]}\n"
HANDLERS = "def a(ctx): return {}\ndef b(ctx): return {}\n"
HOLD = """
    import time
    from pathlib import Path

    def a(ctx):
        Path(ctx.run.input["began"]).touch()
        while not Path(ctx.run.input["go"]).exists():
            time.sleep(0.01)
        return {}
"""


@contextmanager
def receiving(celery):
    """The task events that arrive meanwhile: their types, by task."""
    got, ready, stop = defaultdict(list), threading.Event(), threading.Event()

    def receive():
        with celery.connection_for_read() as connection:
            receiver = celery.events.Receiver(
                connection, handlers={"*": lambda event: got[event.get("uuid")].append(event["type"])}
            )
            with receiver.consumer_context() as (established, *_):
                ready.set()
                while not stop.is_set():
                    with suppress(TimeoutError):
                        established.drain_events(timeout=0.1)

    thread = threading.Thread(target=receive)
    thread.start()
    try:
        assert ready.wait(10)
        yield got
    finally:
        stop.set()
        thread.join()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def whole(types) -> bool:
    """Celery tells of a message after it was sent: a worker may have it by then."""
    worked = [name for name in types if name != "task-sent"]
    return "task-sent" in types and worked == ["task-received", "task-started", "task-succeeded"]


def test_events_of_a_step_arrive_whole_and_in_order(system, here, write_skill):
    """Four of each step, the three of the worker in their order."""
    from app.celery import celery

    name = system.publish(here, write_skill(LINE, HANDLERS))
    system.start_worker()
    with receiving(celery) as got:
        assert system.ended(operations.start(here, name, {}).run_id)["state"] == "completed"
        eventually(lambda: sum(map(whole, got.values())) == 2, what="eight events of two tasks")


def test_a_child_tells_of_what_it_sends_by_itself(system, here, write_skill):
    """Also one that was forked after its parent had sent: what the parent holds back is not the child's to add to."""
    from app.celery import celery

    name = system.publish(here, write_skill(LINE, HANDLERS))
    worker = system.start_worker(pool="prefork", concurrency=1)
    run_id, _ = here.store.enqueue(name, {})  # which the parent's sweep sends
    system.ended(run_id)
    before = children(worker.pid)
    os.kill(before[0], signal.SIGKILL)
    eventually(lambda: children(worker.pid) not in ([], before), what="another child")
    with receiving(celery) as got:
        assert system.ended(operations.start(here, name, {}).run_id)["state"] == "completed"
        eventually(lambda: sum(map(whole, got.values())) == 2, what="eight events of two tasks")


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_events_are_sent_before_a_worker_ends(system, here, write_skill, tmp_path, pool):
    """What a worker holds back is sent as it stops, and so is what its last step tells after that."""
    from app.celery import celery

    name = system.publish(here, write_skill("    - {id: a}\n", HOLD))
    worker = system.start_worker(pool=pool)
    began, go = tmp_path / "began", tmp_path / "go"
    with receiving(celery) as got:
        run = operations.start(here, name, {"began": str(began), "go": str(go)})
        eventually(began.exists, what="the handler")
        os.kill(worker.pid, signal.SIGTERM)
        eventually(lambda: b"Warm shutdown" in worker.log.read_bytes(), what="the beginning of its end")
        go.touch()
        worker.wait(30)
        assert system.run(run.run_id)["state"] == "completed"
        eventually(lambda: any(map(whole, got.values())), what="four events of a task")
