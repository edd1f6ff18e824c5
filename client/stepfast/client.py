"""Starting runs: the client, and the one that `stepfast.enqueue` uses."""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any
from uuid import UUID, uuid4

from stepfast.databases import Database, OwnDatabase, database
from stepfast.errors import InvalidInput, Misuse, NotReady, UnknownName, check_text
from stepfast.messages import sender
from stepfast.runs import RunHandle

INPUT_MAX_BYTES = 1_000_000
PRIORITY_MAX = 9
_PROBLEMS_MAX = 5
_PIPELINES_MAX = 256
# How long it is believed that a run waits behind others: they may be gone when its host commits later.
_WAITS_S = 0.1
# How often a name may move while one run is started.
_MOVES_MAX = 5

_PIPELINE = "select hash, input_schema::text from stepfast.v_pipelines where name = %s::text"
_ENQUEUE = """
    select run_id::text, created, waits from stepfast.enqueue_v1(
        %s::text, %s::jsonb, %s::text, %s::text, %s::jsonb, %s::integer, %s::uuid, %s::text, %s::text)
"""
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")


@dataclass(frozen=True, slots=True)
class Definition:
    """What a name means: the hash of the definition, and what checks an input for it."""

    hash: str
    check: Callable[[object], None]


class Client:
    """How one application reaches Stepfast.

    `database_url` serves calls without a connection; `database`, instead, gives one to each. `broker` is the URL of
    Stepfast's broker, or your own Celery app where that shares it: then runs start at once, else within 2 s.
    """

    def __init__(
        self,
        database_url: str | None = None,
        broker: Any = None,  # noqa: ANN401  # a URL, or a Celery app, which is untyped
        *,
        database: Callable[[], object] | None = None,
        input_max_bytes: int = INPUT_MAX_BYTES,
    ) -> None:
        self._database_url = database_url
        self._database = database
        self._broker = broker
        self._input_max_bytes = input_max_bytes
        self._definitions: dict[str, Definition] = {}

    def enqueue(
        self,
        pipeline: str,
        input: dict[str, Any],  # noqa: A002  # what the pipeline calls it
        *,
        key: str | None = None,
        connection: object = None,
        tenant: str | None = None,
        labels: dict[str, Any] | None = None,
        priority: int = 0,
    ) -> RunHandle:
        """Starts a run in the transaction of `connection`: rolled back, it never started; committed, it starts.

        The same key starts one run, whoever asks and how often. Raises UnknownName, InvalidInput, KeyConflict, Misuse,
        NotReady; a KeyConflict leaves the transaction to be rolled back, as any error of the database does.
        """
        found = self.database(connection)
        return self.start(found, pipeline, input, uuid4(), key=key, tenant=tenant, labels=labels, priority=priority)

    def check(
        self,
        found: Database,
        pipeline: str,
        run_input: object,
        *,
        key: str | None = None,
        tenant: str | None = None,
        labels: object = None,
        priority: int = 0,
    ) -> tuple[str, str, str]:
        """Refuses what can be, before anything is written. Returns the JSON of both, and the definition's hash."""
        if key == "":
            raise InvalidInput("The key is empty.", next_step="Leave it out where no other start is the same run.")
        check_text("pipeline's name", pipeline)
        check_text("key", key)
        check_text("tenant", tenant)
        if not 0 <= priority <= PRIORITY_MAX:
            raise Misuse(f"The priority is from 0 to {PRIORITY_MAX}.")
        text = _json(run_input, "input", self._input_max_bytes)
        labelled = _json(labels, "labels", self._input_max_bytes) if labels else "{}"
        given = json.loads(text)  # as Postgres gets it: a tuple is an array, a number as a key is a text
        definition = self._definition(found, pipeline)
        try:
            definition.check(given)
        except InvalidInput:
            # By what this process once read. What is refused is refused by what the name means now.
            self._definitions.pop(pipeline, None)
            definition = self._definition(found, pipeline)
            definition.check(given)
        return text, labelled, definition.hash

    def start(
        self,
        found: Database,
        pipeline: str,
        run_input: dict[str, Any],
        run_id: UUID,
        *,
        key: str | None,
        tenant: str | None = None,
        labels: dict[str, Any] | None = None,
        priority: int = 0,
    ) -> RunHandle:
        """Writes a run, in one round trip, and has its message sent after the commit."""
        for _ in range(_MOVES_MAX):
            text, labelled, known = self.check(
                found, pipeline, run_input, key=key, tenant=tenant, labels=labels, priority=priority
            )
            values = (pipeline, text, key, tenant or "default", labelled, priority, str(run_id), known, _traceparent())
            for started, created, waits in found.write(_ENQUEUE, values):
                if created:
                    until_s = time.monotonic() + (_WAITS_S if waits else 0.0)
                    found.after_commit(partial(self._announce, started, until_s))
                return RunHandle(UUID(started), found, self.look_after, created=created)
            # Another definition was published since this process read the last one.
            self._definitions.pop(pipeline, None)
        raise NotReady(f"{pipeline} is published anew faster than it can be read.", next_step="Try again.")

    def run(self, run_id: UUID | str, *, connection: object = None) -> RunHandle:
        """A run by its id. Nothing is read yet."""
        try:
            parsed = run_id if isinstance(run_id, UUID) else UUID(run_id)
        except (ValueError, AttributeError, TypeError) as error:
            raise UnknownName(f"{run_id!r} is no run's id.") from error
        return RunHandle(parsed, self.database(connection), self.look_after)

    def database(self, connection: object = None) -> Database:
        """Where calls with this connection, or without one, go."""
        if connection is None and self._database is not None:
            connection = self._database()
        return OwnDatabase(self._database_url) if connection is None else database(connection)

    def look_after(self, run_id: str) -> None:
        """Asks a worker to look after a run at once, where a broker is named."""
        if self._broker:
            sender(self._broker).send(run_id)

    def _announce(self, run_id: str, until_s: float) -> None:
        """A run that waits behind others needs nobody. Whether it still does is unknown where the host commits late."""
        if time.monotonic() >= until_s:
            self.look_after(run_id)

    def _definition(self, found: Database, pipeline: str) -> Definition:
        """What a name meant when this process read it; `start` notices where it means something else by now."""
        known = self._definitions.get(pipeline)
        if known is not None:
            return known
        rows = found.read(_PIPELINE, (pipeline,))
        if not rows:
            raise UnknownName(f"No pipeline is published as {pipeline}.", next_step="Run: stepfast publish SKILL")
        if len(self._definitions) >= _PIPELINES_MAX:
            self._definitions.clear()
        made = Definition(rows[0][0], _checking(json.loads(rows[0][1] or "null")))
        return self._definitions.setdefault(pipeline, made)


