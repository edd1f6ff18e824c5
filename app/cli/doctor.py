"""`stepfast doctor`."""

import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal

import click

from app import settings
from app.cli import embedding, output, system
from app.errors import NotReady

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from app.execution.worker import Worker
    from app.runs.health import Health, Server

SKEW_MAX_S = 2.0
REPLY_TIMEOUT_S = 1.0
STUCK_LISTED_MAX = 20
# From so many runs on that `stepfast prune` would look at, it is mentioned.
OLD_RUNS_MENTIONED = 1_000
_PACKAGES = ("stepfast-app", "celery", "redis", "anthropic", "sqlalchemy", "psycopg", "flower")
_DIRECTLY = "Set STEPFAST_SESSION_DATABASE_URL to the same database's address without the pooler."
_STYLES = {"ok": "green", "warn": "yellow", "bad": "red"}


@dataclass(frozen=True, slots=True)
class Check:
    """One line. `bad` means that work does not get done; `next` is the command or the act that helps."""

    name: str
    status: Literal["ok", "warn", "bad"]
    text: str
    next: str = ""


@click.command()
@click.option("--verify", metavar="RUN", help="Check the nine rules on what is recorded of a run, instead.")
@embedding.option
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print {ok, checks: [{name, status, text, next}]}; with --verify {ok, run, rules: [{rule, text, ok, found}]}.",
)
def command(verify: str | None, embedded: bool, as_json: bool) -> int:
    """Check settings, versions, servers, the clock, workers, queues, dead letters and stuck runs.

    Each line is ok, warn or bad, with what to do next. Exits 3 where a line is bad. With --verify, it proves from the
    tables and the events of one run (the beginning of its id, or `last`) that the rules hold which Stepfast promises,
    and exits 1 where one does not.
    """
    if verify:
        return _verify(verify, embedded=embedded, as_json=as_json)
    checks = []
    for check in _checks(embedded=embedded):
        checks.append(check)
        if not as_json:
            _print(check)
    ok = all(check.status != "bad" for check in checks)
    if as_json:
        output.print_json({"ok": ok, "checks": [asdict(check) for check in checks]})
    return 0 if ok else NotReady.exit_code


def _verify(name: str, *, embedded: bool, as_json: bool) -> int:
    """Which of the rules hold of a run. Returns the exit code."""
    worker = system.database(embedded=embedded)
    from app.runs.invariants import RULES, check
    from app.runs.reads import Reads

    run_id = Reads(worker.store.engine).run_id(name)
    with worker.store.engine.connect() as connection:
        violations = check(connection, run_id)
    rules = []
    for rule, text in RULES.items():
        found = [{"agent": v.agent, "sentence": v.sentence} for v in violations if v.rule == rule]
        rules.append({"rule": rule, "text": text, "ok": not found, "found": found})
        if not as_json:
            _print(Check(f"rule {rule}", "bad" if found else "ok", text))
            for entry in found:
                print("     ", output.one_line(f"{entry['agent'] or 'the run'}: {entry['sentence']}"))
    if as_json:
        output.print_json({"ok": not violations, "run": str(run_id), "rules": rules})
    return 1 if violations else 0


def _print(check: Check) -> None:
    from rich.text import Text

    status = Text(f"{check.status:<4}  ", style=_STYLES[check.status])
    console = output.console()
    console.print(status + Text(output.one_line(f"{check.name}: {check.text}")), soft_wrap=True)
    if check.next:
        console.print(Text(f"      {output.one_line(check.next)}"), soft_wrap=True)


def _checks(*, embedded: bool) -> "Iterator[Check]":
    try:
        configured = settings.load()
    except NotReady as error:
        yield Check("settings", "bad", error.message, error.next_step)
        return
    yield from _settings(configured)
    yield _versions()
    worker = None
    try:
        worker = system.database(embedded=embedded)
    except NotReady as error:
        yield Check("database", "bad", error.message, error.next_step)
    try:
        system.check_broker()
    except NotReady as error:
        yield Check("broker", "bad", error.message, error.next_step)
        nodes = None
    else:
        nodes = _nodes()
    if worker:
        yield from _database(worker, nodes)


def _settings(configured: settings.Settings) -> "Iterator[Check]":
    # Names and never values: a URL may hold a password.
    known = ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL")
    given = sorted(name for name in os.environ if os.environ[name] and (name.startswith("STEPFAST_") or name in known))
    yield Check("settings", "ok", f"set are {', '.join(given)}" if given else "none is set")
    for folder in configured.skills:
        if not folder.is_dir():
            yield Check(
                "skills", "warn", f"STEPFAST_SKILLS names {folder}, which is no folder", "Mend STEPFAST_SKILLS."
            )
    if not (configured.anthropic_api_key or configured.anthropic_base_url):
        needed = "Workers need it for agents with a model: set it where they run."
        yield Check("claude", "warn", "ANTHROPIC_API_KEY is not set here", needed)


def _versions() -> Check:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} is missing")
    return Check("versions", "ok", ", ".join([f"Python {platform.python_version()}", *found]))


def _nodes() -> dict[str, set[str]]:
    """The queues of each Celery worker that answers."""
    from app.celery import celery

    answers = celery.control.inspect(timeout=REPLY_TIMEOUT_S).active_queues() or {}
    return {node: {queue["name"] for queue in queues} for node, queues in answers.items()}


