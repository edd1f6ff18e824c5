"""How a command reaches Postgres, the broker and skill files. Each refuses, by name, where something is missing."""

import getpass
import os
import sys
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import click

from app import settings
from app.cli.output import clean
from app.errors import Misuse, NotReady
from app.pipelines import names

if TYPE_CHECKING:
    from app.execution.worker import Worker
    from app.pipelines.model import Pipeline

BROKER_TIMEOUT_S = 3.0


def log_to_stderr() -> None:
    """By our rules. A person at a terminal reads the command's own output, so gets only what asks for attention."""
    from app.observe import logs

    configured = settings.load()
    if sys.stderr.isatty() and "STEPFAST_LOG_FORMAT" not in os.environ:
        configured = replace(configured, log_format="console", log_level="warning")
    logs.setup(configured, sys.stderr)


def database_url() -> str:
    """The URL of Postgres. Raises NotReady where it is missing, or no URL."""
    url = settings.load().need_database()
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        make_url(url)
    except (ArgumentError, ValueError) as error:
        raise NotReady(
            "STEPFAST_DATABASE_URL is not a Postgres URL.", next_step="Write postgresql://user@host/name."
        ) from error
    return url


def database(*, embedded: bool = False) -> "Worker":
    """The process's way to Postgres, until its command ends. It registers nothing there. Raises NotReady."""
    if embedded:
        from app.cli import embedding

        click.get_current_context().with_resource(embedding.servers())
    database_url()
    log_to_stderr()
    from app.execution import worker

    return worker.current()


def database_and_broker(*, embedded: bool = False) -> "Worker":
    """Both, for what sends messages. Raises NotReady before anything is written, also where the broker is away."""
    if not embedded:
        settings.load().need_broker()
    current = database(embedded=embedded)
    check_broker()
    return current


def check_broker() -> None:
    """Raises NotReady where the broker is not named, or does not answer."""
    settings.load().need_broker()
    from app.celery import celery

    try:
        with celery.connection_for_write(connect_timeout=BROKER_TIMEOUT_S) as connection:
            connection.ensure_connection(max_retries=1, timeout=BROKER_TIMEOUT_S)
    except Exception as error:  # each of kombu's transports raises errors of its own library
        raise NotReady(
            f"The broker cannot be reached: {(str(error) or type(error).__name__).rstrip('.')}.",
            next_step="Check STEPFAST_BROKER_URL and that the broker runs.",
        ) from error


def is_skill(text: str) -> bool:
    """Whether NAME-OR-SKILL is a path: it ends in .yaml or .yml, or is no possible name (`./folder`, `.`)."""
    return text.endswith((".yaml", ".yml")) or not names.PIPELINE_NAME.fullmatch(text)


def load_skill(path: Path) -> "Pipeline":
    """The definition of a skill file or its folder; its warnings go to standard error. Raises InvalidFile."""
    from app.pipelines import loader

    configured = settings.load()
    checked = loader.check(path, aliases=configured.model_aliases, handler_modules=configured.handler_modules)
    if checked.pipeline is None:
        raise loader.invalid(path, checked.faults)
    for fault in checked.faults:
        print(clean(str(fault)), file=sys.stderr)
    return checked.pipeline


def run_command(target: Path | str, pipeline: "Pipeline") -> str:
    """The command that starts a run here and now, with the fields that its input must have."""
    configured = settings.load()
    options = [f" --input {name}=..." for name in (pipeline.input_schema or {}).get("required", ())]
    if not (configured.database_url or configured.broker_url):
        options.append(" --embedded")
        asks_claude = any(agent.model for agent in pipeline.agents)
        if asks_claude and not (configured.anthropic_api_key or configured.anthropic_base_url):
            options.append(" --simulate")
    return f"stepfast run {quote(str(target))}{''.join(options)}"


def ask(question: str, alone: Misuse, refused: str, *, as_json: bool = False) -> None:
    """Raises Abort, after `refused` is said, where the answer is no; and `alone` where nobody can be asked."""
    if as_json or not sys.stdin.isatty():
        raise alone
    if not click.confirm(question, default=False):
        print(refused)
        raise click.Abort


def user() -> str:
    """Who acts, for the record."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}"
