"""What a person orders: resume, override, cancel, approve. Each raises NotPossible where the run does not allow it."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import bindparam, select, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.dialects.postgresql import UUID as PG_UUID
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import Text

from app.errors import NotPossible
from app.runs.database import is_outage
from app.runs.statements import call
from app.runs.tables import steps

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from uuid import UUID

    from sqlalchemy import Connection, Engine, Row, TextClause

    from app.pipelines.model import Json

_RUN = ("run", PG_UUID())
_RESUME = call("resume_v1", _RUN, ("by", Text()))
_RESUME_FROM = call("resume_from_v1", _RUN, ("agent", Text()), ("by", Text()))
_OVERRIDE = call(
    "override_v1", _RUN, ("agent", Text()), ("output", JSONB(none_as_null=True)), ("by", Text()), ("reason", Text())
)
_CANCEL = call("cancel_v1", _RUN, ("by", Text()), ("reason", Text()))
_DECIDE = call(
    "decide_v1",
    _RUN,
    ("agent", Text()),
    ("decision", Text()),
    ("digest", Text()),
    ("by", Text()),
    ("reason", Text()),
)
_DISCARD_LETTER = call("discard_letter_v1", ("letter", PG_UUID()), ("by", Text()))
# Oldest first. One that another worker holds just now is that worker's.
_TAKE_REQUEST = text("""
    select id, run_id, action, agent, digest, requested_by, reason from stepfast.requests
    where state = 'waiting' and (cast(:run as uuid) is null or run_id = :run) and id <> all (:passed)
    order by requested_at limit 1 for update skip locked
""").bindparams(bindparam("run", type_=PG_UUID()), bindparam("passed", type_=ARRAY(PG_UUID())))
_TRY_RUN = text("select id from stepfast.try_run(:run)").bindparams(bindparam("run", type_=PG_UUID()))
_END_REQUEST = text("""
    update stepfast.requests set state = :state, ended_at = stepfast.now(), answer = :answer where id = :id
