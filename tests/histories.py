"""What random histories are made of: definitions, and workers without processes that do what the executor does."""

import os
from collections import Counter
from dataclasses import dataclass
from uuid import UUID, uuid4

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from pipelines import KEY, agent, pipeline
from sqlalchemy import text

from app.errors import (
    AgentError,
    AuthorMistake,
    GateRefused,
    HandlerFailed,
    OutcomeUnknown,
    Permanent,
    RateLimited,
    SnapshotTooOld,
)
from app.execution.outcome import decide
from app.pipelines import expressions
from app.pipelines.model import (
    Agent,
    Backoff,
    Consistency,
    Dependency,
    FailureMode,
    OnRefused,
    OnStale,
    Pipeline,
    RetryPolicy,
    hash_json,
)
from app.runs.invariants import Violation, check
from app.runs.orders import Orders
from app.runs.store import Bid, Claim, Ended, Paid, StepKey, Store

AGENTS_MAX = 12
STEPS_MAX = 16
# Every delay is a multiple of this, so that the seconds that a test takes decide nothing.
TICK_S = 1_000
TICK_MS = TICK_S * 1_000
ORDER = ({"path": ["input", "order"]},)
FREE, PAID = Paid(), Paid("claude-sonnet-5-5", "req", {"input_tokens": 1}, 0.01)
ERRORS: dict[str, type[AgentError]] = {
    "failed": HandlerFailed,
    "limited": RateLimited,
    "permanent": Permanent,
    "unknown": OutcomeUnknown,
}


@st.composite
def definitions(draw, agents_max: int = AGENTS_MAX) -> Pipeline:
    """Any DAG: every agent depends on some of those before it, and a handler reads all its ancestors."""
    made: list[Agent] = []
    ancestors: dict[str, set[str]] = {}
    strong: dict[str, set[str]] = {}
    for number in range(draw(st.integers(1, agents_max))):
        name = "abcdefghijkl"[number]
        before = [one.id for one in made]
        depends_on = draw(st.lists(st.sampled_from(before), max_size=3, unique=True)) if before else []
        ancestors[name] = set(depends_on).union(*(ancestors[other] for other in depends_on))
        declared = tuple(draw(_snapshots(other)) for other in depends_on if draw(st.integers(0, 3)) == 0)
        direct = set(depends_on) - {entry.agent for entry in declared}
        strong[name] = direct.union(*(strong[other] for other in direct))
        made.append(draw(_agents(name, depends_on, declared, sorted(ancestors[name]), sorted(strong[name]))))
    return pipeline(
        *made,
        name="random",
        version=str(uuid4()),
        deadline_ms=draw(st.sampled_from([None, None, None, 20 * TICK_MS])),
        concurrency_parts=draw(st.sampled_from([(), (), ({"path": ["input", "repo"]},)])),
    )


