"""Named places before and after every commit and every send, at which a crash test ends a process.

Silent unless STEPFAST_CRASH_POINTS names a folder. In it a file `POINT:AGENT` arms a point, for the first process that
reaches it for that agent. That process removes the file, which only one can, and kills itself by SIGKILL; or, where the
file begins with STOP, it stops until somebody continues it. So a point strikes once, and whoever takes over lives. A
run's id behind that word holds a point to that run where it is reached with a message, which may be an old one.

Which process: with the pools `threads` and `solo` the whole worker. With `prefork` the child that executes, while its
parent lives; but the parent at the points of `ack` and `sweep`, and where a sweep sends. At the points of `enqueue` and
`approve` whatever process starts or approves: a command, or the application.
"""

import difflib
import os
import signal
import threading
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from app.errors import NotReady

NOTES = "notes"
# Beyond this nothing more is noted: a crash test empties the file before each of its cells.
NOTES_MAX_BYTES = 10_000_000
ORDER_MAX_BYTES = 100


class CrashPoint(Enum):
    """A point's name, and where it is."""

    def __init__(self, label: str, where: str) -> None:
        self.label = label
        self.where = where

    ENQUEUE_BEFORE = ("enqueue.before", "a run is about to be started, and nothing is written")
    ENQUEUE_AFTER = ("enqueue.after", "the run is committed, and nothing of it is sent")
    TAKE_AFTER = ("take.after", "the step is marked as sent, and its message is not sent")
    SEND_BEFORE = ("send.before", "the step's message is about to be given to the broker")
    SEND_AFTER = ("send.after", "the broker has the step's message")
    CLAIM_BEFORE = ("claim.before", "the message was taken, and nothing is written")
    CLAIM_AFTER = ("claim.after", "the claim is committed, and nothing is done yet")
    GATE_AFTER = ("gate.after", "the gate held")
    SUSPEND_BEFORE = ("suspend.before", "a person must approve, and nothing is written of it")
    SUSPEND_AFTER = ("suspend.after", "the request for approval is committed")
    APPROVE_BEFORE = ("approve.before", "a person approves, and nothing is written of it")
    APPROVE_AFTER = ("approve.after", "the approval is committed, and nothing is sent")
    CALL_BEFORE = ("call.before", "the model or the handler is about to be called")
    CALL_SENT = ("call.sent", "the request is sent to the model, and its answer is not here")
    CALL_AFTER = ("call.after", "the answer is received and checked")
    EFFECT_BEFORE = ("effect.before", "ctx.once was called, and nothing is written of it")
    EFFECT_BEGUN = ("effect.begun", "the effect is recorded as begun, and not done")
    EFFECT_DONE = ("effect.done", "the effect is done, and not recorded")
    EFFECT_AFTER = ("effect.after", "the effect is recorded as happened")
    CHECK_BEFORE = ("check.before", "an earlier attempt began the effect, and nobody has looked whether it happened")
    CHECK_AFTER = ("check.after", "it was looked whether the effect happened, and nothing is written of it")
    COMPLETE_BEFORE = ("complete.before", "the output is about to be committed")
    COMPLETE_AFTER = ("complete.after", "the output is committed, and what it made available is not sent")
    FAIL_BEFORE = ("fail.before", "the attempt's failure is about to be committed")
    FAIL_AFTER = ("fail.after", "the attempt's failure is committed")
    ACK_BEFORE = ("ack.before", "everything is sent, and the message is not acknowledged")
    ACK_AFTER = ("ack.after", "the message is acknowledged")
    DEAD_LETTER_BEFORE = ("dead_letter.before", "the dead letter is committed, and not sent")
    DEAD_LETTER_SENT = ("dead_letter.sent", "the dead letter is sent, and not marked as sent")
    DEAD_LETTER_AFTER = ("dead_letter.after", "the dead letter is marked as sent")
    SWEEP_BEFORE = ("sweep.before", "a sweep begins")
    SWEEP_AFTER = ("sweep.after", "the step is taken back from a dead worker, and is not sent")


