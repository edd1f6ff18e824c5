"""A store without workers: attempts made by hand, time moved by hand."""

from uuid import uuid4

from sqlalchemy import text

from app.runs.orders import Orders
from app.runs.store import Bid, Ending, Paid, StepKey, Store

# A lease so long that Postgres counts as just started: a sweep with it takes nobody for dead.
CALM_MS = 2_000_000_000
FREE = Paid()
ERROR = {"code": "broken", "who": "retry", "message": "It broke 3 times.", "next_step": "", "details": {}}


class Bench:
    """A store, a registered worker without a process, and shorthand for attempts."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.worker_id = self.sql(
            "insert into stepfast.workers (host, pid, code_version, started_at, lease_until)"
            " values ('h', 1, 1, stepfast.now(), stepfast.now() + interval '1 hour') returning id"
        )

    def sql(self, statement: str, **parameters):
        with self.store.engine.connect() as connection:
            result = connection.execute(text(statement), parameters)
            return result.scalar() if result.returns_rows else None

    def start(self, definition, run_input=None, **options):
        self.definition = definition
        self.store.publish(definition)
        return self.store.enqueue(definition.name, run_input or {}, **options)[0]

    def bid(self, run_id, name, *, repeatable=True, timeout_ms=60_000, alone=False) -> Bid:
        return Bid(
            StepKey(run_id, name),
            self.definition.by_id[name],
            self.definition.hash,
            uuid4(),
            self.worker_id,
            timeout_ms,
            1000,
            repeatable,
            alone=alone,
        )

    def claim(self, run_id, name, **options):
        bid = self.bid(run_id, name, **options)
        claim = self.store.claim(bid)
        return bid, claim

    def complete(self, bid, output=None):
        return self.store.complete(bid.step, bid.attempt_id, output or {"by": bid.agent.id}, FREE)

    def do(self, run_id, *names):
        for name in names:
            bid, claim = self.claim(run_id, name)
            assert claim.outcome == "claimed"
            ended = self.complete(bid)
        return ended

    def fail(self, bid, *, retry_ms=None, counts=True, error=None):
        ending = Ending("discard" if retry_ms is None else "retry", counts=counts, retry_ms=retry_ms)
        return self.store.fail(bid.step, bid.attempt_id, error or ERROR, FREE, ending)

    def resume(self, run_id, by="me"):
        return Orders(self.store.engine).resume(run_id, by)

    def states(self, run_id) -> dict[str, str]:
        with self.store.engine.connect() as connection:
            rows = connection.execute(text("select agent, state from stepfast.steps where run_id = :r"), {"r": run_id})
            return {row.agent: row.state for row in rows}

    def run_state(self, run_id) -> str:
        return self.sql("select state from stepfast.runs where id = :r", r=run_id)

    def sweep(self, *, lease_ms=1, grace_ms=0):
        # A lease of 1 ms also ends the truce after the start of Postgres.
        return self.store.sweep(lease_ms=lease_ms, grace_ms=grace_ms, resend_ms=2_000, limit=100)

    def pass_time(self, seconds):
        self.sql("update stepfast.meta set clock_offset = clock_offset + :s * interval '1 s'", s=seconds)
