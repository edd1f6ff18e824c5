"""One line for each event: JSON for machines, or a console line for people. Libraries' own log lines are events too.

A line is an object with `timestamp` (UTC), `level`, `event`, then the ids that are bound, then the event's fields.
Nothing here raises into the caller: a step does not fail because nobody reads its log.
"""

import json
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import structlog

from app import events
from app.events import Event
from app.redaction import cut_json, redact
from app.settings import Settings

# An event of somebody else's (LIBRARY, HANDLER_LOG) may carry a `level` of its own.
LEVELS = {
    Event.RUN_ENQUEUED: logging.INFO,
    Event.RUN_COMPLETED: logging.INFO,
    Event.RUN_FAILED: logging.ERROR,
    Event.RUN_RESUMED: logging.INFO,
    Event.RUN_CANCELLED: logging.WARNING,
    Event.STEP_CLAIMED: logging.INFO,
    Event.STEP_COMPLETED: logging.INFO,
    Event.STEP_REUSED: logging.INFO,
    Event.STEP_RETRY_SCHEDULED: logging.WARNING,
    Event.STEP_DEFERRED: logging.INFO,
    Event.STEP_DISCARDED: logging.ERROR,
    Event.STEP_RESCUED: logging.WARNING,
    Event.STEP_RERUN: logging.WARNING,
    Event.STEP_REOPENED: logging.WARNING,
    Event.STEP_STALE_READ: logging.WARNING,
    Event.STEP_STALE_INPUT: logging.WARNING,
    Event.STEP_SUSPENDED: logging.WARNING,
    Event.STEP_APPROVED: logging.INFO,
    Event.STEP_REJECTED: logging.WARNING,
    Event.STEP_EXPIRED: logging.WARNING,
    Event.STEP_OVERRIDDEN: logging.WARNING,
    Event.STEP_SETTLED: logging.WARNING,
    Event.STEP_CANCELLED: logging.WARNING,
    Event.STEP_DISMISSED: logging.WARNING,
    Event.REQUEST_REFUSED: logging.WARNING,
    Event.RUN_SUSPENDED: logging.WARNING,
    Event.RUN_CONTINUED: logging.INFO,
    Event.STEP_STALE_CLAIM: logging.WARNING,
    Event.STEP_FENCED: logging.WARNING,
    Event.STEP_ALONE: logging.WARNING,
    Event.STEP_DISPATCHED: logging.DEBUG,
    Event.STEP_INPUT: logging.INFO,
    Event.STEP_OUTPUT: logging.INFO,
    Event.STEP_GATE: logging.INFO,
    Event.COMMIT_RETRIED: logging.WARNING,
    Event.MODEL_CALLED: logging.INFO,
    Event.MODEL_ALIASED: logging.WARNING,
    Event.HANDLER_PRINTED: logging.INFO,
    Event.HANDLER_LOG: logging.INFO,
    Event.CACHE_AWAY: logging.WARNING,
    Event.TRACES_OFF: logging.WARNING,
    Event.TRACES_DROPPED: logging.WARNING,
    Event.TRACES_LATE: logging.WARNING,
    Event.PIPELINE_PUBLISHED: logging.INFO,
    Event.DEAD_LETTER_PUBLISHED: logging.INFO,
    Event.SEND_FAILED: logging.WARNING,
    Event.SWEEP_FAILED: logging.ERROR,
    Event.WORKER_STARTED: logging.INFO,
    Event.WORKER_STOPPED: logging.INFO,
    Event.WORKER_LOST: logging.ERROR,
    Event.HEARTBEAT_FAILED: logging.WARNING,
    Event.LIBRARY: logging.INFO,
}
IDS = ("run_id", "agent", "attempt_id", "pipeline", "trace_id")
FRAMES_MAX = 20

Line = MutableMapping[str, Any]


