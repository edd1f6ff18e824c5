"""Everything that the environment can set: read once, validated once, frozen.

`load()` refuses an unknown `STEPFAST_…` name with the nearest known one. A command that needs a server asks for it by
`need_database()` or `need_broker()`, which name the variable that is missing: nothing falls back silently.
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path

from app import crashpoints
from app.errors import NotReady

ROOT = Path(__file__).resolve().parent.parent

# Retired models that published skill files still name, and what runs in their place (facts: the SDK does not warn).
MODEL_ALIASES = {
    "claude-3-opus": "claude-opus-5-5",
    "claude-3-sonnet": "claude-sonnet-5-5",
    "claude-3-haiku": "claude-haiku-5-5",
    "claude-3-5-sonnet": "claude-sonnet-5-5",
    "claude-3-5-haiku": "claude-haiku-5-5",
    "claude-3-7-sonnet": "claude-sonnet-5-5",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """One field a variable: `database_url` is `STEPFAST_DATABASE_URL`; those that others named keep their names."""

    # Servers. A URL may hold a password.
    database_url: str | None = field(default=None, repr=False)
    # The same database without a pooler between, for the one session by which others see at once that a process died.
    session_database_url: str | None = field(default=None, repr=False)
    broker_url: str | None = field(default=None, repr=False)
    # Where outputs are cached of pipelines whose checkpointing says `store: redis`.
    redis_url: str | None = field(default=None, repr=False)
    anthropic_base_url: str | None = None
    anthropic_api_key: str | None = field(default=None, repr=False)

    # Where runs are traced (docs/traces.md). OpenTelemetry's exporter reads the rest of its variables itself.
    langfuse_public_key: str | None = field(default=None, repr=False)
    langfuse_secret_key: str | None = field(default=None, repr=False)
    langfuse_base_url: str = "https://cloud.langfuse.com"
    langsmith_api_key: str | None = field(default=None, repr=False)
    langsmith_endpoint: str = "https://api.smith.langchain.com"
    langsmith_project: str | None = None
    otel_exporter_otlp_endpoint: str | None = None
    otel_exporter_otlp_traces_endpoint: str | None = None

    # Files. `home` holds the embedded servers' data; `skills` are folders whose handlers.py this worker may import.
    home: Path = ROOT / ".stepfast"
    skills: tuple[Path, ...] = ()
    handler_modules: tuple[str, ...] = ()

    # Models.
    model_aliases: Mapping[str, str] = field(default_factory=lambda: dict(MODEL_ALIASES))

    # A worker's lease. Heartbeats come three times a lease, so that one lost heartbeat is no death. A lease, a beat and
    # a grace are within the 20 s that a frozen worker may go unnoticed, with room for a message that it takes then: one
    # that is cut off from Postgres alone is not cut off from the broker. A dead one is seen at once, by its lock.
    lease_s: float = 10.0
    # How long an advisory lock must stay free before its worker counts as dead: a dropped session is back sooner.
    grace_s: float = 0.5
    # How often each worker looks for what is due, dead or unsent, and vouches for its children. Half of it and the
    # grace are what a death costs.
    sweep_s: float = 0.5
    # After SIGTERM, how long a worker goes on with what it executes, before it gives it away. Platforms kill after 10 s
    # (Docker, Nomad) or 30 s (Kubernetes, Heroku): to give away takes less than a second, and one is left to spare.
    shutdown_s: float = 8.0
    # A server's Retry-After is obeyed up to this; facts: uncapped, one header stalls a step for an hour.
    retry_after_max_s: float = 120.0

    # Payloads.
    input_max_bytes: int = 1_000_000
    output_max_bytes: int = 4_000_000
    log_value_max_bytes: int = 8_192
    # A prompt is longer than what a log line should hold; a batch of spans must fit into what providers take (4.5 MB).
    trace_value_max_bytes: int = 32_768
    dead_queue_max: int = 10_000

    # Connections of one process to Postgres, beside the one that holds its advisory lock.
    database_pool_max: int = 8

    # Set by crash tests alone: a folder of orders to end processes at named points (app/crashpoints.py).
    crash_points: Path | None = None

    log_format: str = "json"
    log_level: str = "info"

    def need_database(self) -> str:
        """The URL of Postgres, with the driver that we ship. Raises NotReady where it is missing."""
        if not self.database_url:
            raise NotReady("STEPFAST_DATABASE_URL is not set.", next_step=_EMBEDDED)
        return _with_driver("database_url", self.database_url)

    def need_session_database(self) -> str:
        """The URL of Postgres for a session of one's own. Raises NotReady."""
        if not self.session_database_url:
            return self.need_database()
        return _with_driver("session_database_url", self.session_database_url)

    def need_broker(self) -> str:
        """The broker's URL. Raises NotReady where it is missing."""
        if not self.broker_url:
            raise NotReady("STEPFAST_BROKER_URL is not set.", next_step=_EMBEDDED)
        return self.broker_url


