"""What changes a run: one method for each of the database's functions, one round trip each.

Every method may raise SQLAlchemy's DBAPIError for an outage; whoever must not fail at one repeats the call with the
same attempt id, and gets the same answer. Nothing here decides: `execution` does, and the functions in migrations/sql.
"""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID, uuid4

import psycopg
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError

from app.errors import Misuse, UnknownName
from app.pipelines.model import Pipeline
from app.runs import statements
from app.runs.refusals import refusal, sqlstate

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from sqlalchemy import Engine, ExceptionContext, TextClause

    from app.pipelines.model import Agent, Json


@dataclass(frozen=True, slots=True, order=True)
class StepKey:
    """Which step: (run, agent, item). `item` is empty until agents fan out over a list."""

    run_id: UUID
    agent: str
    item: str = ""


@dataclass(frozen=True, slots=True)
class Bid:
    """A request to claim a step for one attempt.

    `timeout_ms` is when others may take the step away again; `wait_ms` is how long the step waits where another run
    holds its key; `repeatable` says that dying under it is harmless; `alone` that its process executes nothing else;
    `lean` that the answer needs no outputs: whoever claims has a cache of them.
    """

    step: StepKey
    agent: "Agent"
    pipeline_hash: str
    attempt_id: UUID
    worker_id: int
    timeout_ms: int
    wait_ms: int
    repeatable: bool
    code_hash: str | None = None
    alone: bool = False
    lean: bool = False


@dataclass(frozen=True, slots=True)
class Claim:
    """The answer to a claim. `outcome` is claimed, reuse, bad_key, too_old, deferred, alone or stale (see claim.sql).

    Of a lean bid `outputs` is empty, and `reads` names them: {agent: {"attempt", "hash"}}.
    `approved` is the digest that a person approved; `feedback` what a later gate read when it sent this step back;
    `observed` is what those on which it depends strongly saw of the world: {"agent", "name", "value", "probe"} each.
    `next` the steps of this and other runs that the caller must now send, in this order; `stale` what makes it too_old.
    """

    outcome: str
    pipeline: str = ""
    input: "Json" = field(default_factory=dict)
    outputs: "dict[str, Json]" = field(default_factory=dict)
    reads: "dict[str, Json]" = field(default_factory=dict)
    generation: int = 1
    number: int = 1
    failures: int = 0
    waits: int = 0
    rounds: int = 0
    feedback: "Json | None" = None
    approved: str | None = None
    output: "Json | None" = None
    reused_from: str | None = None
    problem: str = ""
    stale: "Json | None" = None
    observed: "tuple[Json, ...]" = ()
    reason: str = ""
    state: str | None = None
    run_state: str | None = None
    tenant: str = ""
    held_by: str | None = None
    next: "tuple[Unsent, ...]" = ()


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer to complete and fail. `outcome` is the step's new state, or stale. `ready` are steps to send."""

    outcome: str
    run_state: str | None
    ready: tuple[StepKey, ...] = ()


@dataclass(frozen=True, slots=True)
class Paid:
    """What an attempt's call cost, if it was a model's."""

    model: str | None = None
    request_id: str | None = None
    usage: dict[str, int] | None = None
    cost_usd: float | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """What becomes of a step whose attempt failed: see fail_v1. `counts` uses up one of its attempts."""

    action: Literal["retry", "discard", "rerun"]
    counts: bool = True
    retry_ms: int | None = None
    rerun: str | None = None
    feedback: "Json | None" = None


@dataclass(frozen=True, slots=True)
class Unsent:
    """A step that the caller must now send."""

    step: StepKey
    pipeline_hash: str


