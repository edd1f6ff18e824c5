"""What is done to a run: one cell of the matrix each."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from random import Random

from app.crashpoints import NO_AGENT, CrashPoint
from app.pipelines.model import Pipeline

# Dying here, a worker takes a call with it whose answer is not committed: it is made, and paid for, again.
REPEATS_A_CALL = frozenset(
    {CrashPoint.CALL_SENT, CrashPoint.CALL_AFTER, CrashPoint.COMPLETE_BEFORE, CrashPoint.FAIL_BEFORE}
)
# Dying here, nobody knows whether the effect in ctx.once happened, unless a check can tell.
EFFECT_IS_OPEN = frozenset(
    {CrashPoint.EFFECT_BEGUN, CrashPoint.EFFECT_DONE, CrashPoint.CHECK_BEFORE, CrashPoint.CHECK_AFTER}
)


class Answers(StrEnum):
    """How the model of a cell's agent answers."""

    GOOD = "good"
    FAILS_ONCE = "fails once"  # overloaded at its first call
    FAILS = "fails"  # refused for good; once its dead letter is there, the cause is mended and the run resumed


class Fault(StrEnum):
    """What happens around a worker that is stopped with an answer in its hands, or to messages."""

    MESSAGE_DOUBLED = "message.doubled"  # each message is sent again, while its step executes and after its commit
    WORKER_FROZEN = "worker.frozen"  # SIGSTOP until the run has ended without it, then SIGCONT
    NETWORK_DROPPED = "network.dropped"  # its connections to Postgres are reset
    NETWORK_CUT = "network.cut"  # it does not reach Postgres until the run has ended without it
    BROKER_WIPED = "broker.wiped"  # the run's first message is lost, and here all that there are
    BROKER_RESTARTED = "broker.restarted"
    POSTGRES_FAST = "postgres.restarted.fast"
    POSTGRES_IMMEDIATE = "postgres.restarted.immediate"


OF_NETWORKS = frozenset({Fault.NETWORK_DROPPED, Fault.NETWORK_CUT})
# Those that need all lanes' servers, or workers of their own: they come last, one at a time.
ALONE = OF_NETWORKS | {Fault.BROKER_WIPED, Fault.BROKER_RESTARTED, Fault.POSTGRES_FAST, Fault.POSTGRES_IMMEDIATE}
# The worker is away for so long that others take its step.
TAKES_AWAY = frozenset({Fault.WORKER_FROZEN, Fault.NETWORK_CUT})


@dataclass(frozen=True, slots=True)
class Cell:
    """`strikes` are armed together, for `agent`: the last is what the cell is about, those before lead to it."""

    name: str
    agent: str = NO_AGENT
    strikes: tuple[CrashPoint, ...] = ()
    answers: Answers = Answers.GOOD
    fault: Fault | None = None

    @property
    def alone(self) -> bool:
        """Whether no other cell may run beside it."""
        return self.fault in ALONE


UNDISTURBED = Cell("undisturbed")


def every(
    pipeline: Pipeline, reached: Iterable[tuple[CrashPoint, str]], repeatable: frozenset[str], seed: int
) -> list[Cell]:
    """All cells of a pipeline: its undisturbed run has `reached` these points, and these agents are `repeatable`.

    `seed` draws the agent at which a fault of servers or networks strikes.
    """
    seen = frozenset(reached)
    cells = [_killed(CrashPoint.ENQUEUE_BEFORE), _killed(CrashPoint.ENQUEUE_AFTER)]
    if (CrashPoint.SWEEP_BEFORE, NO_AGENT) in seen:
        cells.append(_killed(CrashPoint.SWEEP_BEFORE))
    for agent in pipeline.agents:
        cells += [_killed(point, agent.id) for point in CrashPoint if (point, agent.id) in seen]
        # What is reached only after another death.
        later = [CrashPoint.SWEEP_AFTER]
        if agent.id in repeatable:
            later += [CrashPoint.TAKE_AFTER] if (CrashPoint.TAKE_AFTER, agent.id) not in seen else []
            if (CrashPoint.EFFECT_DONE, agent.id) in seen:
                dead = CrashPoint.EFFECT_DONE
                cells += [_killed(point, agent.id, dead) for point in (CrashPoint.CHECK_BEFORE, CrashPoint.CHECK_AFTER)]
        cells += [_killed(point, agent.id, CrashPoint.CLAIM_AFTER) for point in later]
        if agent.requires_human_approval:
            cells += [_killed(point, agent.id) for point in (CrashPoint.APPROVE_BEFORE, CrashPoint.APPROVE_AFTER)]
        if agent.model:
            cells += [_failing(point, agent.id, Answers.FAILS_ONCE) for point in _OF_FAILURE]
            cells += [_failing(point, agent.id, Answers.FAILS) for point in _OF_DEAD_LETTER]
    return cells + list(_faults(pipeline, seed))


_OF_FAILURE = (CrashPoint.FAIL_BEFORE, CrashPoint.FAIL_AFTER)
_OF_DEAD_LETTER = (CrashPoint.DEAD_LETTER_BEFORE, CrashPoint.DEAD_LETTER_SENT, CrashPoint.DEAD_LETTER_AFTER)


def _killed(point: CrashPoint, agent: str = NO_AGENT, *before: CrashPoint) -> Cell:
    name = point.label if agent == NO_AGENT else f"{point.label}:{agent}"
    return Cell(name, agent, (*before, point))


def _failing(point: CrashPoint, agent: str, answers: Answers) -> Cell:
    return Cell(f"{point.label}:{agent}", agent, (point,), answers)


def _faults(pipeline: Pipeline, seed: int) -> Iterable[Cell]:
    yield Cell(Fault.MESSAGE_DOUBLED, fault=Fault.MESSAGE_DOUBLED)
    stopped = (CrashPoint.COMPLETE_BEFORE,)
    for agent in pipeline.agents:
        yield Cell(f"{Fault.WORKER_FROZEN}:{agent.id}", agent.id, stopped, fault=Fault.WORKER_FROZEN)
    draw = Random(seed)  # noqa: S311  # reproducible on purpose
    for fault in (fault for fault in Fault if fault in ALONE):
        drawn = draw.choice(pipeline.agents).id
        yield Cell(f"{fault}:{drawn}", drawn, stopped, fault=fault)


def chosen(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells whose name matches one of the patterns, as a shell would; all where there is none."""
    return [cell for cell in cells if not patterns or any(fnmatchcase(cell.name, pattern) for pattern in patterns)]


def not_reached(cells: Sequence[Cell]) -> list[CrashPoint]:
    """The points that no cell is about: this pipeline never comes to them."""
    return [point for point in CrashPoint if all(point not in cell.strikes for cell in cells)]
