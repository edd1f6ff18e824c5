"""Every error that Stepfast raises on purpose, as one tree. Each says who must act.

StepfastError                 one clear sentence, the next step, and the command line's exit code
├── Misuse (2)                the caller must say something else
│   ├── InvalidFile           a skill file, prompt, schema or script; carries every fault with its place
│   ├── UnknownName           no run, pipeline or agent of that name, or several
│   ├── KeyConflict           a key was used before, with another input
│   └── NotPossible           the run's or step's state does not allow it
├── NotReady (3)              the operator must start, migrate or configure something
└── AgentError                one attempt of an agent failed; it becomes a retry or a dead letter
    ├── Retryable             the same attempt may succeed later
    │   ├── Unavailable       connection errors, 408, 409, 5xx, overload
    │   ├── RateLimited       429; counts against no limit of attempts
    │   ├── TimedOut          the agent's `timeout_ms` passed
    │   ├── InvalidOutput     no JSON, or not in the schema
    │   ├── OutputCut         the model stopped at `max_tokens`
    │   ├── ProbeMissing      this worker lacks a probe; counts against no limit of attempts
    │   └── HandlerFailed     a Python handler raised, or left its process
    └── Permanent             a retry would fail again
        ├── GateRefused       the gate was evaluated and is false
        ├── StaleInput        what an earlier agent saw of the world has changed: that is done again
        ├── SnapshotTooOld    an output that it reads as a snapshot is older than the file allows
        ├── InvalidInput      the run's input is not in the pipeline's input_schema: plain SQL started it
        ├── ModelRefused      the model's stop reason is `refusal`
        ├── OutcomeUnknown    an effect may have happened; a person must look
        ├── AccountProblem    key, permission or spend limit: the operator must act
        └── AuthorMistake     the pipeline's own fault: gate, template, prompt, handler, request
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

Who = Literal["retry", "operator", "author", "person"]


class StepfastError(Exception):
    """`message` is one sentence of what is wrong; `next_step` is what to do about it (may be empty)."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.message} {self.next_step}".strip()


class Misuse(StepfastError):
    exit_code = 2


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One fault of a file. `line` and `column` count from 1; 0 where the whole file is meant.

    `rule` is the rule of the audit's checklist that it breaks, where there is one for it.
    """

    file: str
    line: int
    column: int
    message: str
    severity: Literal["error", "warning"] = "error"
    rule: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{place}: {self.severity}: {self.message}"


class InvalidFile(Misuse):
    def __init__(self, message: str, *, next_step: str = "", faults: tuple[Fault, ...] = ()) -> None:
        super().__init__(message, next_step=next_step)
        self.faults = faults


class UnknownName(Misuse):
    pass


class KeyConflict(Misuse):
    pass


class NotPossible(Misuse):
    pass


class StaleClaim(StepfastError):
    pass


class NotReady(StepfastError):
    exit_code = 3


class AgentError(StepfastError):
    """One attempt failed. `code` is stable and goes into rows, logs and dead letters; `who` must act on it.

    `usage` and `cost_usd` are filled where the failed call was paid for; `details` is JSON for the dead letter. Where
    `message` quotes what went in, `unquoted` says the same without: the file may keep values out of the logs.
    """

    code: ClassVar[str] = "agent_error"
    who: ClassVar[Who] = "retry"
    unquoted: str = ""

    def __init__(
        self,
        message: str,
        *,
        next_step: str = "",
        details: dict[str, object] | None = None,
        usage: dict[str, int] | None = None,
        cost_usd: float | None = None,
    ) -> None:
        super().__init__(message, next_step=next_step)
        self.details = details or {}
        self.usage = usage
        self.cost_usd = cost_usd


class Retryable(AgentError):
    """`retry_after_s` is the server's own wish, already capped; None leaves the delay to the retry policy."""

    code = "retryable"
    counts_as_attempt: ClassVar[bool] = True
    retry_after_s: float | None = None


class Unavailable(Retryable):
    code = "unavailable"


class RateLimited(Retryable):
    code = "rate_limited"
    counts_as_attempt = False


class TimedOut(Retryable):
    code = "timed_out"


class InvalidOutput(Retryable):
    code = "invalid_output"


class OutputCut(Retryable):
    code = "max_tokens"


class HandlerFailed(Retryable):
    code = "handler_failed"


class ProbeMissing(Retryable):
    code = "probe_missing"
    counts_as_attempt = False


class Permanent(AgentError):
    code = "permanent"
    who: ClassVar[Who] = "operator"


class GateRefused(Permanent):
    """`read` are the whole outputs of which the gate read a part: feedback for an agent that runs again."""

    code = "gate_refused"
    who = "person"
    read: dict[str, object] | None = None


class StaleInput(Permanent):
    """`agent` is who saw what has changed."""

    code = "stale_input"
    who = "person"
    agent: str


class SnapshotTooOld(Permanent):
    code = "snapshot_too_old"
    who = "person"


class InvalidInput(Permanent):
    """Fails the run whatever the agent's failure mode (`discard_step`)."""

    code = "invalid_input"


class ModelRefused(Permanent):
    code = "model_refused"
    who = "author"


class OutcomeUnknown(Permanent):
    code = "outcome_unknown"
    who = "person"


class AccountProblem(Permanent):
    code = "account_problem"


class AuthorMistake(Permanent):
    code = "author_mistake"
    who = "author"
