"""Real workers, a real broker, a real Postgres: runs from start to end, and what kills them on the way."""

import json
import os
import signal
import time
from uuid import UUID

import psycopg
import pytest
from conftest import eventually, use_broker, valkey

from app import operations
from app.errors import NotPossible
from app.execution.executor import DEFER_MS, execute
from app.runs.explain import explain
from app.runs.reads import Reads

DIAMOND = """
    - {id: a}
    - {id: b, depends_on: [a]}
    - {id: c, depends_on: [a]}
    - {id: d, depends_on: [b, c]}
    - {id: e, depends_on: [d]}
"""
DIAMOND_HANDLERS = """
    def a(ctx): return {"n": ctx.run.input["n"]}
    def b(ctx): return {"n": ctx.inputs["a"]["n"] + 1}
    def c(ctx): return {"n": ctx.inputs["a"]["n"] + 2}
    def d(ctx): return {"n": ctx.inputs["b"]["n"] * ctx.inputs["c"]["n"]}
    def e(ctx): return {"n": -ctx.inputs["d"]["n"]}
"""
# A handler that says that it began, and goes on when the test lets it.
GATED = """
    import os, pathlib, threading

    def _pass(ctx, name):
        folder = pathlib.Path(ctx.run.input["folder"])
        with (folder / f"{name}-began").open("a") as file:
            file.write(f"{os.getpid()}\\n")
        pause = threading.Event()
        for _ in range(3000):
            if (folder / f"{name}-go").exists():
                return {"by": os.getpid()}
            pause.wait(0.01)
        raise RuntimeError("nobody let me go")
"""


def _began(folder, name):
    file = folder / f"{name}-began"
    return file.read_text().split() if file.exists() else []


@pytest.mark.parametrize("pool", ["threads", "prefork", "solo"])
def test_fan_out_and_join_run_to_the_end(system, here, write_skill, pool):
    """Every pool runs a diamond: each agent once, each with what it depends on."""
    system.start_worker(pool=pool, concurrency=2)
    name = system.publish(here, write_skill(DIAMOND, DIAMOND_HANDLERS))
    run = system.ended(operations.start(here, name, {"n": 1}).run_id)
    assert run["state"] == "completed"
    outputs = {step["agent"]: step["tries"][-1]["output"]["n"] for step in run["steps"]}
    assert outputs == {"a": 1, "b": 2, "c": 3, "d": 6, "e": -6}
    assert [len(step["tries"]) for step in run["steps"]] == [1] * 5
    assert [step["sends"] for step in run["steps"]] == [1] * 5


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_killed_worker_is_noticed_and_its_step_goes_on_elsewhere(system, here, write_skill, tmp_path, pool):
    """aws-durable-execution 3-12 interrupted and re-executed: elsewhere, within 10 s; what was finished is not repeated."""
    handlers = GATED + (
        "\n    def first(ctx): return _pass(ctx, 'first')"
        "\n    def second(ctx): return _pass(ctx, 'second')"
        "\n    def third(ctx): return {}\n"
    )
    folder = write_skill(
        """
        - {id: first, idempotent: true}
        - {id: second, depends_on: [first], idempotent: true}
        - {id: third, depends_on: [second]}
        """,
        handlers,
    )
    name = system.publish(here, folder)
    victim = system.start_worker(pool=pool, concurrency=2)
    (tmp_path / "first-go").touch()
    started = operations.start(here, name, {"folder": str(tmp_path)})
    eventually(lambda: _began(tmp_path, "second"), what="the second step")
    # Its truce after the start of Postgres is over: the servers are a session old.
    _end_truce(system)
    system.start_worker(pool="threads", concurrency=2)
    os.killpg(victim.pid, signal.SIGKILL)
    eventually(lambda: len(_began(tmp_path, "second")) == 2, within_s=10, what="the second step elsewhere")
    (tmp_path / "second-go").touch()
    run = system.ended(started.run_id)
    assert run["state"] == "completed"
    assert len(_began(tmp_path, "first")) == 1
    assert [step["worker_losses"] for step in run["steps"]] == [0, 1, 0]
    assert [entry["state"] for entry in run["steps"][1]["tries"]] == ["lost", "completed"]
    assert system.logged("step.rescued")[0]["agent"] == "second"