def _database(worker: "Worker", nodes: dict[str, set[str]] | None) -> "Iterator[Check]":
    from app.runs.database import head_revision
    from app.runs.health import Health

    health = Health(worker.store.engine)
    before = datetime.now(UTC)
    server = health.server()
    middle = before + (datetime.now(UTC) - before) / 2
    yield Check("database", "ok", f"PostgreSQL {server.version}, at migration {head_revision()} or later")
    yield _clock((server.now - middle).total_seconds())
    yield from _pooler(worker.settings, server)
    waiting = health.available()
    depths: dict[str, int] = {}
    if nodes is not None:
        depths = _depths(waiting)
        listed = ", ".join(f"{name} {depth:,}" for name, depth in depths.items())
        yield Check("broker", "ok", f"answers; messages by queue: {listed}")
    yield from _workers(health, nodes or {}, waiting)
    yield from _dead_letters(health, worker.settings.dead_queue_max)
    yield from _stuck(health, {name for name, depth in depths.items() if depth})
    yield from _old(worker)


def _pooler(configured: settings.Settings, server: "Server") -> "Iterator[Check]":
    if server.is_pooled and not server.is_limited:
        yield Check(
            "pooler",
            "warn",
            "a pooler stands before Postgres, and takes no statement_timeout from us",
            "Give the role one: alter role NAME set statement_timeout = '10s'.",
        )
    if server.is_pooled and not configured.session_database_url:
        lease = f"only when their lease of {configured.lease_s:g} s has run out"
        text = f"no process behind a pooler has a session of its own, so that deaths are noticed {lease}"
        yield Check("pooler", "warn", text, _DIRECTLY)


def _clock(ahead_s: float) -> Check:
    text = f"Postgres is {abs(ahead_s):.3f} s {'ahead of' if ahead_s > 0 else 'behind'} this machine"
    if abs(ahead_s) > SKEW_MAX_S:
        return Check("clock", "warn", text, "Set this machine's clock: times that are shown are wrong by that much.")
    return Check("clock", "ok", text)


def _depths(waiting: dict[str, int]) -> dict[str, int]:
    """How many messages each queue holds. One that was never used does not exist, and holds none."""
    from app.celery import celery
    from app.execution.dead_queue import QUEUE
    from app.pipelines.model import Queue

    found = {}
    with celery.connection_for_read() as connection:
        for name in sorted({*Queue, *waiting, QUEUE}):
            with connection.channel() as channel:
                try:
                    found[name] = int(channel.queue_declare(name, passive=True).message_count)
                except connection.channel_errors:
                    found[name] = 0
    return found


def _workers(health: "Health", nodes: dict[str, set[str]], waiting: dict[str, int]) -> "Iterator[Check]":
    processes = health.workers()
    started = "Run `stepfast up`, or start workers as the Procfile says."
    if not nodes and not processes:
        yield Check("workers", "bad" if waiting else "warn", "none is alive", started)
    else:
        on = _counted(processes, "process holds", "processes hold")
        yield Check("workers", "ok", f"{_counted(nodes, 'node answers', 'nodes answer')}, {on} a live lease")
    if nodes:
        served = set().union(*nodes.values())
        for queue in sorted(waiting.keys() - served):
            text = f"nobody serves the queue {queue}, where {waiting[queue]:,} steps wait"
            yield Check("workers", "bad", text, f"Start a worker with -Q {queue}.")
    if leased := [entry for entry in processes if not entry["has_session"]]:
        text = f"{_counted(leased, 'process has', 'processes have')} no session of its own, behind a pooler"
        yield Check("workers", "warn", f"{text}: a death of theirs is noticed by its lease alone", _DIRECTLY)
    from app.runs.database import CODE_VERSION

    if other := sorted({entry["code_version"] for entry in processes} - {CODE_VERSION}):
        text = f"some run code version {', '.join(map(str, other))}, and this is {CODE_VERSION}"
        yield Check("workers", "warn", text, "Restart them on this version.")


def _dead_letters(health: "Health", dead_queue_max: int) -> "Iterator[Check]":
    waiting, unsent = health.dead_letters()
    if waiting:
        yield Check("dead letters", "warn", f"{waiting:,} wait for somebody", "stepfast dead")
    else:
        yield Check("dead letters", "ok", "none is open")
    if unsent:
        text = f"{unsent:,} are not sent to the broker yet, whose queue keeps at most {dead_queue_max:,}"
        yield Check("dead letters", "warn", text, "A worker sends them: is one alive?")


def _stuck(health: "Health", busy: set[str]) -> "Iterator[Check]":
    stuck = health.stuck(busy=busy, limit=STUCK_LISTED_MAX)
    if not stuck:
        yield Check("runs", "ok", "none is stuck")
    for run in stuck:
        name = output.short(str(run["run_id"]))
        what = f"its step {run['agent']} is {run['state']}" if run["agent"] else "none of its steps may start"
        text = f"{name} of {run['pipeline']} is stuck: {what}, and nothing will move it"
        yield Check("runs", "bad", text, f"stepfast explain {name}")
    if stuck and stuck[0]["runs"] > STUCK_LISTED_MAX:
        yield Check("runs", "bad", f"{stuck[0]['runs']:,} are stuck in all", "stepfast runs --state running")


def _old(worker: "Worker") -> "Iterator[Check]":
    from app.cli.prune import DEFAULT_DAYS
    from app.runs.prune import prunable_count

    old = prunable_count(worker.store.engine, timedelta(days=DEFAULT_DAYS), OLD_RUNS_MENTIONED)
    if old >= OLD_RUNS_MENTIONED:
        text = f"at least {old:,} ended more than {DEFAULT_DAYS} days ago, and are kept"
        yield Check("runs", "ok", text, "stepfast prune --dry-run")


def _counted(found: "Iterable[object]", one: str, many: str) -> str:
    count = len(list(found))
    return f"{count} {one if count == 1 else many}"
