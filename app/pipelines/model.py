"""The definition of a pipeline: what a skill file says once every default is filled in.

A pipeline is immutable and named by the hash of its canonical JSON (`Pipeline.hash`), which is what is stored, what a
run pins, and what the database's functions read. The fields' defaults stand here and nowhere else.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, Self

from app.redaction import hides

Json = dict[str, Any]

DEFAULT_KEY = "{{run_id}}:{{agent}}"


class Backoff(StrEnum):
    EXPONENTIAL = "exponential"
    LINEAR = "linear"
    CONSTANT = "constant"


class FailureMode(StrEnum):
    HALT_PIPELINE = "halt_pipeline"
    SKIP_DEPENDENTS = "skip_dependents"
    CONTINUE = "continue"


class Consistency(StrEnum):
    STRONG = "strong"  # what stands there, and nothing else: where it changes, its dependent is done again
    SNAPSHOT = "snapshot"  # the last output that was committed, up to an age


class OnStale(StrEnum):
    """What becomes of an agent whose snapshot is older than it may be."""

    RERUN = "rerun"  # the dependency is done again first
    FAIL = "fail"
    ACCEPT = "accept"


class Queue(StrEnum):
    """The two queues that the Procfile serves. A skill file may name another one, served by a worker of its own."""

    AGENTS = "agents"  # waits on the network: many threads
    HANDLERS = "handlers"  # computes or touches the machine: processes


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """`max_attempts` counts failures of the agent; `max_worker_losses` counts workers that died under it.

    The delay before retry n (from 1) is `initial_ms` * 2^(n-1), * n, or * 1, at most `max_ms`, and then shortened by a
    random part of at most `jitter` (0 to 1) of itself, so that many failures at once do not come back at once.
    """

    max_attempts: int = 3
    backoff: Backoff = Backoff.EXPONENTIAL
    initial_ms: int = 1_000
    max_ms: int = 60_000
    jitter: float = 0.2
    max_worker_losses: int = 5

    def delay_ms(self, number: int) -> int:
        """The longest delay before retry `number`, from 1."""
        assert number >= 1
        match self.backoff:
            case Backoff.EXPONENTIAL:
                # The exponent is capped: 2**63 ms is beyond any max_ms.
                factor = 1 << min(number - 1, 62)
            case Backoff.LINEAR:
                factor = number
            case Backoff.CONSTANT:
                factor = 1
        return min(self.initial_ms * factor, self.max_ms)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The two parts of `prompts/<agent>.md`. Only `user` may hold variables: `{{input.x}}` and `{{agent.field}}`."""

    system: str
    user: str


@dataclass(frozen=True, slots=True)
class Dependency:
    """How an agent reads one of its dependencies. `max_staleness_ms` and `on_stale` are set in a snapshot."""

    agent: str
    consistency: Consistency = Consistency.STRONG
    max_staleness_ms: int | None = None
    on_stale: OnStale | None = None


@dataclass(frozen=True, slots=True)
class OnRefused:
    """A review loop: where the gate refuses, `rerun`, an ancestor, and all that depends on it are done again.

    At most `max_rounds` times. The agent that runs again is given what the gate read.
    """

    rerun: str
    max_rounds: int = 1


@dataclass(frozen=True, slots=True)
class Agent:
    """One agent. Exactly one of `model` and `handler` is set.

    `declared` are those of `depends_on` whose consistency the file declares; the others are strong.
    `reads` are the ancestors whose outputs the claim hands over: all of them for a handler; for a model its `inputs`
    and whatever its gate, key and prompt name. `inputs` are the agents whose outputs become the model's data:
    the one that `state_input` matched, or all direct dependencies.
    `key_inputs` are the paths whose values must be the same where the key is; none means the run's whole input.
    `key_parts` is `idempotency_key`, parsed: a list of `{"text": "…"}` and `{"path": ["coder", "field"]}`.
    """

    id: str
    model: str | None = None
    handler: str | None = None
    depends_on: tuple[str, ...] = ()
    declared: tuple[Dependency, ...] = ()
    timeout_ms: int = 60_000
    retry_policy: RetryPolicy = field(default_factory=RetryPolicy)
    failure_mode: FailureMode = FailureMode.HALT_PIPELINE
    output_schema: str | None = None
    state_input: str | None = None
    gate: str | None = None
    on_refused: OnRefused | None = None
    requires_human_approval: bool = False
    approval_timeout_ms: int | None = None
    idempotent: bool = False
    idempotency_key: str = DEFAULT_KEY
    max_tokens: int = 16_000
    effort: str | None = None
    queue: str = Queue.AGENTS
    prompt: Prompt | None = None
    schema: Json | None = None
    inputs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    key_parts: tuple[Json, ...] = ()
    key_inputs: tuple[tuple[str, ...], ...] = ()

    @property
    def snapshots(self) -> dict[str, Dependency]:
        """The dependencies that it reads as a snapshot, by agent id."""
        return {entry.agent: entry for entry in self.declared if entry.consistency is Consistency.SNAPSHOT}

    @property
    def strong(self) -> tuple[str, ...]:
        """The other dependencies: where one is done again, so is this agent."""
        return tuple(name for name in self.depends_on if name not in self.snapshots)

    @property
    def repeatable(self) -> bool:
        """Whether a second call harms nothing but the bill. A handler's function may declare it too."""
        return self.model is not None or self.idempotent