def test_killed_child_of_a_prefork_worker_is_noticed(system, here, write_skill, tmp_path):
    """SIGKILL of the one process that executes: the worker lives, and the step goes on in another child."""
    folder = write_skill("- {id: only, idempotent: true}", GATED + "\n    def only(ctx): return _pass(ctx, 'only')\n")
    name = system.publish(here, folder)
    system.start_worker(pool="prefork", concurrency=2)
    started = operations.start(here, name, {"folder": str(tmp_path)})
    (pid,) = eventually(lambda: _began(tmp_path, "only"), what="the step")
    _end_truce(system)
    os.kill(int(pid), signal.SIGKILL)
    eventually(lambda: len(_began(tmp_path, "only")) == 2, within_s=10, what="the step elsewhere")
    (tmp_path / "only-go").touch()
    assert system.ended(started.run_id)["state"] == "completed"


def test_death_under_a_handler_with_effects_waits_for_a_person(system, here, write_skill, tmp_path):
    """aws-durable-execution 1-17, 1-18: at most once, interrupted. The handler does not say that it may be repeated."""
    folder = write_skill("- {id: pay}", GATED + "\n    def pay(ctx): return _pass(ctx, 'pay')\n")
    name = system.publish(here, folder)
    victim = system.start_worker()
    started = operations.start(here, name, {"folder": str(tmp_path)})
    eventually(lambda: _began(tmp_path, "pay"), what="the payment")
    _end_truce(system)
    system.start_worker()
    os.killpg(victim.pid, signal.SIGKILL)
    run = system.ended(started.run_id)
    assert (run["state"], run["steps"][0]["tries"][0]["error"]["code"]) == ("failed", "outcome_unknown")
    assert len(_began(tmp_path, "pay")) == 1
    with pytest.raises(NotPossible, match="override"):
        operations.resume(here, started.run_id, "me")


def test_wiping_the_broker_loses_nothing(system, here, write_skill, tmp_path):
    """Rule 5: messages are derived. FLUSHALL while a run is under way, and another waits to begin."""
    folder = write_skill(
        "- {id: first, idempotent: true}\n- {id: second, depends_on: [first]}",
        GATED + "\n    def first(ctx): return _pass(ctx, 'first')\n    def second(ctx): return {}\n",
    )
    name = system.publish(here, folder)
    waiting = operations.start(here, name, {"folder": str(tmp_path)})
    with valkey(system.broker_url) as client:
        client.flushdb()
    system.start_worker()
    running = operations.start(here, name, {"folder": str(tmp_path)})
    eventually(lambda: len(_began(tmp_path, "first")) == 2, what="both first steps")
    with valkey(system.broker_url) as client:
        client.flushdb()
    (tmp_path / "first-go").touch()
    assert [system.ended(run.run_id)["state"] for run in (waiting, running)] == ["completed", "completed"]


def test_plain_sql_starts_a_run(system, here, write_skill):
    """`select stepfast.enqueue_v1(…)` from any language; a worker finds it within two seconds or so."""
    system.start_worker()
    name = system.publish(here, write_skill(DIAMOND, DIAMOND_HANDLERS))
    with psycopg.connect(system.database_url.replace("+psycopg", ""), autocommit=True) as connection:
        run_id = connection.execute("select run_id from stepfast.enqueue_v1(%s, %s)", (name, '{"n": 2}')).fetchone()[0]
    assert system.ended(run_id, within_s=10)["state"] == "completed"


def test_start_comes_back_when_its_worker_dies_with_it(system, here, write_skill):
    """A `stepfast.start` whose worker died six minutes ago starts its run, though Postgres knew nothing of it."""
    from app.celery import celery

    name = system.publish(here, write_skill(DIAMOND, DIAMOND_HANDLERS))
    celery.send_task("stepfast.start", (name, {"n": 1}), queue="agents")
    with valkey(system.broker_url) as client:
        # What the death of a worker leaves on Redis: a message that was taken then, and is in nobody's hands now.
        message = json.loads(client.rpop("agents"))
        tag = message["properties"]["delivery_tag"]
        client.hset("unacked", tag, json.dumps([message, "agents", "agents"]))
        client.zadd("unacked_index", {tag: time.time() - 360})
    system.start_worker()
    runs = eventually(lambda: Reads(here.store.engine).run_list(), what="a run")
    assert system.ended(runs[0]["id"])["state"] == "completed"


