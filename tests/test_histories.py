"""Random histories over random pipelines: the rules hold after every action, and every run ends or waits for a person.

The short form is part of every test run. The long form: `HISTORIES=2000 make test ARGS=tests/test_histories.py`.
"""

from collections import Counter
from contextlib import suppress
from random import Random

import pytest
from histories import ERRORS, TICK_MS, Bench, definitions, play
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from app.errors import NotPossible
from app.runs.invariants import check
from app.runs.store import StepKey, Store

HISTORIES_SHORT = 15
ACTIONS_A_STEP = 6
RUNS_MAX = 3

# Each action chooses by one number, so that a row of actions can be drawn more evenly than hypothesis would.
seeds = st.integers(0, 2**32 - 1)

EVENLY = [
    *(["work"] * 4 + ["complete"] * 4 + ["some_go_well"] * 3 + ["fail"] * 2 + ["sweep"] * 2 + ["decide"] * 2),
    *("resume", "resume_from", "override", "worker_dies", "start", "dismiss", "cancel", "handler_is_missing", "send"),
]


class History(RuleBasedStateMachine):
    """One pipeline, up to three runs of it, and whatever can happen to them."""

    store: Store
    counts: Counter

    def __init__(self):
        super().__init__()
        self.bench: Bench | None = None

    @initialize(definition=definitions(), others=st.lists(seeds, max_size=RUNS_MAX - 1))
    def first(self, definition, others):
        self.counts["histories"] += 1
        self.bench = Bench(self.store, definition)
        self.bench.start("1")
        for seed in others:
            self.start(seed)

    @rule(name=st.sampled_from(sorted(set(EVENLY))), seed=seeds)
    def one(self, name, seed):
        getattr(self, name)(seed)

    @rule(seed=seeds)
    def several(self, seed):
        chance = Random(seed)
        for _ in range(ACTIONS_A_STEP):
            name = chance.choice(EVENLY)
            note(name)
            getattr(self, name)(chance.getrandbits(32))
            self.rules_hold()

    # Workers.

    def work(self, seed):
        chance = Random(seed)
        for _ in range(chance.randint(1, 3)):
            if ready := self.bench.rows("available"):
                held = self.bench.take(chance.choice(ready), repeated=chance.random() < 0.3)
                if held:
                    self.bench.held.append(held)

    def some_go_well(self, seed):
        """Luck: without it few histories would come far."""
        for _ in range(Random(seed).randint(1, 4)):
            if ready := self.bench.rows("available"):
                held = self.bench.take(ready[0])
                if held:
                    self.bench.complete(held, ok=True)

    def _held(self, chance):
        """A claim that holds, or any that was ever made: whoever was fenced long ago may still answer."""
        executing = self.bench.rows("executing")
        current = [held for held in self.bench.held if held.bid.step in executing]
        return chance.choice(current if current and chance.random() < 0.7 else self.bench.held)

    def complete(self, seed):
        chance = Random(seed)
        if self.bench.held:
            held, ok = self._held(chance), chance.random() < 0.7
            first = self.bench.complete(held, ok=ok)
            if first.outcome == "completed":
                assert self.bench.complete(held, ok=ok).outcome == "completed", "a repeated completion is another's"

    def fail(self, seed):
        chance = Random(seed)
        if self.bench.held:
            held, error = self._held(chance), ERRORS[chance.choice([*ERRORS])]("It broke.")
            first = self.bench.fail(held, error)
            again = self.bench.fail(held, error)
            assert (first.outcome == "stale") == (again.outcome == "stale"), "a repeated failure is another's"

    def handler_is_missing(self, seed):
        if ready := self.bench.rows("available"):
            self.bench.store.defer(Random(seed).choice(ready), TICK_MS // 2, "no handler")

    def worker_dies(self, seed):
        self.bench.end_worker()
        self.bench.worker = self.bench.new_worker()
        if Random(seed).random() < 0.5:
            self.bench.sweep()

    def sweep(self, seed):
        chance = Random(seed)
        self.bench.pass_time(chance.choice([0, 1, 1, 6, 11]))
        for _ in range(chance.randint(1, 2)):
            self.bench.sweep()

    # Operators.

    def _order(self, action, *arguments, **options):
        with suppress(NotPossible):
            action(*arguments, **options)
            self.counts[action.__name__] += 1

    def _step(self, chance):
        """Any step; rather one that is in the middle of something."""
        busy = self.bench.rows("executing", "discarded", "suspended", "retryable", "cancelled")
        if busy and chance.random() < 0.6:
            return chance.choice(busy)
        return StepKey(chance.choice(self.bench.runs), chance.choice(self.bench.definition.agents).id)

    def start(self, seed):
        if len(self.bench.runs) < RUNS_MAX:
            # The order names a shared key; the rest makes other inputs of it.
            chance = Random(seed)
            self.bench.start(chance.choice("112"), chance.choice([0, 0, 1]), priority=chance.choice([0, 0, 5, 9]))

    def send(self, _seed):
        self.bench.send()

    def resume(self, seed):
        self._order(self.bench.orders.resume, Random(seed).choice(self.bench.runs), "me")

    def resume_from(self, seed):
        chance = Random(seed)
        step = self._step(chance)
        ancestors = self.bench.definition.by_id[step.agent].reads
        self._order(self.bench.orders.resume_from, step.run_id, chance.choice([step.agent, *ancestors]), "me")

    def override(self, seed):
        chance = Random(seed)
        step, output = self._step(chance), {"ok": chance.random() < 0.7}
        self._order(self.bench.orders.override, step.run_id, step.agent, output, "me", None)

    def cancel(self, seed):
        self._order(self.bench.orders.cancel, Random(seed).choice(self.bench.runs), "me", None)

    def decide(self, seed):
        chance = Random(seed)
        if asked := self.bench.rows("suspended"):
            step, approved = chance.choice(asked), chance.random() < 0.7
            digest = chance.choice([None, None, None, "another"])
            decide = self.bench.orders.decide
            self._order(decide, step.run_id, step.agent, approved=approved, digest=digest, by="me", reason=None)

    def dismiss(self, seed):
        letters = self.bench.sql(
            "select d.id from stepfast.dead_letters d join stepfast.runs r on r.id = d.run_id"
            " where d.run_id = any(:r) and d.resolved_at is null order by r.created_at, d.agent",
            r=self.bench.runs,
        )
        if letters:
            self._order(self.bench.orders.discard_letter, Random(seed).choice(letters).id, "me")

    @invariant()
    def rules_hold(self):
        if self.bench:
            self.counts["actions"] += 1
            found = self.bench.violations()
            assert not found, (
                "\n".join(f"{v.rule} {v.agent}: {v.sentence}" for v in found) + f"\n{self.bench.picture()}"
            )

    def teardown(self):
        if not self.bench:
            return
        try:
            self.bench.drive()
            self.rules_hold()
            self.counts.update(f"end {state}" for state in self.bench.run_states().values())
        finally:
            self.bench.close()


@pytest.mark.timeout(4 * 3600)
def test_rules_hold_in_every_history(fast_store):
    """All nine rules hold after every action, and benign workers bring every run to its end or to a person."""
    play(History, fast_store, HISTORIES_SHORT)
    print(f"{sum(History.counts.values())}: {dict(History.counts)}")
    with fast_store.engine.connect() as connection:
        assert check(connection) == []