def _traceparent() -> str | None:
    """Of the host's current span (W3C), where the host uses OpenTelemetry: the run's trace is linked to it."""
    # Absent where the host does not use it, and while another thread of the host's is importing it.
    current = getattr(sys.modules.get("opentelemetry.trace"), "get_current_span", None)
    if current is None:
        return None
    span = current().get_span_context()
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{int(span.trace_flags):02x}" if span.is_valid else None


def _json(value: object, name: str, max_bytes: int) -> str:
    """A value's JSON, as Postgres takes it. Raises InvalidInput."""
    if not isinstance(value, dict):
        raise InvalidInput(f"The {name} must be a JSON object, and is a {type(value).__name__}.")
    try:
        text = _encode(value)
        size = len(text.encode())
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidInput(f"The {name} is no JSON: {error}.") from error
    if "\\u0000" in text and _NUL.search(text):
        raise InvalidInput(f"The {name} holds a NUL byte.", next_step="Remove it, or encode the data as base64.")
    if size > max_bytes:
        raise InvalidInput(
            f"The {name} has {size:,} bytes; at most {max_bytes:,} are taken.", next_step="Pass an address of the data."
        )
    return text


def _checking(schema: dict[str, Any] | None) -> Callable[[object], None]:
    if schema is None:
        return lambda _: None
    from jsonschema import Draft202012Validator

    validator = Draft202012Validator(schema)

    def check(value: object) -> None:
        found = sorted(validator.iter_errors(value), key=lambda error: [str(part) for part in error.path])
        if found:
            said = "; ".join(
                f"{error.json_path.replace('$', 'input', 1)}: {error.message}" for error in found[:_PROBLEMS_MAX]
            )
            raise InvalidInput(f"The input does not fit the pipeline's input_schema: {said[:2000]}")

    return check


_default: Client | None = None
_lock = Lock()


def configure(client: Client) -> None:
    """Sets what `stepfast.enqueue` and `stepfast.run` use. Without it they read the environment."""
    global _default  # noqa: PLW0603  # one a process
    _default = client


def default() -> Client:
    """The configured client; else one by STEPFAST_DATABASE_URL and STEPFAST_BROKER_URL."""
    global _default  # noqa: PLW0603
    with _lock:
        if _default is None:
            _default = Client(os.environ.get("STEPFAST_DATABASE_URL"), os.environ.get("STEPFAST_BROKER_URL"))
        return _default


def enqueue(
    pipeline: str,
    input: dict[str, Any],  # noqa: A002
    *,
    key: str | None = None,
    connection: object = None,
    tenant: str | None = None,
    labels: dict[str, Any] | None = None,
    priority: int = 0,
) -> RunHandle:
    """`Client.enqueue` of the configured client."""
    return default().enqueue(
        pipeline, input, key=key, connection=connection, tenant=tenant, labels=labels, priority=priority
    )


def run(run_id: UUID | str, *, connection: object = None) -> RunHandle:
    """`Client.run` of the configured client."""
    return default().run(run_id, connection=connection)
