"""A worker that is told to stop, as every deploy does: nothing is lost, nothing is repeated that must not be."""

import os
import signal

import pytest
from conftest import eventually
from test_running import GATED, _began

from app import operations, rabbitmq

# Three that execute at once in the worker that is stopped, and one that follows the first.
AGENTS = """
    - {id: quick}
    - {id: slow, idempotent: true}
    - {id: careful}
    - {id: after, depends_on: [quick]}
"""
HANDLERS = GATED + "".join(
    f"\n    def {name}(ctx): return _pass(ctx, '{name}')\n" for name in ("quick", "slow", "careful", "after")
)
ON_RABBIT = [pytest.mark.rabbitmq, pytest.mark.skipif(not rabbitmq.installed(), reason=rabbitmq.MISSING)]


@pytest.fixture(params=["valkey", pytest.param("rabbitmq", marks=ON_RABBIT)])
def on_broker(request, system, monkeypatch):
    """The test process's Worker, and its broker's name."""
    if request.param == "rabbitmq":
        system.use(system.database_url, request.getfixturevalue("rabbit"))
    with system.here(monkeypatch) as current:
        yield current, request.param


@pytest.mark.slow
@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_what_executes_is_finished_or_handed_over(system, on_broker, write_skill, tmp_path, pool):
    """SIGTERM: what ends in time is finished, what may be repeated goes on elsewhere, what may not is left to finish.

    None counts as a loss, and no new step is taken. A platform may send the signal to every process of the worker.
    """
    here, broker = on_broker
    name = system.publish(here, write_skill(AGENTS, HANDLERS))
    victim = system.start_worker(pool=pool, concurrency=3, STEPFAST_SHUTDOWN_S="1")
    run_id = operations.start(here, name, {"folder": str(tmp_path)}).run_id
    for agent in ("quick", "slow", "careful"):
        eventually(lambda agent=agent: _began(tmp_path, agent), what=agent)
    other = system.start_worker(pool=pool, concurrency=3)
    if broker == "rabbitmq":
        os.killpg(victim.pid, signal.SIGTERM)
    else:
        victim.terminate()
    (tmp_path / "quick-go").touch()
    (pid,) = eventually(lambda: _began(tmp_path, "after"), what="what follows")
    assert os.getpgid(int(pid)) == other.pid
    (tmp_path / "after-go").touch()
    eventually(lambda: len(_began(tmp_path, "slow")) == 2, what="the slow step elsewhere")
    assert victim.poll() is None
    (tmp_path / "careful-go").touch()
    assert victim.wait(20) == 0, victim.log.read_text()[-3000:]
    (tmp_path / "slow-go").touch()
    run = system.ended(run_id)
    assert run["state"] == "completed"
    tries = {step["agent"]: [(entry["error"] or {}).get("code") for entry in step["tries"]] for step in run["steps"]}
    assert tries == {"quick": [None], "slow": ["handed_over", None], "careful": [None], "after": [None]}
    assert {step["worker_losses"] for step in run["steps"]} == {0}
    assert [line["left"] for line in system.logged("worker.stopped")] in ([], [0])


def test_idle_worker_ends_at_once(system, here, write_skill):
    """Nothing executes, so there is nothing to wait for; and its row says that it has gone."""
    name = system.publish(here, write_skill("- {id: a}", "def a(ctx): return {}"))
    worker = system.start_worker()
    system.ended(operations.start(here, name, {}).run_id)
    worker.terminate()
    assert worker.wait(15) == 0
    with here.store.engine.connect() as connection:
        assert connection.exec_driver_sql("select count(*) from stepfast.workers where ended_at is null").scalar() == 0


@pytest.mark.slow
def test_old_and_new_code_side_by_side(system, here, write_skill, tmp_path):
    """A run finishes on the definition that it began with; a worker that lacks a handler leaves its step to others."""
    first = "- {id: first, idempotent: true}\n"
    handlers = GATED + "\n    def first(ctx): return _pass(ctx, 'first')\n"
    name = system.publish(
        here, write_skill(first + "- {id: old, depends_on: [first]}", handlers + "\n    def old(ctx): return {}\n")
    )
    system.start_worker()
    begun = operations.start(here, name, {"folder": str(tmp_path)}).run_id
    eventually(lambda: _began(tmp_path, "first"), what="the first step")

    # The new version, in the folder of the new release.
    folder = tmp_path / "released"
    folder.mkdir()
    (folder / "tested.skill.yaml").write_text(
        "name: tested\nversion: 2.0.0\nagents:\n  - {id: first, idempotent: true}\n  - {id: new, depends_on: [first]}\n"
    )
    (folder / "handlers.py").write_text("def first(ctx): return {}\ndef new(ctx): return {}\n")
    system.publish(here, folder)
    later = operations.start(here, name, {"folder": str(tmp_path)}).run_id
    (tmp_path / "first-go").touch()
    assert set(_ended_states(system, begun)) == {"first", "old"}
    eventually(lambda: system.states(later).get("new") == "retryable", what="a deferral by the old worker")
    system.start_worker(STEPFAST_SKILLS=str(folder))
    assert set(_ended_states(system, later)) == {"first", "new"}
    assert system.run(later)["steps"][1]["failures"] == 0


def _ended_states(system, run_id) -> dict[str, str]:
    # The old worker may be given the step several times in a row, and puts it off for twice as long each time.
    run = system.ended(run_id, within_s=120)
    assert run["state"] == "completed"
    return {step["agent"]: step["state"] for step in run["steps"]}