def _with_driver(name: str, url: str) -> str:
    for prefix in ("postgres://", "postgresql://"):
        if url.startswith(prefix):
            return "postgresql+psycopg://" + url.removeprefix(prefix)
    if not url.startswith("postgresql+psycopg://"):
        raise NotReady(f"{variable(name)} is not a Postgres URL.", next_step="Write postgresql://user@host/name.")
    return url


_EMBEDDED = "Set it, or use --embedded, `stepfast up` or `stepfast demo`, which start embedded servers."
_FOREIGN = ("anthropic_", "langfuse_", "langsmith_", "otel_")
_CHOICES = {"log_format": ("json", "console"), "log_level": ("debug", "info", "warning", "error")}


def variable(name: str) -> str:
    """The environment variable of a field."""
    return name.upper() if name.startswith(_FOREIGN) else f"STEPFAST_{name.upper()}"


@cache
def load() -> Settings:
    """The settings of this process. Raises NotReady naming the bad variable."""
    return parse(os.environ)


def parse(environ: Mapping[str, str]) -> Settings:
    """Settings from a mapping. An empty value means unset. Raises NotReady naming the bad variable."""
    known = {variable(f.name): f.name for f in fields(Settings)}
    for name in environ:
        if name.startswith("STEPFAST_") and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(sorted(known))}."
            raise NotReady(f"{name} is not a setting.", next_step=hint)
    given = {known[name]: text for name, text in environ.items() if name in known and text}
    made = Settings(**{name: _value(name, text) for name, text in given.items()})  # type: ignore[arg-type]
    if made.sweep_s > made.lease_s / 3:
        raise NotReady(
            f"STEPFAST_SWEEP_S is {made.sweep_s:g}, and above a third of STEPFAST_LEASE_S, {made.lease_s:g}.",
            next_step="Sweep at least as often as the lease is renewed, or live processes may be taken for dead.",
        )
    return made


def _value(name: str, text: str) -> object:
    default = _DEFAULTS[name]
    if name == "model_aliases":
        return {**MODEL_ALIASES, **dict(_pair(entry) for entry in text.split(",") if entry)}
    if name == "skills":
        return tuple(Path(entry).resolve() for entry in text.split(os.pathsep) if entry)
    if name == "handler_modules":
        return tuple(entry.strip() for entry in text.split(",") if entry.strip())
    if name == "crash_points":
        return crashpoints.checked(text)
    if isinstance(default, Path):
        return Path(text).resolve()
    if isinstance(default, int | float):
        return _number(name, text, type(default))
    if name in _CHOICES and text not in _CHOICES[name]:
        raise NotReady(f"{variable(name)} is {text!r}.", next_step=f"It must be one of {', '.join(_CHOICES[name])}.")
    return text


_DEFAULTS = {name: getattr(Settings(), name) for name in (f.name for f in fields(Settings))}


def _pair(entry: str) -> tuple[str, str]:
    old, separator, new = entry.partition("=")
    if not (separator and old.strip() and new.strip()):
        raise NotReady(f"STEPFAST_MODEL_ALIASES has {entry!r}.", next_step="Write old=new,old=new.")
    return old.strip(), new.strip()


def _number(name: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = kind(0)
    if not 0 < value < float("inf"):
        raise NotReady(f"{variable(name)} is {text!r}.", next_step="It must be a number above 0.")
    return value
