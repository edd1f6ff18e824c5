"""Runs a command that we did not write, in a process group of its own and within limits.

This is no sandbox. The command has the rights of this user: it can read its files, use the network, and leave its
process group on purpose. What is bounded: its time, the memory and files of each of its processes, and the output that
we hold. It gets the environment that is passed, and nothing that stays in its group outlives it or us (guard.py).
"""

import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_GUARD = Path(__file__).with_name("guard.py")
_READ_MAX_BYTES = 65_536  # a pipe holds no more
# A background process may hold our pipes open after the command ended, so its end is also looked for this often.
_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Finished:
    """`exit_code` is None where the time ran out, and 128 + n where signal n ended the command.

    `output` and `errors` hold the last bytes of stdout and stderr; `cut` says that earlier ones were dropped.
    """

    exit_code: int | None
    output: bytes
    errors: bytes
    cut: bool
    duration_ms: int


def run(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    timeout_s: float,
    output_max_bytes: int,
    stdin: bytes = b"",
) -> Finished:
    """Runs `command` in `folder` until it ends or `timeout_s` passed, then kills what is left of its group."""
    started_s = time.monotonic()
    lifeline, our_end = os.pipe()
    try:
        with tempfile.TemporaryFile() as source:
            source.write(stdin)
            source.seek(0)
            process = subprocess.Popen(  # noqa: S603  # a list of arguments, never a shell's line
                [sys.executable, "-I", "-S", str(_GUARD), str(lifeline), *command],
                cwd=folder,
                env=dict(environment),
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                pass_fds=(lifeline,),
            )
        with process:
            try:
                output, errors, cut = _read(process, started_s + timeout_s, output_max_bytes)
                exit_code = process.poll()
            finally:
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
    finally:
        os.close(lifeline)
        os.close(our_end)
    return Finished(exit_code, output, errors, cut, round((time.monotonic() - started_s) * 1000))


def _read(process: subprocess.Popen[bytes], until_s: float, max_bytes: int) -> tuple[bytes, bytes, bool]:
    """The last `max_bytes` of stdout and of stderr. Returns when the process ended or the time is over."""
    assert process.stdout is not None
    assert process.stderr is not None
    output, errors = bytearray(), bytearray()
    cut = False
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, output)
        selector.register(process.stderr, selectors.EVENT_READ, errors)
        while (left_s := until_s - time.monotonic()) > 0:
            # Asked before reading: one more round then empties the pipes of all that the command wrote.
            ended = process.poll() is not None
            for key, _ in selector.select(0 if ended else min(_POLL_S, left_s)):
                chunk = os.read(key.fd, _READ_MAX_BYTES)
                if not chunk:
                    selector.unregister(key.fileobj)
                key.data.extend(chunk)
                cut = cut or len(key.data) > max_bytes
                del key.data[:-max_bytes]
            if ended:
                break
            if not selector.get_map():
                with suppress(subprocess.TimeoutExpired):
                    process.wait(until_s - time.monotonic())
                break
    return bytes(output), bytes(errors), cut
