"""From what a command raised to what is printed, and the exit code. Never a traceback."""

import json
import os
import sys
import tempfile
import traceback
from datetime import UTC, datetime
from pathlib import Path

import click

from app.errors import InvalidFile, Misuse, NotReady, StepfastError

INTERRUPTED = 130
CLOSED_PIPE = 141  # as a shell reports SIGPIPE
BUG = 1
_MESSAGE_MAX_CHARS = 4_000


def report(error: BaseException, *, as_json: bool) -> int:
    """Says what is wrong and what to do next, once, and returns the exit code."""
    match error:
        case SystemExit():
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        case click.exceptions.Exit():
            return error.exit_code
        case KeyboardInterrupt() | click.Abort():
            return INTERRUPTED
        case BrokenPipeError():
            _let_go_of_stdout()
            return CLOSED_PIPE
    known = _known(error)
    _say(known or _bug(error), as_json=as_json)
    return known.exit_code if known else BUG


def _known(error: BaseException) -> StepfastError | None:
    """The error in our words; None where it is a bug."""
    match error:
        case StepfastError():
            return error
        case click.UsageError():
            command = error.ctx.command_path if error.ctx else "stepfast"
            return Misuse(error.format_message(), next_step=f"See: {command} --help")
        case click.ClickException():
            return Misuse(error.format_message())
        case OSError() if error.filename:
            return NotReady(
                f"{error.filename} cannot be used: {error.strerror}.", next_step="Make room or give access."
            )
    # What was never imported raised nothing.
    if "sqlalchemy" in sys.modules:
        return _from_database(error)
    return None


def _from_database(error: BaseException) -> StepfastError | None:
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.exc import TimeoutError as PoolTimeout

    from app.runs.database import readiness

    if isinstance(error, PoolTimeout):
        return NotReady("Postgres gave no connection in time.", next_step="Check that it runs, and its connections.")
    try:
        with readiness():
            raise error
    except NotReady as told:
        return told
    except DBAPIError as other:
        if getattr(other.orig, "sqlstate", "") in {"25006", "42501"}:
            said = str(other.orig).splitlines()[0].rstrip(".")
            return NotReady(
                f"Postgres refuses: {said}.",
                next_step="STEPFAST_DATABASE_URL must name a primary server, and a user who may do this.",
            )
    except BaseException:  # noqa: BLE001  # not the database's
        return None
    return None


def _bug(error: BaseException) -> StepfastError:
    kind = type(error).__name__
    said = " ".join(str(error).split())[:300]
    return StepfastError(
        f"This is a bug in Stepfast: {kind}: {said}" if said else f"This is a bug in Stepfast: {kind}.",
        next_step=f"Please report it, with {_keep_traceback(error)}.",
    )


def _keep_traceback(error: BaseException) -> str:
    """Where the traceback was written: our own folder, or where that cannot be written, a temporary one."""
    from app import settings
    from app.redaction import redact_text

    text = redact_text("".join(traceback.format_exception(error)))
    name = f"bug-{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}.txt"
    try:
        folder = settings.load().home
        folder.mkdir(parents=True, exist_ok=True)
        return _written(folder / name, text)
    except (OSError, StepfastError):
        return _written(Path(tempfile.mkdtemp(prefix="stepfast-")) / name, text)


def _written(path: Path, text: str) -> str:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
    return str(path)


def _say(error: StepfastError, *, as_json: bool) -> None:
    from app.cli.output import clean, cut

    message, next_step = cut(clean(error.message), _MESSAGE_MAX_CHARS), clean(error.next_step)
    try:
        if as_json:
            print(json.dumps({"error": {"message": message, "next_step": next_step}}, indent=2))
            sys.stdout.flush()
            return
        lines = [f"Error: {message}"]
        if isinstance(error, InvalidFile):  # the message names the first fault
            lines += [clean(str(fault)) for fault in error.faults if str(fault) not in error.message]
        print("\n".join([*lines, next_step]).rstrip(), file=sys.stderr)
    except BrokenPipeError:
        _let_go_of_stdout()


def _let_go_of_stdout() -> None:
    from app.observe.logs import let_go

    let_go(sys.stdout)
