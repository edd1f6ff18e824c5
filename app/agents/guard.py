"""The process between us and a command that we did not write, run as `python guard.py LIFELINE_FD COMMAND…`.

It sets the limits, starts the command, passes its exit code on (128 + n for signal n, 127 where it cannot be started),
and kills the whole process group when the worker dies, also by SIGKILL. It is a script that imports next to nothing, so
that it starts in 10 ms.
"""

import _thread
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import NoReturn

# RLIMIT_DATA counts writable memory, so that runtimes which only reserve much address space (V8, Go, Java) still start.
MEMORY_MAX_BYTES = 4 << 30
FILE_MAX_BYTES = 1 << 30
OPEN_FILES_MAX_COUNT = 1024
LIMITS = (
    (resource.RLIMIT_DATA, MEMORY_MAX_BYTES),
    (resource.RLIMIT_FSIZE, FILE_MAX_BYTES),
    (resource.RLIMIT_NOFILE, OPEN_FILES_MAX_COUNT),
    (resource.RLIMIT_CORE, 0),
)


def main(lifeline: int, command: list[str]) -> NoReturn:
    for limit, wanted in LIMITS:
        hard = resource.getrlimit(limit)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):  # macOS refuses some
            resource.setrlimit(limit, (value, value))
    os.set_inheritable(lifeline, False)
    child = os.fork()
    if child == 0:
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):  # by Python, or by the worker
            signal.signal(ignored, signal.SIG_DFL)
        try:
            os.execvp(command[0], command)  # noqa: S606  # no shell is what we want
        except OSError as error:
            os.write(2, f"{command[0]}: {error.strerror}\n".encode())
        os._exit(127)
    _thread.start_new_thread(_kill_when_alone, (lifeline,))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def _kill_when_alone(lifeline: int) -> None:
    """The lifeline's other end is held by the worker alone: it reads as ended when the worker is gone."""
    os.read(lifeline, 1)
    os.kill(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
