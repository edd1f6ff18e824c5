"""Many threads at once on a handful of runs: no deadlock, no long wait, and all rules hold after it."""

import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from uuid import uuid4

import pytest
from conftest import eventually
from histories import ERRORS, ORDER, TICK_MS, Bench
from pipelines import agent, pipeline
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.errors import NotPossible
from app.pipelines.model import OnRefused, RetryPolicy
from app.runs.database import engine
from app.runs.invariants import check
from app.runs.store import Store

THREADS = 8
HAMMER_S = 30 if "HISTORIES" in os.environ else 5
UNFINISHED_MAX = 12
# Two slow cores are shared with everything else that runs: what a lock costs is far below, a stall far above.
WAIT_MAX_S = 3.0


def _definition():
    tries = RetryPolicy(max_attempts=2, initial_ms=TICK_MS // 2, max_ms=TICK_MS // 2)
    fields = {"timeout_ms": 10 * TICK_MS, "retry_policy": tries}
    return pipeline(
        agent("a", **fields),
        agent("b", "a", key_parts=ORDER, key_inputs=(("input", "order"),), **fields),
        agent("c", "a", handler="handlers.py:f", failure_mode="skip_dependents", **fields),
        agent("d", "a", handler="handlers.py:f", failure_mode="continue", **fields),
        agent("e", "b", "c", requires_human_approval=True, approval_timeout_ms=3 * TICK_MS, **fields),
        agent("f", "b", "d", gate="{{b.ok}} == true", on_refused=OnRefused("b", 2), **fields),
        agent("g", "e", "f", reads=("a", "b", "e", "f"), **fields),
        name="random",
        version="hammer",
        concurrency_parts=({"path": ["input", "repo"]},),
    )


class Hammer:
    """One thread's choices. What it holds, others may end too."""

    def __init__(self, bench: Bench, seed: int, slowest: list[tuple[float, str]], done: Counter) -> None:
        self.bench, self.random, self.slowest, self.done = bench, random.Random(seed), slowest, done

    def pound(self, until: float) -> None:
        work = [self.work] * 12 + [self.end] * 4 + [self.sweep] * 2 + [self.start] * 2
        orders = [self.approve] * 3 + [self.resume, self.resume_from, self.override, self.cancel, self.worker_dies]
        while time.monotonic() < until:
            action = self.random.choice(work + orders)
            began = time.monotonic()
            with suppress(NotPossible):
                action()
                self.done[action.__name__] += 1
            self.slowest.append((time.monotonic() - began, action.__name__))

    def run(self):
        return self.random.choice(self.bench.runs[-UNFINISHED_MAX:])

    def agent(self) -> str:
        return self.random.choice(self.bench.definition.agents).id

    def work(self) -> None:
        if ready := self.bench.rows("available"):
            held = self.bench.take(self.random.choice(ready), repeated=False)
            if held:
                self.bench.held.append(held)

    def end(self) -> None:
        for _ in range(3):
            if self.bench.held:
                held = self.random.choice(self.bench.held[-20:])
                if self.random.random() < 0.8:
                    self.bench.complete(held, ok=self.random.random() < 0.8)
                else:
                    self.bench.fail(held, ERRORS[self.random.choice([*ERRORS])]("It broke."))

    def sweep(self) -> None:
        if self.random.random() < 0.2:
            self.bench.pass_time(1)
        self.bench.sweep()
        self.bench.store.take_unsent(None, 20)

    def start(self) -> None:
        states = self.bench.run_states().values()
        if sum(state in {"pending", "running", "suspended"} for state in states) < UNFINISHED_MAX:
            self.bench.start(self.random.choice("1234567890"), repo=self.random.choice(["x", "y", uuid4().hex]))

    def approve(self) -> None:
        if asked := self.bench.rows("suspended"):
            step = self.random.choice(asked)
            self.bench.orders.decide(
                step.run_id, step.agent, approved=self.random.random() < 0.8, digest=None, by="me", reason=None
            )

    def resume(self) -> None:
        self.bench.orders.resume(self.run(), "me")

    def resume_from(self) -> None:
        self.bench.orders.resume_from(self.run(), self.agent(), "me")

    def override(self) -> None:
        self.bench.orders.override(self.run(), self.agent(), {"ok": True}, "me", None)

    def cancel(self) -> None:
        self.bench.orders.cancel(self.run(), "me", None)

    def worker_dies(self) -> None:
        with self.bench.dying:
            self.bench.end_worker()
            self.bench.worker = self.bench.new_worker()


@pytest.mark.slow
def test_rules_hold_under_many_threads(database_url):
    """Whatever meets whatever: nobody deadlocks, nobody waits long, and afterwards all rules hold and every run ends."""
    store = Store(engine(database_url, pool_max=THREADS + 4))
    bench = Bench(store, _definition())
    bench.dying = threading.Lock()
    bench.start("1", repo="x")
    slowest, done = [], Counter()
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    until = time.monotonic() + HAMMER_S
    with ThreadPoolExecutor(THREADS) as pool:
        ended = [pool.submit(Hammer(bench, seed + n, slowest, done).pound, until) for n in range(THREADS)]
    failures = [one.exception() for one in ended if one.exception()]
    states = [getattr(error.orig, "sqlstate", None) for error in failures if isinstance(error, DBAPIError)]
    assert not failures, f"{states} {failures}"
    slowest.sort(reverse=True)
    print(f"{len(slowest)} actions on {len(bench.runs)} runs {dict(done)}; the slowest: {slowest[:3]}")
    with store.engine.connect() as connection:
        assert check(connection) == []
    bench.drive()
    with store.engine.connect() as connection:
        assert check(connection) == []
    assert slowest[0][0] < WAIT_MAX_S
    bench.close()
    store.engine.dispose()


def test_cancelling_the_next_run_while_the_one_before_it_ends(database_url):
    """Who ends a run releases the next one of its concurrency key; who cancels that one meanwhile waits, and no more."""
    store = Store(engine(database_url, pool_max=6))
    bench = Bench(store, _definition())
    first, second = bench.start("1", repo="x"), bench.start("2", repo="x")
    parts = (bench.tenant, "random", "x")
    with (
        store.engine.connect().execution_options(isolation_level="READ COMMITTED") as ending,
        ThreadPoolExecutor(1) as pool,
    ):
        # As if the first run's last step were just now releasing the second run.
        ending.execute(text("select stepfast.lock_concurrency_key(:t, :p, :k)"), dict(zip("tpk", parts, strict=True)))
        cancelled = pool.submit(bench.orders.cancel, second, "me", None)
        eventually(lambda: bench.sql("select from pg_locks where not granted and locktype = 'advisory'"))
        ending.execute(text("select stepfast.cancel_v1(:r, 'me', null)"), {"r": first})
        ending.commit()
        cancelled.result(timeout=10)
    assert set(bench.run_states().values()) == {"cancelled"}
    assert bench.violations() == []
    bench.close()
    store.engine.dispose()
