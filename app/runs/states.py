"""The states of steps and runs, and the one table of transitions between them.

The same table is enforced by a trigger in the database (a test compares the two), and drawn in ARCHITECTURE.md (a test
keeps the picture true). A verb is what somebody does to a step or a run; the store has one function for each that is
built.
"""

from dataclasses import dataclass
from enum import StrEnum


class StepState(StrEnum):
    PENDING = "pending"  # waits for its dependencies, or for a halted run to be resumed
    AVAILABLE = "available"  # may be claimed; its message is sent or about to be
    EXECUTING = "executing"  # an attempt holds its claim
    RETRYABLE = "retryable"  # waits for scheduled_at: a retry, a deferral, a reserved key
    SUSPENDED = "suspended"  # waits for a person
    COMPLETED = "completed"  # its output is committed
    SKIPPED = "skipped"  # something it depends on was discarded
    DISCARDED = "discarded"  # given up; its dead letter says why
    CANCELLED = "cancelled"


class RunState(StrEnum):
    PENDING = "pending"  # nothing has started yet; or resumed, and waits for its turn of its concurrency key
    RUNNING = "running"
    SUSPENDED = "suspended"  # nothing runs, and a person is waited for
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class AttemptState(StrEnum):
    EXECUTING = "executing"
    COMPLETED = "completed"
    FAILED = "failed"
    LOST = "lost"  # its worker died, froze or overstayed, or its step was taken back; its later writes are refused
    SUSPENDED = "suspended"  # it found that a person must approve first


@dataclass(frozen=True, slots=True, order=True)
class Transition:
    before: str
    verb: str
    after: str


def _table(text: str) -> tuple[Transition, ...]:
    rows = (line.split() for line in text.strip().splitlines())
    return tuple(Transition(before, verb, after) for befores, verb, after in rows for before in befores.split(","))


STEP_TRANSITIONS = _table("""
    pending                                         release     available
    available                                       claim       executing
    available                                       defer       retryable
    retryable                                       release     available
    executing                                       complete    completed
    executing                                       retry       retryable
    executing,available,retryable,suspended         discard     discarded
    executing                                       rescue      available
    executing                                       suspend     suspended
    suspended                                       approve     available
    suspended                                       reject      cancelled
    available,executing,retryable,suspended         halt        pending
    pending                                         skip        skipped
    discarded,cancelled                             resume      available
    discarded,cancelled,skipped,completed           resume      pending
    discarded,suspended,cancelled,skipped           override    completed
    pending,available,executing,retryable,suspended cancel      cancelled
""")

RUN_TRANSITIONS = _table("""
    pending                   start    running
    running                   complete completed
    running                   fail     failed
    pending                   fail     failed
    running                   suspend  suspended
    running                   queue    pending
    suspended                 approve  running
    suspended                 fail     failed
    suspended                 complete completed
    failed,cancelled,completed resume  running
    pending,running,suspended cancel   cancelled
""")

# A step in one of these has an `ended_at`; a run in one of these, too.
STEP_ENDED = frozenset({StepState.COMPLETED, StepState.SKIPPED, StepState.DISCARDED, StepState.CANCELLED})
RUN_ENDED = frozenset({RunState.COMPLETED, RunState.FAILED, RunState.CANCELLED})


def diagram(transitions: tuple[Transition, ...]) -> str:
    """The transitions as a Mermaid state diagram, as ARCHITECTURE.md shows them."""
    lines = [f"    {row.before} --> {row.after}: {row.verb}" for row in transitions]
    return "\n".join(["stateDiagram-v2", "    [*] --> pending", *lines])
