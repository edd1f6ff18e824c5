"""What people and programs ask about runs: dictionaries with stable keys, times as ISO 8601 in UTC, ids as text."""

import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

from sqlalchemy import Uuid, func, select, tuple_
from sqlalchemy.dialects.postgresql import aggregate_order_by

from app.errors import UnknownName
from app.runs.states import RunState
from app.runs.tables import (
    approvals,
    attempts,
    dead_letters,
    effects,
    events,
    pipeline_names,
    pipelines,
    runs,
    steps,
    workers,
)

if TYPE_CHECKING:
    from sqlalchemy import Engine, Select, Table

    from app.pipelines.model import Json

LIST_MAX = 1_000
EVENTS_MAX = 10_000
_CANDIDATES_MAX = 5
# What is the run's, for the order of sending; and how the claim looks for a key.
_OF_THE_ENGINE = {"priority", "created_at", "repeats"}
_RUN_COLUMNS = ("id", "pipeline", "state", "partial", "tenant", "key", "labels", "created_at", "started_at", "ended_at")


class Reads:
    """Questions over one engine. Nothing here writes."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    def _rows(self, query: "Select[Any]") -> "list[Json]":
        with self._engine.connect() as connection:
            found = connection.execute(query).mappings()
            return [{name: _plain(value) for name, value in row.items()} for row in found]

    def run_id(self, name: str) -> UUID:
        """The run that is meant by an unambiguous prefix of its id, or by `last`. Raises UnknownName."""
        if name == "last":
            newest = self._rows(select(runs.c.id).order_by(runs.c.created_at.desc()).limit(1))
            if not newest:
                raise UnknownName("There is no run yet.", next_step="Start one: stepfast run SKILL")
            return UUID(newest[0]["id"])
        return self._by_prefix(runs.c.id, name, "run", "stepfast runs")

    def dead_letter_id(self, name: str) -> UUID:
        """The dead letter that is meant by an unambiguous prefix of its id. Raises UnknownName."""
        return self._by_prefix(dead_letters.c.id, name, "dead letter", "stepfast dead")

    def _by_prefix(self, column: Any, name: str, what: str, command: str) -> UUID:  # noqa: ANN401  # a column
        digits = name.strip().lower().replace("-", "")
        if not re.fullmatch(r"[0-9a-f]{1,32}", digits):
            raise UnknownName(f"{name!r} is no {what}'s id.", next_step=f"List them: {command}")
        # Ids are compared as a range, so that the primary key serves it.
        low, high = UUID(digits.ljust(32, "0")), UUID(digits.ljust(32, "f"))
        found = self._rows(select(column).where(column.between(low, high)).limit(_CANDIDATES_MAX))
        if not found:
            raise UnknownName(f"No {what} has an id that begins with {name}.", next_step=f"List them: {command}")
        if len(found) > 1:
            listed = ", ".join(row["id"] for row in found)
            raise UnknownName(f"Several begin with {name}: {listed}.", next_step="Give more of the id.")
        return UUID(found[0]["id"])

    def current_hash(self, pipeline: str) -> str | None:
        """The hash of the definition that new runs of this name take."""
        found = self._rows(select(pipeline_names.c.hash).where(pipeline_names.c.name == pipeline))
        return found[0]["hash"] if found else None

    def pipeline_names(self) -> "list[str]":
        """The names of published pipelines, at most LIST_MAX."""
        return [row["name"] for row in self._rows(select(pipeline_names.c.name).limit(LIST_MAX))]

    def pipeline_hash(self, run_id: UUID) -> str:
        """The definition that a run pins. Raises UnknownName."""
        found = self._rows(select(runs.c.pipeline_hash).where(runs.c.id == run_id))
        if not found:
            raise UnknownName(f"There is no run {run_id}.", next_step="List them: stepfast runs")
        return str(found[0]["pipeline_hash"])

    def executing_pid(self, run_id: UUID, agent: str) -> int | None:
        """The process, on its worker's host, that executes an agent of a run; None where none does."""
        query = select(workers.c.pid).join(attempts, attempts.c.worker_id == workers.c.id)
        found = self._rows(
            query.where(attempts.c.run_id == run_id, attempts.c.agent == agent, attempts.c.state == "executing")
        )
        return found[0]["pid"] if found else None

    def worker_places(self, run: "Json") -> dict[int, str]:
        """Where each worker of a run's attempts is or was, as host:pid; those whose rows are gone are left out."""
        ids = {entry["worker_id"] for step in run["steps"] for entry in step["tries"]} - {None}
        found = self._rows(select(workers.c.id, workers.c.host, workers.c.pid).where(workers.c.id.in_(ids)))
        return {row["id"]: f"{row['host']}:{row['pid']}" for row in found}

    def approval_list(self, run_id: UUID) -> "list[Json]":
        """A run's approvals, oldest first."""
        return self._rows(select(approvals).where(approvals.c.run_id == run_id).order_by(approvals.c.requested_at))

    def run_list(
        self,
        *,
        limit: int = 50,
        state: str | None = None,
        pipeline: str | None = None,
        tenant: str | None = None,
        labels: "Json | None" = None,
        since: datetime | None = None,
        before: UUID | None = None,
    ) -> "list[Json]":
        """The newest runs first; those that have all of `labels`, were created `since`, and stand below run `before`.

        Keys: id, pipeline, state, partial, tenant, key, labels, created_at, started_at, ended_at, steps (how many),
        completed (how many), cost_usd.
        """
        query = _newest_first(runs, before).limit(min(limit, LIST_MAX))
        if state:
            query = query.where(runs.c.state == state)
        if pipeline:
            query = query.where(runs.c.pipeline == pipeline)
        if tenant:
            query = query.where(runs.c.tenant == tenant)
        if labels:
            query = query.where(runs.c.labels.contains(labels))
        if since:
            query = query.where(runs.c.created_at >= since)
        newest = query.subquery()
        of_run = select(func.count()).where(steps.c.run_id == newest.c.id)
        cost = select(func.sum(attempts.c.cost_usd)).where(attempts.c.run_id == newest.c.id)
        return self._rows(
            select(
                *(newest.c[name] for name in _RUN_COLUMNS),
                of_run.scalar_subquery().label("steps"),
                of_run.where(steps.c.state == "completed").scalar_subquery().label("completed"),
                cost.scalar_subquery().label("cost_usd"),
            ).order_by(newest.c.created_at.desc(), newest.c.id.desc())
        )

    def run(self, run_id: UUID) -> "Json":
        """A run with its steps in the definition's order, each with its attempts, oldest first.

        Keys: those of `run_list` but the counts, input, priority, concurrency_key, deadline_at, version,
        pipeline_hash, steps, totals, approvals (oldest first), blocked_by (the run of its key that it waits for).
        A step has agent, state, generation, attempts, failures, worker_losses, waits, scheduled_at, sent_at, ended_at,
        depends_on, and tries: the rows of its attempts. totals: calls (attempts that were paid for), cost_usd,
        input_tokens, output_tokens.
        """
        query = (
            select(
                *(runs.c[name] for name in _RUN_COLUMNS),
                *(runs.c[name] for name in ("input", "priority", "concurrency_key", "deadline_at")),
                runs.c.pipeline_hash,
                pipelines.c.version,
                pipelines.c.definition,
            )
            .join(pipelines, pipelines.c.hash == runs.c.pipeline_hash)
            .where(runs.c.id == run_id)
        )
        found = self._rows(query)
        if not found:
            raise UnknownName(f"There is no run {run_id}.", next_step="List them: stepfast runs")
        run = found[0]
        order = {agent["id"]: number for number, agent in enumerate(run.pop("definition")["agents"])}
        tries = self._rows(select(attempts).where(attempts.c.run_id == run_id).order_by(attempts.c.number))
        of_step: dict[str, list[Json]] = {}
        for entry in tries:
            of_step.setdefault(entry["agent"], []).append(entry)
        of_step_alone = (column for column in steps.c if column.name not in _OF_THE_ENGINE)
        rows = self._rows(select(*of_step_alone).where(steps.c.run_id == run_id))
        rows.sort(key=lambda row: (order[row["agent"]], row["item"]))
        run["steps"] = [{**row, "tries": of_step.get(row["agent"], [])} for row in rows]
        run["totals"] = _totals(tries)
        run["approvals"] = self.approval_list(run_id)
        waits = run["state"] == RunState.PENDING and run["concurrency_key"] is not None
        run["blocked_by"] = self._under_way(run) if waits else None
        return run

    def _under_way(self, run: "Json") -> str | None:
        """The run of a run's concurrency key that is under way; None where it is that run."""
        key = (run[name] for name in ("tenant", "pipeline", "concurrency_key"))
        (found,) = self._rows(select(func.stepfast.run_under_way(*key, type_=Uuid).label("id")))
        return None if found["id"] == run["id"] else found["id"]

    def now(self) -> datetime:
        """The database's time, in which everything is recorded."""
        (found,) = self._rows(select(func.stepfast.now().label("now")))
        return datetime.fromisoformat(found["now"])

    def effect_list(self, run_id: UUID) -> "list[Json]":
        """What a run's handlers did by `ctx.once`: agent, generation, key, state (begun or happened), in that order."""
        query = select(effects).where(effects.c.run_id == run_id)
        return self._rows(query.order_by(effects.c.agent, effects.c.generation, effects.c.key).limit(LIST_MAX))

    def event_seq(self, run_id: UUID) -> int | None:
        """The number of a run's last event, which tells whether anything happened; None where there is no such run."""
        found = self._rows(select(runs.c.event_seq).where(runs.c.id == run_id))
        return int(found[0]["event_seq"]) if found else None

    def event_list(self, run_id: UUID, after_seq: int = 0) -> "list[Json]":
        """A run's events after a sequence number, oldest first."""
        query = select(events).where(events.c.run_id == run_id, events.c.seq > after_seq)
        return self._rows(query.order_by(events.c.seq).limit(EVENTS_MAX))

    def dead_letter_list(
        self,
        *,
        include_resolved: bool = False,
        limit: int = 50,
        fingerprint: str | None = None,
        before: UUID | None = None,
    ) -> "list[Json]":
        """Dead letters, newest first; those of one error, and below dead letter `before`, where given.

        Keys: id, run_id, agent, code, error_fingerprint, created_at, resolved_at, resolution, payload.
        """
        query = _newest_first(dead_letters, before).limit(min(limit, LIST_MAX))
        if not include_resolved:
            query = query.where(dead_letters.c.resolved_at.is_(None))
        if fingerprint:
            query = query.where(dead_letters.c.error_fingerprint == fingerprint)
        return self._rows(query)

    def dead_letter_groups(self, *, limit: int = 50) -> "list[Json]":
        """Open dead letters by what went wrong, the most recent first.

        Keys: error_fingerprint, count, oldest, newest (times), and of the newest letter example (its id), run_id,
        agent, code, payload.
        """
        newest_first = aggregate_order_by(dead_letters.c.id, dead_letters.c.created_at.desc())
        group = (
            select(
                dead_letters.c.error_fingerprint,
                func.count().label("count"),
                func.min(dead_letters.c.created_at).label("oldest"),
                func.max(dead_letters.c.created_at).label("newest"),
                func.array_agg(newest_first)[1].label("example"),
            )
            .where(dead_letters.c.resolved_at.is_(None))
            .group_by(dead_letters.c.error_fingerprint)
            .order_by(func.max(dead_letters.c.created_at).desc())
            .limit(min(limit, LIST_MAX))
            .subquery()
        )
        example = (dead_letters.c[name] for name in ("run_id", "agent", "code", "payload"))
        query = select(group, *example).join(dead_letters, dead_letters.c.id == group.c.example)
        return self._rows(query.order_by(group.c.newest.desc()))

    def dead_letter(self, letter_id: UUID) -> "Json":
        """One dead letter. Raises UnknownName."""
        found = self._rows(select(dead_letters).where(dead_letters.c.id == letter_id))
        if not found:
            raise UnknownName(f"There is no dead letter {letter_id}.", next_step="List them: stepfast dead list")
        return found[0]


def _newest_first(table: "Table", before: UUID | None) -> "Select[Any]":
    """Rows by their creation. A page begins below the last row of the page before, so that new rows move none."""
    query = select(table).order_by(table.c.created_at.desc(), table.c.id.desc())
    if before is None:
        return query
    last = select(table.c.created_at, table.c.id).where(table.c.id == before).subquery()
    return query.where(tuple_(table.c.created_at, table.c.id) < select(last).scalar_subquery())


def _totals(tries: "list[Json]") -> "Json":
    paid = [entry for entry in tries if entry["usage"]]
    priced = [entry["cost_usd"] for entry in paid if entry["cost_usd"] is not None]
    return {
        "calls": len(paid),
        "cost_usd": round(sum(priced), 6) if len(priced) == len(paid) else None,
        "input_tokens": sum(entry["usage"].get("input_tokens", 0) for entry in paid),
        "output_tokens": sum(entry["usage"].get("output_tokens", 0) for entry in paid),
    }


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="milliseconds")
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, Decimal):
        return float(value)
    return value