""").bindparams(bindparam("answer", type_=JSONB()))

# How many requests that cannot be carried out just now are passed over at once.
PASSED_MAX = 500


@dataclass(frozen=True, slots=True)
class Carried:
    """A request that was carried out, or refused: then `answer` has message and next_step, else agents or decision."""

    run_id: "UUID"
    action: str
    agent: str | None
    by: str
    reason: str | None
    done: bool
    answer: "Json"


class Orders:
    """Over one engine; safe for threads. What became available is left to be sent by the caller (`take_unsent`)."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._connect: Callable[[], AbstractContextManager[Connection]] = engine.connect

    def _one(self, statement: "TextClause", **parameters: object) -> Any:  # noqa: ANN401  # what the function returns
        with self._connect() as connection:
            return connection.execute(statement, parameters).scalar()

    def resume(self, run_id: "UUID", by: str) -> tuple[str, ...]:
        """Lets a failed, cancelled or partial run go on. Returns the agents that are done again."""
        return _agents(run_id, self._one(_RESUME, run=run_id, by=by))

    def resume_from(self, run_id: "UUID", agent: str, by: str) -> tuple[str, ...]:
        """Opens a new generation of an agent and of all that depends on it. Returns their ids."""
        return _agents(run_id, self._one(_RESUME_FROM, run=run_id, agent=agent, by=by))

    def rehearse(self, run_id: "UUID", by: str, from_agent: str | None) -> dict[str, tuple[str, int]]:
        """What a resume would leave behind: each agent's state and generation. It is made, looked at, and undone."""
        with self._engine.connect() as connection:
            connection.execution_options(isolation_level="READ COMMITTED")
            with connection.begin() as transaction:
                statement = _RESUME if from_agent is None else _RESUME_FROM
                agent = {} if from_agent is None else {"agent": from_agent}
                _agents(run_id, connection.execute(statement, {"run": run_id, "by": by} | agent).scalar_one())
                rows = connection.execute(select(steps).where(steps.c.run_id == run_id)).all()
                transaction.rollback()
        return {row.agent: (row.state, row.generation) for row in rows}

    def override(self, run_id: "UUID", agent: str, output: "Json", by: str, reason: str | None) -> tuple[str, ...]:
        """Gives an agent an output by hand. Returns the agents that are done again on it."""
        return _agents(run_id, self._one(_OVERRIDE, run=run_id, agent=agent, output=output, by=by, reason=reason))

    def cancel(self, run_id: "UUID", by: str, reason: str | None) -> None:
        """Ends a run that has not ended."""
        _agents(run_id, self._one(_CANCEL, run=run_id, by=by, reason=reason))

    def decide(
        self, run_id: "UUID", agent: str, *, approved: bool, digest: str | None, by: str, reason: str | None
    ) -> str:
        """Approves or rejects the open request. Returns what it became: approved, rejected, or expired.

        A `digest` that is given must be the one that is asked for now.
        """
        decision = "approved" if approved else "rejected"
        answer = self._one(_DECIDE, run=run_id, agent=agent, decision=decision, digest=digest, by=by, reason=reason)
        if answer["outcome"] != "refused":
            return str(answer["outcome"])
        decided = answer.get("decided")
        known = f" It was {decided['state']} by {decided['by']} at {decided['at']}." if decided else ""
        raise NotPossible(
            f"Nothing of {agent} waits for this decision; it is {answer['state']}.{known}",
            next_step=f"See: stepfast show {run_id}",
        )

    def carry_out(self, run_id: "UUID | None", passed: "list[UUID]") -> Carried | None:
        """Carries out the oldest waiting request, of one run or of all, and records how it ended, in one transaction.

        Where it is one of all, it waits for nobody: requests whose run, or its concurrency key, somebody holds are left
        for later, and added to `passed`. Returns None where no other waits.
        """
        with self._engine.connect() as connection:
            connection.execution_options(isolation_level="READ COMMITTED")
            while len(passed) < PASSED_MAX:
                with connection.begin():
                    taken = {"run": run_id, "passed": passed}
                    request = connection.execute(_TAKE_REQUEST, taken).one_or_none()
                    if request is None:
                        return None
                    if run_id is not None or connection.scalar(_TRY_RUN, {"run": request.run_id}):
                        return self._carry_out(connection, request)
                passed.append(request.id)
        return None

    def _carry_out(self, connection: "Connection", request: "Row[Any]") -> Carried:
        inside = Orders(self._engine)
        inside._connect = lambda: nullcontext(connection)
        done, answer = True, {}
        try:
            with connection.begin_nested():
                answer = inside._obey(request)
        except NotPossible as error:
            done, answer = False, {"message": error.message, "next_step": error.next_step}
        except DBAPIError as error:
            if is_outage(error):
                raise
            # Tried again it would fail again, and keep the requests behind it waiting.
            done, answer = False, {"message": str(error.orig).splitlines()[0], "next_step": ""}
        ended = {"id": request.id, "state": "done" if done else "refused", "answer": answer}
        connection.execute(_END_REQUEST, ended)
        return Carried(
            request.run_id, request.action, request.agent, request.requested_by, request.reason, done, answer
        )

    def _obey(self, request: "Row[Any]") -> "Json":
        run_id, agent, by, reason = request.run_id, request.agent, request.requested_by, request.reason
        match request.action:
            case "resume":
                return {"agents": self.resume_from(run_id, agent, by) if agent else self.resume(run_id, by)}
            case "cancel":
                self.cancel(run_id, by, reason)
                return {}
            case decision:
                approved = decision == "approve"
                digest = request.digest
                decided = self.decide(run_id, agent, approved=approved, digest=digest, by=by, reason=reason)
                return {"decision": decided}

    def discard_letter(self, letter_id: "UUID", by: str) -> bool:
        """Resolves a dead letter without doing its step again. Returns whether it was open."""
        return bool(self._one(_DISCARD_LETTER, letter=letter_id, by=by))


def _agents(run_id: "UUID", answer: "Json") -> tuple[str, ...]:
    if answer["outcome"] == "done":
        return tuple(answer.get("agents", ()))
    see = f"See: stepfast show {run_id}"
    if unknown := answer.get("unknown"):
        agent = unknown[0]
        raise NotPossible(
            f"Nobody knows whether the effect of {', '.join(unknown)} happened.",
            next_step=f"Look. If it happened: stepfast override {run_id} {agent} --output FILE. "
            f"If not: stepfast resume {run_id} --from {agent}.",
        )
    if busy := answer.get("busy"):
        raise NotPossible(
            f"{', '.join(busy)} is executing and may not be interrupted: nobody would know what it has done.",
            next_step=f"Wait for its end: stepfast show {run_id} --follow",
        )
    if "state" in answer and answer["run_state"]:
        raise NotPossible(f"The step is {answer['state']} in a run that is {answer['run_state']}.", next_step=see)
    raise NotPossible(f"The run is {answer['run_state']}, which does not allow it.", next_step=see)