def test_start_that_is_refused_shows_no_input(system, here, write_skill):
    """An unknown pipeline or an impossible priority starts nothing, once, and no line holds the input."""
    from app.celery import celery

    name = system.publish(here, write_skill(DIAMOND, DIAMOND_HANDLERS))
    worker = system.start_worker()
    celery.send_task("stepfast.start", ("nobody", {"n": "the patient is Ada"}), queue="agents")
    celery.send_task("stepfast.start", (name, {"n": "the patient is Ada"}), {"priority": 99}, queue="agents")
    eventually(lambda: len(system.logged("request.refused")) == 2, what="both refusals")
    # Celery's own line, which comes after ours, and would hold the cause's traceback.
    eventually(
        lambda: sum(" reject requeue" in line["message"] for line in system.logged("library")) == 2, what="its lines"
    )
    assert "Ada" not in worker.log.read_text()
    assert Reads(here.store.engine).run_list() == []


def test_celery_starts_a_run_once(system, here, write_skill):
    """`send_task("stepfast.start")`: its key defaults to the task's id, so a redelivery starts nothing twice."""
    from app.celery import celery

    system.start_worker()
    name = system.publish(here, write_skill(DIAMOND, DIAMOND_HANDLERS))
    for _ in range(2):
        celery.send_task("stepfast.start", (name, {"n": 3}), task_id="0f9d6f0c-3c39-4f5c-8a3e-8f6b1f6d5a11")

    def run_ids():
        with psycopg.connect(system.database_url.replace("+psycopg", "")) as connection:
            return [row[0] for row in connection.execute("select id from stepfast.runs")]

    (run_id,) = eventually(run_ids, what="the run")
    assert system.ended(run_id)["state"] == "completed"
    eventually(lambda: len(system.logged("run.enqueued")) == 1 and not _queued(system), what="both tasks done")
    assert run_ids() == [run_id]


def test_exhausted_retries_end_in_a_dead_letter_and_resume_goes_on(system, here, write_skill, tmp_path):
    """dbos-transact-py dead_letter_queue: a row, a message on the broker, a failed run. Resume repeats nothing finished."""
    folder = write_skill(
        """
        - {id: first}
        - {id: second, depends_on: [first], retry_policy: {max_attempts: 2, initial_ms: 50}}
        - {id: third, depends_on: [second]}
        """,
        """
        import pathlib

        def first(ctx):
            with (pathlib.Path(ctx.run.input["folder"]) / "first").open("a") as file:
                file.write("once ")
            return {}

        def second(ctx):
            if not (pathlib.Path(ctx.run.input["folder"]) / "mended").exists():
                raise ValueError("the disk is on fire")
            return {}

        def third(ctx):
            return {}
        """,
    )
    system.start_worker()
    name = system.publish(here, folder)
    started = operations.start(here, name, {"folder": str(tmp_path)})
    run = system.ended(started.run_id)
    assert run["state"] == "failed"
    assert [step["state"] for step in run["steps"]] == ["completed", "discarded", "pending"]
    assert [entry["error"]["code"] for entry in run["steps"][1]["tries"]] == ["handler_failed"] * 2
    assert "the disk is on fire" in run["steps"][1]["tries"][0]["error"]["message"]
    letter = eventually(lambda: _dead_message(system), what="the dead letter's message")
    assert (letter["run_id"], letter["agent"], letter["version"]) == (str(started.run_id), "second", 1)
    # What `explain` said when it was sent, in the message and in the row; that stays what happens next.
    reads = Reads(here.store.engine)
    said = explain(reads.run(started.run_id), reads.event_list(started.run_id))
    assert (letter["explanation"], letter["next_step"]) == (said.text, said.command)
    assert said.text.startswith(f"Run {str(started.run_id)[:8]} of tested 1.0.0 failed at ")

    (tmp_path / "mended").touch()
    assert operations.resume(here, started.run_id, "me") == ("second",)
    assert system.ended(started.run_id)["state"] == "completed"
    assert (tmp_path / "first").read_text() == "once "
    assert reads.dead_letter(UUID(letter["id"]))["payload"]["explanation"] == letter["explanation"]