@st.composite
def _snapshots(draw, name: str) -> Dependency:
    max_ms = draw(st.sampled_from([TICK_MS // 2, 2 * TICK_MS + TICK_MS // 2]))
    return Dependency(name, Consistency.SNAPSHOT, max_ms, draw(st.sampled_from(OnStale)))


@st.composite
def _agents(
    draw, name: str, depends_on: list[str], declared: tuple[Dependency, ...], reads: list[str], strong: list[str]
) -> Agent:
    gate = on_refused = None
    if reads and draw(st.integers(0, 2)) == 0:
        gate = f"{{{{{draw(st.sampled_from(reads))}.ok}}}} == true"
        if strong and draw(st.booleans()):
            on_refused = OnRefused(draw(st.sampled_from(strong)), draw(st.integers(1, 2)))
    asks = draw(st.integers(0, 4)) == 0
    kind = draw(st.sampled_from(["model", "handler", "repeatable"]))
    return agent(
        name,
        *depends_on,
        declared=declared,
        reads=tuple(reads),
        failure_mode=draw(st.sampled_from(FailureMode)),
        gate=gate,
        on_refused=on_refused,
        requires_human_approval=asks,
        approval_timeout_ms=draw(st.sampled_from([None, 5 * TICK_MS])) if asks else None,
        timeout_ms=10 * TICK_MS,
        retry_policy=RetryPolicy(
            draw(st.integers(1, 3)), Backoff.CONSTANT, TICK_MS // 2, TICK_MS // 2, 0.0, draw(st.integers(0, 2))
        ),
        idempotent=kind == "repeatable",
        key_parts=draw(st.sampled_from([KEY, ORDER])),
        key_inputs=draw(st.sampled_from([(), (("input", "order"),)])),
        **({} if kind == "model" else {"handler": "handlers.py:f"}),
    )


@dataclass(frozen=True, slots=True)
class Held:
    """A claim that some worker believes to hold. `asks` is the digest that a person must approve first."""

    bid: Bid
    claim: Claim
    asks: str | None = None

    @property
    def agent(self) -> Agent:
        return self.bid.agent


class Bench:
    """The runs of one history in a database that many share. `runs` are in the order of their start."""

    def __init__(self, store: Store, definition: Pipeline) -> None:
        self.store, self.orders, self.definition = store, Orders(store.engine), definition
        self.tenant = uuid4().hex
        self.runs: list[UUID] = []
        self.held: list[Held] = []
        store.publish(definition)
        # A worker is alive while its lock is held, as in Presence.
        self.session = store.engine.connect()
        self.worker = self.new_worker()

    def sql(self, statement: str, **parameters):
        with self.store.engine.connect() as connection:
            result = connection.execute(text(statement), parameters)
            return result.all() if result.returns_rows else []

    def new_worker(self) -> int:
        worker = self.sql(
            "insert into stepfast.workers (host, pid, code_version, started_at, lease_until)"
            " values ('h', 1, 1, stepfast.now(), stepfast.now() + interval '10 years') returning id"
        )[0].id
        self.session.execute(text("select pg_advisory_lock(7083, :w)"), {"w": worker})
        return worker

    def end_worker(self) -> None:
        self.sql("update stepfast.workers set ended_at = stepfast.now() where id = :w", w=self.worker)
        self.session.execute(text("select pg_advisory_unlock(7083, :w)"), {"w": self.worker})

    def start(self, order: str, more: int = 0, repo: str = "r", priority: int = 0) -> UUID:
        run_input = {"order": order, "repo": repo, "more": more}
        run_id, _ = self.store.enqueue("random", run_input, tenant=self.tenant, priority=priority)
        self.runs.append(run_id)
        return run_id

    def pass_time(self, ticks: int) -> None:
        self.sql("update stepfast.meta set clock_offset = clock_offset + :s * interval '1 s'", s=ticks * TICK_S)

    def sweep(self) -> None:
        # A lease of 1 ms ends the truce after the start of Postgres.
        self.store.sweep(lease_ms=1, grace_ms=0, resend_ms=2_000, limit=100)

    def rows(self, *states: str) -> list[StepKey]:
        """The history's steps in these states, in one order."""
        found = self.sql(
            "select run_id, agent from stepfast.steps where run_id = any(:runs) and state = any(:states)",
            runs=self.runs,
            states=list(states),
        )
        return sorted(
            (StepKey(row.run_id, row.agent) for row in found), key=lambda s: (self.runs.index(s.run_id), s.agent)
        )

    def send(self) -> None:
        """Sends what comes next: before whatever is not sent, the highest priority first, then the oldest run."""
        rank = (
            "select s.run_id, s.agent from stepfast.steps s join stepfast.runs r on r.id = s.run_id"
            " where s.state = 'available' and s.sent_at is null order by r.priority desc, r.created_at, r.id, s.agent"
        )
        waiting = [StepKey(row.run_id, row.agent) for row in self.sql(rank)]
        sent = [entry.step for entry in self.store.take_unsent(None, 100)]
        assert sent == waiting[: len(sent)], f"{sent} is not what comes first of {waiting}"

    def run_states(self) -> dict[UUID, str]:
        return {
            row.id: row.state for row in self.sql("select id, state from stepfast.runs where id = any(:r)", r=self.runs)
        }

    def violations(self) -> list[Violation]:
        with self.store.engine.connect() as connection:
            return [found for run_id in self.runs for found in check(connection, run_id)]

    # What a worker does with a message.

    def bid(self, step: StepKey, *, alone: bool = False) -> Bid:
        chosen = self.definition.by_id[step.agent]
        limits = (chosen.timeout_ms, TICK_MS // 2)
        return Bid(step, chosen, self.definition.hash, uuid4(), self.worker, *limits, chosen.repeatable, alone=alone)

    def take(self, step: StepKey, *, repeated: bool = False) -> Held | None:
        """Claims a step and does what stands before its execution. What comes back is executing."""
        bid = self.bid(step)
        claim = self.store.claim(bid)
        if claim.outcome == "alone":
            bid = self.bid(step, alone=True)
            claim = self.store.claim(bid)
        if repeated and claim.outcome in {"claimed", "reuse", "bad_key", "too_old"}:
            again = self.store.claim(bid)
            said = [(c.outcome, c.number, c.generation, c.output, c.reused_from) for c in (claim, again)]
            assert said[0] == said[1], f"a repeated claim answers {said[1]} and not {said[0]}"
            assert self.store.claim(self.bid(step)).outcome == "stale"
        held = Held(bid, claim)
        match claim.outcome:
            case "stale" | "deferred":
                return None
            case "reuse":
                self.store.complete(step, bid.attempt_id, claim.output, FREE, UUID(claim.reused_from))
                return None
            case "bad_key":
                self.fail(held, AuthorMistake(claim.problem))
                return None
            case "too_old":
                self.fail(held, SnapshotTooOld(claim.problem))
                return None
        try:
            self.check_gate(held)
        except AgentError as error:
            self.fail(held, error)
            return None
        digest = hash_json({"outputs": claim.outputs, "input": claim.input, "feedback": claim.feedback})
        asks = bid.agent.requires_human_approval and digest != claim.approved
        return Held(bid, claim, digest if asks else None)

    def check_gate(self, held: Held) -> None:
        if held.agent.gate is None:
            return
        if not expressions.parse(held.agent.gate).evaluate({**held.claim.outputs, "input": held.claim.input}).held:
            raise GateRefused("The gate does not hold.", details={"read": held.claim.outputs})

    def complete(self, held: Held, *, ok: bool) -> Ended:
        """Ends well: with an output, or with the question to a person."""
        step, attempt_id = held.bid.step, held.bid.attempt_id
        if held.asks:
            return self.store.suspend(step, attempt_id, held.asks, {}, held.agent.approval_timeout_ms)
        return self.store.complete(step, attempt_id, {"ok": ok, "by": held.agent.id}, PAID)

    def fail(self, held: Held, error: AgentError) -> Ended:
        claim = held.claim
        ending = decide(
            error, held.agent, failures=claim.failures, waits=claim.waits, rounds=claim.rounds, random_0_to_1=0.0
        )
        stored = {"code": error.code, "who": error.who, "message": error.message, "next_step": "", "details": {}}
        return self.store.fail(held.bid.step, held.bid.attempt_id, stored, FREE, ending)

    # The end.

    def drive(self, iterations_max: int = 150) -> None:
        """Benign workers take what is sent to them, until nothing moves any more."""
        self.end_worker()
        self.worker = self.new_worker()
        for _ in range(iterations_max):
            self.pass_time(1)
            self.sweep()
            sent = (*self.store.take_unsent(None, 100), *self.store.take_overdue(["agents"], 2_000, 100))
            for entry in sent:
                held = self.take(entry.step)
                if held:
                    self.complete(held, ok=True)
            if self.settled():
                return
        raise AssertionError(f"after {iterations_max} rounds of benign workers: {self.picture()}")

    def settled(self) -> bool:
        """Whether every run has ended or waits for a person, a key that waits for one, or a run that does."""
        if self.rows("available", "executing"):
            return False
        for step in self.rows("retryable"):
            last = self.sql(
                "select data->>'reason' as reason from stepfast.events where run_id = :r and agent = :a"
                " order by seq desc limit 1",
                r=step.run_id,
                a=step.agent,
            )
            if last[0].reason != "key_unknown":
                return False
        return True

    def picture(self) -> str:
        rows = self.sql(
            "select r.state as run, s.agent, s.state, s.generation, s.scheduled_at from stepfast.runs r"
            " join stepfast.steps s on s.run_id = r.id where r.id = any(:r) order by r.created_at, s.agent",
            r=self.runs,
        )
        return "\n".join(f"{row.run:10} {row.agent} {row.state} {row.generation} {row.scheduled_at}" for row in rows)

    def close(self) -> None:
        """Leaves nothing for the sweeps of the next history."""
        for run_id, state in self.run_states().items():
            if state in {"pending", "running", "suspended"}:
                self.orders.cancel(run_id, "test", None)
        self.end_worker()
        self.session.close()


def play(machine: type[RuleBasedStateMachine], store: Store, count: int) -> None:
    """Runs `count` random histories of a machine, or as many as HISTORIES says: only then each time others."""
    machine.store, machine.counts = store, Counter()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("HISTORIES", count)),
            stateful_step_count=STEPS_MAX,
            deadline=None,
            derandomize="HISTORIES" not in os.environ,
            report_multiple_bugs=False,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
