"""The Procfile's processes: started together, started again when one ends, stopped so that nothing is left behind.

A thread of its own does all three, so that no Ctrl-C falls between the start of a process and our knowing of it. Each
process leads a session of its own, which no Ctrl-C reaches either: we stop it, in our order.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from app.errors import NotReady
from app.settings import ROOT

READY_TIMEOUT_S = 60.0
# A worker that is told to stop finishes what it executes, or gives it away, within STEPFAST_SHUTDOWN_S.
STOP_TIMEOUT_S = 10.0
WATCH_S = 0.05
# A process that ends is started again after 1 s, then 2 s, …; one that lived for a minute begins at 1 s again.
RESTART_MIN_S = 1.0
RESTART_MAX_S = 30.0
STABLE_S = 60.0
RAISE_AGAIN_S = 0.05
LOG_TAIL_MAX_BYTES = 2_000
_FOLLOWER = ROOT / "app" / "with_parent.py"


def procfile(path: Path = ROOT / "Procfile") -> dict[str, str]:
    """The commands by name. Lines without `name: command` are comments."""
    lines = re.findall(r"^([A-Za-z0-9_-]+):[ \t]*(\S.*)$", path.read_text(), re.MULTILINE)
    return {name: command.rstrip() for name, command in lines}


class OrderlyExit(ExitStack):
    """An exit stack that no signal interrupts: the first Ctrl-C, TERM or HUP raises, and later ones set `hurry`.

    While it unwinds, none raises. Only the main thread may use it, and not inside another one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hurry = False  # no Event: a handler may be interrupted by itself, while it holds the Event's lock
        self._ending = False
        self._held = False
        self._due: BaseException | None = None
        self._handlers: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}
        self._unraisablehook = sys.unraisablehook

    def __enter__(self) -> Self:
        sys.unraisablehook = self._raise_again
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            handler = signal.getsignal(number)
            if handler != signal.SIG_IGN:  # as nohup and a shell's `&` ask
                self._handlers[number] = handler
                signal.signal(number, self._handle)
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._ending = True
        try:
            return bool(super().__exit__(kind, error, trace))
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            sys.unraisablehook = self._unraisablehook

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is inside is done whole; what would have interrupted it is raised after."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._due:
            raise self._due

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._ending:
            self.hurry = True
            return
        self._ending = True
        if number != signal.SIGALRM or self._due is None:
            self._due = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
        if not self._held:
            raise self._due

    def _raise_again(self, lost: "sys.UnraisableHookArgs") -> None:
        """Python drops what is raised inside a destructor. A moment later it is raised once more, elsewhere."""
        if lost.exc_value is None or lost.exc_value is not self._due:
            self._unraisablehook(lost)
            return
        self._ending = False
        signal.setitimer(signal.ITIMER_REAL, RAISE_AGAIN_S)


@dataclass(slots=True)
class _Process:
    name: str
    command: str
    log: Path
    running: subprocess.Popen[bytes] | None = None
    started_s: float = 0.0
    pause_s: float = RESTART_MIN_S
    restart_s: float = 0.0  # when, in monotonic time
    trouble: str = ""  # why it could not even be started

    def start(self, environ: Mapping[str, str]) -> None:
        follow = (sys.executable, "-I", "-S", str(_FOLLOWER), str(os.getpid()))
        self.trouble, self.started_s = "", time.monotonic()
        try:
            with self.log.open("ab") as log:
                self.running = subprocess.Popen(  # noqa: S603  # the Procfile's own command
                    # `exec`, so that the process that we know and signal is the service itself.
                    [*follow, "/bin/sh", "-c", f"exec {self.command}"],
                    cwd=ROOT,  # where `-A app` finds our app, and not another app.py
                    env=dict(environ),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            self.trouble = f"cannot be started: {error}"

    def ended(self) -> str:
        """In words, how it ended; empty while it runs."""
        code = self.running.poll() if self.running else None
        if code is None:
            return self.trouble
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def kill(self) -> None:
        """It, and whatever it left in its process group."""
        if self.running:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.running.pid, signal.SIGKILL)
            self.running.wait()
        self.running, self.trouble = None, ""

    def log_tail(self) -> str:
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_MAX_BYTES))
            return log.read().decode(errors="replace").strip()


class Processes:
    """Runs commands as long as the `with` block lasts.

    Each has a log in the folder `logs`, which begins anew here and keeps one old one. `say` gets a sentence, from
    another thread, when one ended and is started again. The end waits for nothing once `hurry()` is true.
    """

    def __init__(
        self,
        commands: Mapping[str, str],
        environ: Mapping[str, str],
        logs: Path,
        say: Callable[[str], None],
        hurry: Callable[[], bool],
    ) -> None:
        self._processes = [_Process(name, command, logs / f"{name}.log") for name, command in commands.items()]
        self._environ = dict(environ)
        self._say = say
        self._hurry = hurry
        self._stopping = threading.Event()
        self._all_ready = False
        self._thread = threading.Thread(target=self._run, name="processes")
        logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        for process in self._processes:
            if process.log.exists():
                process.log.replace(process.log.with_suffix(".log.old"))
            process.log.touch(mode=0o600)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def wait_ready(self, is_ready: Callable[[str, int], bool]) -> None:
        """Until `is_ready(name, pid)` was once true of each. Raises NotReady where one ends first or takes too long."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        waiting = list(self._processes)
        while waiting:
            for process in tuple(waiting):
                if ended := process.ended():
                    raise _not_ready(process, ended)
                if process.running and is_ready(process.name, process.running.pid):
                    waiting.remove(process)
            if waiting and time.monotonic() > deadline:
                raise _not_ready(waiting[0], f"was not ready after {READY_TIMEOUT_S:.0f} s")
            time.sleep(WATCH_S)
        self._all_ready = True

    def _run(self) -> None:
        try:
            for process in self._processes:
                process.start(self._environ)
            while not self._stopping.wait(WATCH_S):
                for process in self._processes:
                    self._look_after(process)
        finally:
            self._stop()

    def _look_after(self, process: _Process) -> None:
        ended, now_s = process.ended(), time.monotonic()
        if ended and self._all_ready:
            if now_s - process.started_s > STABLE_S:
                process.pause_s = RESTART_MIN_S
            process.kill()
            process.restart_s = now_s + process.pause_s
            self._say(f"{process.name} {ended}, and starts again in {process.pause_s:.0f} s. See {process.log}.")
            process.pause_s = min(RESTART_MAX_S, process.pause_s * 2)
        elif process.running is None and now_s >= process.restart_s:
            process.start(self._environ)

    def _stop(self) -> None:
        children = [process.running for process in self._processes if process.running]
        for child in children:
            child.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while any(child.poll() is None for child in children) and time.monotonic() < deadline and not self._hurry():
            time.sleep(WATCH_S)
        for process in self._processes:
            process.kill()


def _not_ready(process: _Process, what: str) -> NotReady:
    return NotReady(
        f"{process.name} {what}; the end of its log:\n{process.log_tail()}\n",
        next_step=f"Mend what the log names, {process.log}.",
    )