BY_LABEL = {point.label: point for point in CrashPoint}
# Where no agent is concerned.
NO_AGENT = "-"


@dataclass(frozen=True, slots=True)
class Note:
    """A process reached a point for an agent, `at_s` in Unix time; `struck`: it was armed, and the process ended."""

    struck: bool
    point: CrashPoint
    agent: str
    pid: int
    at_s: float


_folder: Path | None = None


def use(folder: Path | None) -> None:
    """Obeys this folder from now on, in this process and in what it forks; None is silence."""
    global _folder  # noqa: PLW0603  # one a process, as the environment is
    _folder = folder


def is_used() -> bool:
    """Whether this process notes the points that it reaches, and obeys their orders."""
    return _folder is not None


def reach(point: CrashPoint, agent: str = NO_AGENT, run: str = "") -> None:
    """Says that this process has come to a point. Nothing happens unless a crash test is under way."""
    if _folder is not None:
        _obey(_folder, point, agent, run)


def _obey(folder: Path, point: CrashPoint, agent: str, run: str) -> None:
    order = folder / f"{point.label}:{agent}"
    try:
        with order.open() as file:
            word, _, of_run = file.read(ORDER_MAX_BYTES).strip().partition(" ")
        meant = not (of_run and run) or of_run == run
        if meant:
            order.unlink()  # only one process can
    except FileNotFoundError:
        meant = False
    _note(folder, Note(struck=meant, point=point, agent=agent, pid=os.getpid(), at_s=time.time()))
    if meant:
        # To this thread: a stop that another one takes would let this one run on for a moment, past the point.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP if word == "STOP" else signal.SIGKILL)


def _note(folder: Path, note: Note) -> None:
    line = f"{int(note.struck)} {note.point.label} {note.agent} {note.pid} {note.at_s:.3f}\n"
    descriptor = os.open(folder / NOTES, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(descriptor).st_size < NOTES_MAX_BYTES:
            os.write(descriptor, line.encode())  # one write: lines of several processes do not mix
    finally:
        os.close(descriptor)


def notes(folder: Path) -> list[Note]:
    """What was noted in a folder, oldest first."""
    try:
        lines = (folder / NOTES).read_text().splitlines()
    except FileNotFoundError:
        return []
    fields = (line.split() for line in lines)
    return [
        Note(struck == "1", BY_LABEL[label], agent, int(pid), float(at_s)) for struck, label, agent, pid, at_s in fields
    ]


def arm(folder: Path, point: CrashPoint, agent: str = NO_AGENT, run: str = "", *, stops: bool = False) -> None:
    """Has the first process that reaches the point for the agent killed; or stopped, until it gets SIGCONT."""
    partial = folder / f".{point.label}:{agent}"
    partial.write_text(f"{'STOP' if stops else 'KILL'} {run}")
    partial.rename(folder / f"{point.label}:{agent}")  # an order is seen whole, or not at all


def checked(text: str) -> Path:
    """The folder that the variable names. Raises NotReady where others may write to it, or for a name of no point."""
    folder = Path(text).resolve()
    try:
        status = folder.stat()
        entries = [entry.name for entry in folder.iterdir()]
    except OSError as error:
        raise NotReady(
            f"STEPFAST_CRASH_POINTS names {text}, which cannot be read: {error.strerror}.",
            next_step="Unset it: it is for crash tests only.",
        ) from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise NotReady(
            f"STEPFAST_CRASH_POINTS names {text}, where others may write.",
            next_step="Unset it, or name a folder that only you can write to.",
        )
    for entry in entries:
        label = entry.partition(":")[0]
        if ":" in entry and not entry.startswith(".") and label not in BY_LABEL:
            near = difflib.get_close_matches(label, BY_LABEL, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(BY_LABEL)}."
            raise NotReady(f"STEPFAST_CRASH_POINTS has {entry!r}, and there is no such point.", next_step=hint)
    return folder