@dataclass(frozen=True, slots=True)
class Tracing:
    enabled: bool = False
    provider: str = "logs"
    log_inputs: bool = False
    log_outputs: bool = False
    sample_rate: float = 1.0  # the share of runs that the provider shows


@dataclass(frozen=True, slots=True)
class Checkpointing:
    """`enabled: false` is refused: without checkpoints nothing could be resumed."""

    enabled: bool = True
    store: str = "postgres"
    ttl_minutes: int | None = None


@dataclass(frozen=True)
class Pipeline:
    """A whole definition. `agents` stand in an order in which every dependency comes before its dependents."""

    name: str
    version: str
    agents: tuple[Agent, ...]
    description: str = ""
    tracing: Tracing = field(default_factory=Tracing)
    checkpointing: Checkpointing = field(default_factory=Checkpointing)
    input_schema: Json | None = None
    concurrency_key: str | None = None  # one run at a time for each rendered key, in order
    concurrency_parts: tuple[Json, ...] = ()  # it, parsed; names only the input
    deadline_ms: int | None = None  # of a whole run, from its start

    @cached_property
    def by_id(self) -> dict[str, Agent]:
        return {agent.id: agent for agent in self.agents}

    def hides(self, parts: tuple[Json, ...]) -> bool:
        """Whether a rendered template holds what must not be shown: what a schema or a field's name marks as secret."""
        schemas = {"input": self.input_schema, **{agent.id: agent.schema for agent in self.agents}}
        return any(hides(part["path"][1:], schemas.get(part["path"][0])) for part in parts if "path" in part)

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) of the canonical JSON."""
        return hash_json(self.as_json())

    def as_json(self) -> Json:
        """The stored form: plain JSON, every field present."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]  # tuples become lists

    @classmethod
    def from_json(cls, data: Json, known_hash: str) -> Self:
        """The inverse of `as_json`. What an older version stored lacks newer fields: they take their default.

        It keeps the hash under which it was stored: that is what its runs pin, and newer fields would change it.
        """
        fields = dict(data)
        fields["agents"] = tuple(_agent(entry) for entry in data["agents"])
        fields["tracing"] = Tracing(**data["tracing"])
        fields["checkpointing"] = Checkpointing(**data["checkpointing"])
        fields["concurrency_parts"] = tuple(data.get("concurrency_parts", ()))
        made = cls(**fields)
        made.__dict__["hash"] = known_hash  # where cached_property keeps it
        return made


def _agent(data: Json) -> Agent:
    fields = dict(data)
    for name in ("depends_on", "inputs", "reads", "key_parts"):
        fields[name] = tuple(data[name])
    fields["declared"] = tuple(_dependency(entry) for entry in data.get("declared", ()))
    fields["key_inputs"] = tuple(tuple(path) for path in data.get("key_inputs", ()))
    fields["on_refused"] = OnRefused(**data["on_refused"]) if data.get("on_refused") else None
    retry = dict(data["retry_policy"])
    retry["backoff"] = Backoff(retry["backoff"])
    fields["retry_policy"] = RetryPolicy(**retry)
    fields["failure_mode"] = FailureMode(data["failure_mode"])
    fields["prompt"] = Prompt(**data["prompt"]) if data["prompt"] else None
    return Agent(**fields)


def _dependency(data: Json) -> Dependency:
    on_stale = OnStale(data["on_stale"]) if data["on_stale"] else None
    return Dependency(data["agent"], Consistency(data["consistency"]), data["max_staleness_ms"], on_stale)


def canonical_json(value: object) -> str:
    """One spelling for equal values: sorted keys, no spaces, no NaN. Raises ValueError on NaN or infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def hash_json(value: object) -> str:
    """sha256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()