def test_refused_gate_is_a_failure_with_the_values_that_it_saw(system, here, write_skill):
    """A refused gate is not retried; what it saw stands in the dead letter."""
    folder = write_skill(
        """
        - {id: coder}
        - {id: reviewer, depends_on: [coder], gate: "{{coder.confidence}} >= 0.85"}
        """,
        "def coder(ctx): return {'confidence': ctx.run.input['c']}\ndef reviewer(ctx): return {}\n",
        files={
            "schemas/code.json": '{"type": "object", "properties": {"confidence": {"type": "number"}}, '
            '"required": ["confidence"], "additionalProperties": false}'
        },
    )
    text = (folder / "tested.skill.yaml").read_text()
    (folder / "tested.skill.yaml").write_text(text.replace("{id: coder}", "{id: coder, output_schema: code}"))
    system.start_worker()
    name = system.publish(here, folder)
    assert system.ended(operations.start(here, name, {"c": 1}).run_id)["state"] == "completed"
    run = system.ended(operations.start(here, name, {"c": 0.5}).run_id)
    (attempt,) = run["steps"][1]["tries"]
    assert (run["state"], attempt["error"]["code"]) == ("failed", "gate_refused")
    assert attempt["error"]["details"]["values"] == {"coder.confidence": 0.5}


def test_missing_handler_waits_for_a_worker_that_has_it(system, here, write_skill):
    """Absurd unknown_task_is_deferred_not_failed, with real workers: the second one knows the folder."""
    name = system.publish(here, write_skill(DIAMOND, DIAMOND_HANDLERS))
    lacking = system.start_worker(STEPFAST_SKILLS=str(system.folder / "nowhere"))
    started = operations.start(here, name, {"n": 1})
    eventually(lambda: system.states(started.run_id)["a"] == "retryable", what="a deferral")
    os.killpg(lacking.pid, signal.SIGKILL)
    system.start_worker()
    run = system.ended(started.run_id)
    assert (run["state"], run["steps"][0]["failures"], run["steps"][0]["attempts"]) == ("completed", 0, 1)


def test_missing_handler_is_put_off_by_no_fixed_time(system, here, write_skill, tmp_path):
    """In step with the second after which workers ask Redis anew, the one that lacks it would be served for ever."""
    from app import events
    from app.events import Event
    from app.runs.store import StepKey

    delays = []
    events.subscribe(lambda event, fields: event is Event.STEP_DEFERRED and delays.append(fields["retry_ms"]))
    folder = write_skill(DIAMOND, DIAMOND_HANDLERS).rename(tmp_path / "elsewhere")
    name = system.publish(here, folder)
    for _ in range(20):
        run_id, _ = here.store.enqueue(name, {"n": 1})
        (sent,) = here.store.take_unsent(run_id, 1)
        assert execute(here, StepKey(run_id, "a"), sent.pipeline_hash).state == "deferred"
    assert all(DEFER_MS / 2 <= delay <= DEFER_MS for delay in delays)
    assert len({delay % 1_000 // 100 for delay in delays}) > 3


def test_malformed_message_harms_nobody(system, here, write_skill):
    """A message that is none of ours is dropped, and the worker goes on."""
    from app.celery import celery

    system.start_worker()
    celery.send_task("stepfast.step", ("no-uuid", "a", "0" * 64), queue="agents")
    celery.send_task("stepfast.step", (str(UUID(int=1)), "a", "0" * 64), queue="agents")
    celery.send_task("stepfast.unknown", (), queue="agents")
    name = system.publish(here, write_skill(DIAMOND, DIAMOND_HANDLERS))
    assert system.ended(operations.start(here, name, {"n": 1}).run_id)["state"] == "completed"


def test_broker_that_is_away_delays_a_run_and_loses_nothing(system, here, write_skill):
    """Starting commits first; what could not be sent is sent by a sweep."""
    from app.celery import celery

    name = system.publish(here, write_skill(DIAMOND, DIAMOND_HANDLERS))
    use_broker(celery, "redis://127.0.0.1:1/0")
    started = operations.start(here, name, {"n": 1})
    system.start_worker()
    assert system.ended(started.run_id)["state"] == "completed"


def _end_truce(system) -> None:
    """Waits until Postgres is older than a lease, as it is in any real death."""
    with psycopg.connect(system.database_url.replace("+psycopg", "")) as connection:
        eventually(
            lambda: connection.execute(
                "select clock_timestamp() - pg_postmaster_start_time() > interval '15 s'"
            ).fetchone()[0],
            what="the end of the truce",
        )


def _queued(system) -> int:
    with valkey(system.broker_url) as client:
        return client.llen("agents")


def _dead_message(system):
    """The body of a message on the dead-letter queue."""
    import base64
    import json

    with valkey(system.broker_url) as client:
        found = client.lrange("stepfast.dead", 0, 0)
    if not found:
        return None
    envelope = json.loads(found[0])
    return json.loads(base64.b64decode(envelope["body"]))
