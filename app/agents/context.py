"""What a Python handler gets: the run, the outputs before it, a logger, and `once` for its effects."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from uuid import UUID

from app import events
from app.agents.outputs import check_object
from app.agents.work import Effects, EffectState, Work
from app.crashpoints import CrashPoint, reach
from app.errors import AuthorMistake, OutcomeUnknown
from app.events import Event
from app.pipelines.model import Json
from app.pipelines.yaml_source import unstorable

if TYPE_CHECKING:
    from app.agents.handlers import Function

KEY_MAX_CHARS = 200
EFFECT_MAX_BYTES = 1_000_000
OBSERVED_MAX_BYTES = 1_000
OBSERVED_MAX_COUNT = 20


@dataclass(frozen=True, slots=True)
class Happened:
    """A check found the effect in the outside world, with the output that it would have returned."""

    output: Json


@dataclass(frozen=True, slots=True)
class NotHappened:
    """A check found that the effect did not happen: it may be done."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """A check could not tell. The step ends as `outcome_unknown`, for a person."""


Check = Callable[[], Happened | NotHappened | Unknown]


@dataclass(frozen=True, slots=True)
class RunInfo:
    """Which attempt this is. `number` counts the step's attempts from 1; `generation` its deliberate repetitions."""

    id: UUID
    pipeline: str
    agent: str
    generation: int
    number: int
    input: Json


class Log:
    """Writes lines that carry the run, agent and attempt."""

    def info(self, message: str, /, **fields: object) -> None:
        self._write("info", message, fields)

    def warning(self, message: str, /, **fields: object) -> None:
        self._write("warning", message, fields)

    def error(self, message: str, /, **fields: object) -> None:
        self._write("error", message, fields)

    def _write(self, level: str, message: str, fields: dict[str, object]) -> None:
        events.emit(Event.HANDLER_LOG, **{**fields, "level": level, "message": message})


class Context:
    """The one argument of a handler."""

    def __init__(self, work: Work, effects: Effects, has_probe: Callable[[str], bool] | None = None) -> None:
        self._work = work
        self._effects = effects
        self._has_probe = has_probe
        self.seen: dict[str, Json] = {}
        self._pid = os.getpid()
        self.run = RunInfo(work.run_id, work.pipeline, work.agent.id, work.generation, work.number, work.input)
        # The recorded outputs of every agent that this one depends on, directly or not, by agent id.
        self.inputs: dict[str, Json] = work.outputs
        # What a later gate read when it sent this agent back to work; None at first.
        self.feedback = work.feedback
        self.log = Log()

    def remaining_s(self) -> float:
        """Seconds until the agent's `timeout_ms` has passed."""
        return self._work.deadline.remaining_s()

    def observed(self, name: str, value: object, *, probe: str) -> None:
        """Records, with this agent's output, what it saw of the world: a JSON value of at most OBSERVED_MAX_BYTES.

        `probe` names a function beside this one, which is given a context, too, and returns what it sees now. Agents
        that depend strongly on this one look again by it before they execute; where it sees something else, this agent
        is done again. The last value of a name counts.
        """
        if not isinstance(name, str) or not 0 < len(name) <= KEY_MAX_CHARS or unstorable(name) is not None:
            raise AuthorMistake(f"The name of ctx.observed must be a text of 1 to {KEY_MAX_CHARS} characters.")
        if self._has_probe and not self._has_probe(probe):
            raise AuthorMistake(f"ctx.observed({name!r}) names the probe {probe!r}, which is no function beside it.")
        checked = check_object({"value": value}, f"What ctx.observed({name!r}) is given", OBSERVED_MAX_BYTES)
        self.seen[name] = {"name": name, **checked, "probe": probe}
        if len(self.seen) > OBSERVED_MAX_COUNT:
            raise AuthorMistake(f"ctx.observed takes at most {OBSERVED_MAX_COUNT} names.")

    def once(self, key: str, fn: Callable[[], Json], *, check: Check | None = None) -> Json:
        """Does an effect once in this generation, however often the step is attempted, and returns its output.

        Recorded as begun before `fn` is called and as happened after it. Where an earlier attempt began it and did not
        record its end (it died, `fn` raised, or a new generation began meanwhile), `check` looks in the outside world
        first: Happened(output) is taken, NotHappened does it, Unknown raises OutcomeUnknown, and so does the lack of a
        `check`.

        `fn` returns a JSON object of at most EFFECT_MAX_BYTES; what cannot be recorded raises InvalidOutput, and the
        effect stays begun. Not for a process that the handler forked.
        """
        if not isinstance(key, str) or not 0 < len(key) <= KEY_MAX_CHARS or unstorable(key) is not None:
            raise AuthorMistake(f"The key of ctx.once must be a text of 1 to {KEY_MAX_CHARS} characters, without NUL.")
        if os.getpid() != self._pid:
            raise AuthorMistake(
                "ctx.once was called in a process that the handler forked: call it in the handler's own."
            )
        agent = self._work.agent.id
        reach(CrashPoint.EFFECT_BEFORE, agent)
        begun = self._effects.begin(key)
        if begun.state is EffectState.HAPPENED:
            assert begun.output is not None
            return begun.output
        if begun.state is EffectState.UNKNOWN:
            reach(CrashPoint.CHECK_BEFORE, agent)
            found = check() if check else Unknown()
            reach(CrashPoint.CHECK_AFTER, agent)
            match found:
                case Happened(output):
                    return self._finish(key, output)
                case NotHappened():
                    # The record still says begun, which is what it must say while `fn` runs.
                    pass
                case _:
                    raise OutcomeUnknown(
                        f"An earlier attempt began {key!r}, and nobody knows whether it happened.",
                        next_step=ways_out(self._work),
                        details={"key": key},
                    )
        reach(CrashPoint.EFFECT_BEGUN, agent)
        done = fn()
        reach(CrashPoint.EFFECT_DONE, agent)
        return self._finish(key, done)

    def _finish(self, key: str, output: object) -> Json:
        checked = check_object(output, f"The output of ctx.once({key!r})", EFFECT_MAX_BYTES)
        self._effects.finish(key, checked)
        reach(CrashPoint.EFFECT_AFTER, self._work.agent.id)
        return checked


def ways_out(work: Work) -> str:
    return (
        f"Look whether it happened. If it did: stepfast override {work.run_id} {work.agent.id} --output FILE. "
        f"If not: stepfast resume {work.run_id} --from {work.agent.id}."
    )


def effects_once(function: "Function") -> "Function":
    """Declares that all effects of a handler stand in `ctx.once`, so that a worker's death under it is no riddle."""
    function.effects_once = True  # type: ignore[attr-defined]
    return function