@dataclass(frozen=True, slots=True)
class Family:
    """What a worker knows of the processes that it started, by their pids: which live, and which it has seen end."""

    worker_id: int
    living: "Collection[int]"
    dead: "Collection[int]"


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep did and what must be sent: `due` retries released, steps `expired`, workers `lost`, steps `rescued`.

    Each of `rescued` has run_id, agent, attempt_id, code and reason. `overdue` are queues whose messages may be lost.
    `judge_ms` is how soon to sweep again, because a worker is suspect; None where none is.
    """

    due: int
    expired: int
    lost: tuple[int, ...]
    rescued: "tuple[Json, ...]"
    judge_ms: int | None
    unsent: bool
    unpublished: bool
    requested: bool
    overdue: tuple[str, ...]


class Store:
    """The database's functions, over one engine. Safe for threads; not for use across a fork."""

    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self._session_lost_s = -float("inf")
        event.listen(engine, "handle_error", self._note)

    def _note(self, context: "ExceptionContext") -> None:
        if context.is_disconnect:
            self._session_lost_s = time.monotonic()

    def lost_a_session_within(self, seconds: float) -> bool:
        """Whether Postgres, or the way to it, dropped a session of this process so recently: maybe others' too."""
        return time.monotonic() - self._session_lost_s < seconds

    def _one(self, statement: "TextClause", **parameters: object) -> Any:  # noqa: ANN401  # what the function returns
        with self.engine.connect() as connection:
            return connection.execute(statement, parameters).scalar()

    def _step(self, call: statements.DriverCall, **parameters: object) -> Any:  # noqa: ANN401
        """What each step does, by the driver itself: SQLAlchemy's layers cost half as much again."""
        pooled = self.engine.raw_connection()
        connection: psycopg.Connection[Any] = pooled.driver_connection  # type: ignore[assignment]
        try:
            return connection.execute(call.sql, call.values(parameters)).fetchone()[0]  # type: ignore[index]
        except psycopg.Error as error:
            if gone := connection.closed:
                self._session_lost_s = time.monotonic()
                pooled.invalidate(error)
                self.engine.dispose()  # the pool's others went the same way, or connect anew for nothing
            raise DBAPIError.instance(
                call.sql, None, error, psycopg.Error, hide_parameters=True, connection_invalidated=gone
            ) from error
        finally:
            pooled.close()

    def _all(self, statement: "TextClause", **parameters: object) -> "Sequence[Any]":
        with self.engine.connect() as connection:
            return connection.execute(statement, parameters).all()

    # Definitions.

    def publish(self, pipeline: Pipeline) -> bool:
        """Stores a definition and moves its name to it. Returns whether it was new.

        Raises Misuse where the version exists with other content.
        """
        try:
            with self.engine.connect() as connection, connection.begin():
                stored = connection.execute(
                    statements.PUBLISH,
                    {
                        "hash": pipeline.hash,
                        "name": pipeline.name,
                        "version": pipeline.version,
                        "definition": pipeline.as_json(),
                    },
                )
                connection.execute(statements.MOVE_NAME, {"name": pipeline.name, "hash": pipeline.hash})
                return stored.rowcount > 0
        except DBAPIError as error:
            if sqlstate(error) != "23505":
                raise
            raise Misuse(
                f"{pipeline.name} {pipeline.version} is published already, with other content.",
                next_step="Give the changed file a new version.",
            ) from error

    def definition(self, pipeline_hash: str) -> Pipeline:
        """The definition of a hash. Raises UnknownName."""
        found = self._one(statements.DEFINITION, hash=pipeline_hash)
        if found is None:
            raise UnknownName(f"No definition with hash {pipeline_hash} is published.")
        return Pipeline.from_json(found, pipeline_hash)

    # Runs.

    def enqueue(self, pipeline: str, run_input: "Json", **options: Any) -> tuple[UUID, bool]:  # noqa: ANN401
        """Starts a run, and leaves its sending to a sweep. Returns its id and whether it is new. Raises as `start`."""
        run_id, created, _ = self.start(pipeline, run_input, send_max=0, **options)
        return run_id, created

    def start(
        self,
        pipeline: str,
        run_input: "Json",
        *,
        send_max: int,
        key: str | None = None,
        tenant: str = "default",
        labels: "Json | None" = None,
        priority: int = 0,
        run_id: UUID | None = None,
    ) -> tuple[UUID, bool, tuple[Unsent, ...]]:
        """Starts a run, under an id of the caller's or a new one. Returns its id, whether it is new, and what to send.

        What to send is what `take_unsent` gives. Raises UnknownName, KeyConflict or Misuse.
        """
        try:
            rows = self._all(
                statements.START,
                pipeline=pipeline,
                input=run_input,
                key=key,
                tenant=tenant,
                labels=labels or {},
                priority=priority,
                run=run_id or uuid4(),
                limit=send_max,
            )
        except DBAPIError as error:
            raise refusal(error, pipeline) from error
        unsent = tuple(
            Unsent(StepKey(row.sent_run_id, row.agent, row.item), row.pipeline_hash) for row in rows if row.sent_run_id
        )
        return rows[0].run_id, rows[0].created, unsent

    # Steps.

    def claim(self, bid: Bid) -> Claim:
        """Takes an available step for an attempt, with everything that the attempt reads."""
        answer = self._step(
            statements.CLAIM,
            run=bid.step.run_id,
            agent=bid.step.agent,
            item=bid.step.item,
            pipeline_hash=bid.pipeline_hash,
            attempt=bid.attempt_id,
            worker=bid.worker_id,
            timeout_ms=bid.timeout_ms,
            repeatable=bid.repeatable,
            code_hash=bid.code_hash,
            reads=list(bid.agent.reads),
            key_parts=list(bid.agent.key_parts),
            key_inputs=[list(path) for path in bid.agent.key_inputs],
            wait_ms=bid.wait_ms,
            alone=bid.alone,
            lean=bid.lean,
        )
        following = tuple(
            Unsent(StepKey(UUID(entry["run_id"]), entry["agent"], entry["item"]), entry["pipeline_hash"])
            for entry in answer.get("next", ())
        )
        return Claim(**answer | {"next": following})

    def outputs(self, run_id: UUID, attempt_ids: "Collection[str]") -> "dict[str, str]":
        """Committed outputs as Postgres spells them, by attempt id."""
        rows = self._all(statements.OUTPUTS, run=run_id, ids=[UUID(one) for one in attempt_ids])
        return {str(row.id): row.output for row in rows}

    def defer(self, step: StepKey, delay_ms: int, reason: str) -> bool:
        """Puts an available step off, counting against nothing. Returns whether it was available."""
        return bool(
            self._one(
                statements.DEFER, run=step.run_id, agent=step.agent, item=step.item, delay_ms=delay_ms, reason=reason
            )
        )

    def complete(
        self,
        step: StepKey,
        attempt_id: UUID,
        output: "Json",
        paid: Paid,
        reused_from: UUID | None = None,
        observed: "Sequence[Json]" = (),
    ) -> Ended:
        """Commits an attempt's output, with what it observed, and releases what waited for it."""
        answer = self._step(
            statements.COMPLETE,
            run=step.run_id,
            agent=step.agent,
            item=step.item,
            attempt=attempt_id,
            output=output,
            model=paid.model,
            request_id=paid.request_id,
            usage=paid.usage,
            cost_usd=paid.cost_usd,
            reused_from=reused_from,
            observed=list(observed) or None,
        )
        return _ended(step, answer)

    def fail(self, step: StepKey, attempt_id: UUID, error: "Json", paid: Paid, ending: "Ending") -> Ended:
        """Ends a failed attempt, and releases what its failure mode lets go on."""
        answer = self._one(
            statements.FAIL,
            run=step.run_id,
            agent=step.agent,
            item=step.item,
            attempt=attempt_id,
            action=ending.action,
            error=error,
            retry_ms=ending.retry_ms,
            counts=ending.counts,
            rerun=ending.rerun,
            feedback=ending.feedback,
            model=paid.model,
            request_id=paid.request_id,
            usage=paid.usage,
            cost_usd=paid.cost_usd,
        )
        return _ended(step, answer)

    def suspend(self, step: StepKey, attempt_id: UUID, digest: str, shown: object, expires_ms: int | None) -> Ended:
        """Ends an attempt that found that a person must approve `digest` first; `shown` is what the person sees."""
        answer = self._one(
            statements.SUSPEND,
            run=step.run_id,
            agent=step.agent,
            item=step.item,
            attempt=attempt_id,
            digest=digest,
            shown=shown,
            expires_ms=expires_ms,
        )
        return _ended(step, answer)

    def begin_effect(self, step: StepKey, attempt_id: UUID, key: str) -> "Json":
        """{"state": new | happened | unknown | stale, "output": …}."""
        return self._one(  # type: ignore[no-any-return]
            statements.BEGIN_EFFECT, run=step.run_id, agent=step.agent, item=step.item, attempt=attempt_id, key=key
        )

    def end_effect(self, step: StepKey, attempt_id: UUID, key: str, output: "Json | None") -> "Json":
        """{"state": ended | stale}. Without an output: it did not happen."""
        return self._one(  # type: ignore[no-any-return]
            statements.END_EFFECT,
            run=step.run_id,
            agent=step.agent,
            item=step.item,
            attempt=attempt_id,
            key=key,
            output=output,
        )

    # Sending and rescue.

    def take_unsent(self, run_id: UUID | None, limit: int) -> tuple[Unsent, ...]:
        """Marks what comes next as sent, in the queues that one run waits for, or in all; the caller sends it in order.

        That may be steps of other runs, and not yet those of this one: see dispatched_max in sweep.sql.
        """
        return _unsent(self._all(statements.TAKE_UNSENT, run=run_id, limit=limit))

    def take_overdue(self, queues: "Collection[str]", resend_ms: int, limit: int) -> tuple[Unsent, ...]:
        """Marks as sent again what is overdue in these empty queues, or overtaken in others; the caller sends it."""
        return _unsent(self._all(statements.TAKE_OVERDUE, queues=list(queues), resend_ms=resend_ms, limit=limit))

    def sweep(
        self, *, lease_ms: int, grace_ms: int, resend_ms: int, limit: int, family: "Family | None" = None
    ) -> Swept:
        """Releases due retries, takes steps away from workers that are gone, and says what must be sent."""
        answer = self._one(
            statements.SWEEP,
            lease_ms=lease_ms,
            grace_ms=grace_ms,
            resend_ms=resend_ms,
            limit=limit,
            worker=family.worker_id if family else None,
            living=list(family.living) if family else [],
            dead=list(family.dead) if family else [],
        )
        return Swept(**answer | {name: tuple(answer[name]) for name in ("lost", "rescued", "overdue")})

    def hand_over(self, worker_id: int, limit: int) -> int:
        """Gives up to `limit` repeatable attempts of a worker and its children away. Returns how many are left."""
        return int(self._one(statements.HAND_OVER, worker=worker_id, limit=limit))

    # Dead letters.

    def unpublished_dead_letters(self, limit: int) -> "list[Json]":
        """Payloads of dead letters whose message was not sent, oldest first."""
        return [row.payload for row in self._all(statements.UNPUBLISHED, limit=limit)]

    def tell(self, letter_id: UUID, told: "Json") -> "Json":
        """Adds to a dead letter's payload what is told of it, unless that was done before. Returns the payload."""
        return self._one(statements.TELL, id=letter_id, told=told)  # type: ignore[no-any-return]

    def mark_published(self, ids: "Collection[UUID]") -> None:
        """Records that their messages were sent."""
        with self.engine.connect() as connection:
            connection.execute(statements.MARK_PUBLISHED, {"ids": list(ids)})


def _ended(step: StepKey, answer: "Json") -> Ended:
    ready = tuple(StepKey(step.run_id, entry["agent"], entry["item"]) for entry in answer.get("ready", ()))
    return Ended(answer["outcome"], answer["run_state"], ready)


def _unsent(rows: "Sequence[Any]") -> tuple[Unsent, ...]:
    return tuple(Unsent(StepKey(row.run_id, row.agent, row.item), row.pipeline_hash) for row in rows)
