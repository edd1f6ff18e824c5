"""Becomes a command that ends when its parent does, also by SIGKILL: `python with_parent.py PARENT_PID COMMAND…`.

Only Linux can tell a process so; elsewhere the command outlives a parent that was killed. A script that imports next to
nothing, so that it adds 20 ms.
"""

import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent_pid: int, command: list[str]) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent_pid:
            sys.exit(1)  # it ended before it could be followed
    os.execvp(command[0], command)  # noqa: S606  # the Procfile's own command


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