def setup(settings: Settings, stream: TextIO | None = None) -> None:
    """Sends every event, and every log line of a library, to `stream` (standard output). A second call replaces it."""
    out = _Out(stream or sys.stdout)
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    structlog.configure(
        processors=[
            _named,
            partial(_safe, settings.log_value_max_bytes),
            *(_for_people(out.is_terminal) if settings.log_format == "console" else [_as_json]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda: out,
    )
    events.subscribe(_log_event)

    logging.root.handlers[:] = [_LibraryHandler()]
    # Libraries' debug lines hold whole requests, which `log_inputs` may forbid.
    logging.root.setLevel(max(level, logging.INFO))
    # "Task received" and "succeeded", a fifth of a worker's time, and "HTTP Request": our own events say the same, with
    # the run.
    for name in ("celery.worker.strategy", "celery.app.trace", "httpx2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)
    threading.excepthook = _log_dead_thread


def _log_event(event: Event, fields: Mapping[str, object]) -> None:
    level = LEVELS[event]
    if "level" in fields:
        level = logging.getLevelNamesMapping().get(str(fields["level"]).upper(), level)
    structlog.get_logger().log(level, event, fields=fields)


class _LibraryHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with suppress(Exception):
            fields = {**events.bound_fields(), "logger": record.name, "message": _message(record)}
            if record.exc_info and record.exc_info[1]:
                fields |= {"error": record.exc_info[1], "exception": _traceback(record.exc_info[1])}
            level = min(max(record.levelno // 10 * 10, logging.DEBUG), logging.CRITICAL)
            structlog.get_logger().log(level, Event.LIBRARY, fields=fields)


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001  # the arguments do not fit the format, or their __str__ raises
        return f"{record.msg} {record.args}"


def _traceback(error: BaseException) -> str:
    """The traceback with its causes and without local variables; of each, the FRAMES_MAX innermost frames."""
    return "".join(traceback.TracebackException.from_exception(error, limit=-FRAMES_MAX, compact=True).format())


def _log_dead_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit:
        name = args.thread.name if args.thread else "?"
        logging.getLogger("threading").error("Thread %s ended by an error.", name, exc_info=args.exc_value)


def _named(_logger: object, level: str, line: Line) -> Line:
    """Orders the line. What other code logs by structlog itself becomes a library's event: names come from the enum."""
    event, fields = line["event"], line.get("fields", {})
    if not isinstance(event, Event):
        fields = {**events.bound_fields(), "logger": "structlog", "message": line.pop("event"), **line}
        event = Event.LIBRARY
    ids = {name: fields[name] for name in IDS if name in fields}
    if "run_id" in ids:
        ids.setdefault("trace_id", str(ids["run_id"]).replace("-", ""))
    ours = {"level": level, "event": event, **ids}
    return ours | {name: value for name, value in fields.items() if name not in ours}


def _safe(max_bytes: int, _logger: object, _level: str, line: Line) -> Line:
    safe = redact(line)
    assert isinstance(safe, dict)
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    safe.pop("timestamp", None)  # a field of somebody's
    return {"timestamp": now} | {name: cut_json(value, max_bytes) for name, value in safe.items()}


def _as_json(_logger: object, _level: str, line: Line) -> str:
    return json.dumps(line)  # in ASCII, which every stream can take


def _for_people(is_terminal: bool) -> list[structlog.types.Processor]:
    return [_printable, structlog.dev.ConsoleRenderer(colors=is_terminal, sort_keys=False, pad_event_to=0)]


def _printable(_logger: object, _level: str, line: Line) -> Line:
    """Texts, without the control characters that would command the terminal (the renderer escapes line ends)."""
    line.pop("trace_id", None)  # the run's id again
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in line.items()}
    return {name: _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text) for name, text in texts.items()}


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class _Out:
    """Writes each line by one call, under a lock. A line that cannot be written is lost."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.is_terminal = False
        with suppress(Exception):
            self.is_terminal = stream.isatty()

    def msg(self, line: str) -> None:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        text = line.encode(encoding, "backslashreplace").decode(encoding) + "\n"
        with suppress(Exception), _lock:
            try:
                self.stream.write(text)
                self.stream.flush()
            except BrokenPipeError:
                let_go(self.stream)

    debug = info = warning = error = critical = msg


def let_go(stream: TextIO) -> None:
    """Its reader is gone. What is left in its buffer must not fail the interpreter's last flush."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


# Re-entrant, because a signal handler may log while its thread writes.
_lock = threading.RLock()


def _renew_lock() -> None:
    """A fork may happen while another thread holds the lock, and in the child nobody would release it."""
    global _lock  # noqa: PLW0603
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)
