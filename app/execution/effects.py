"""The record behind `ctx.once`, kept through an outage of Postgres."""

from typing import TYPE_CHECKING

from app.agents.work import Effect, EffectState
from app.errors import StaleClaim
from app.execution.persistence import OUTAGE_MAX_S, through_outage

if TYPE_CHECKING:
    from uuid import UUID

    from app.pipelines.model import Json
    from app.runs.store import StepKey, Store


class RecordedEffects:
    """`ctx.once`'s record, guarded by the attempt."""

    def __init__(self, store: "Store", step: "StepKey", attempt_id: "UUID") -> None:
        self._store, self._step, self._attempt_id = store, step, attempt_id

    def begin(self, key: str) -> Effect:
        step, attempt_id = self._step, self._attempt_id
        answer = through_outage(lambda: self._store.begin_effect(step, attempt_id, key), max_s=OUTAGE_MAX_S)
        self._fence(answer)
        return Effect(EffectState(answer["state"]), answer.get("output"))

    def finish(self, key: str, output: "Json") -> None:
        self._end(key, output)

    def forget(self, key: str) -> None:
        self._end(key, None)

    def _end(self, key: str, output: "Json | None") -> None:
        step, attempt_id = self._step, self._attempt_id
        self._fence(through_outage(lambda: self._store.end_effect(step, attempt_id, key, output), max_s=OUTAGE_MAX_S))

    def _fence(self, answer: "Json") -> None:
        if answer["state"] == "stale":
            raise StaleClaim("This attempt was fenced.")
