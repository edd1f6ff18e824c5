"""Stepfast in Flask.

stepfast = Stepfast(app)  # or Stepfast() and init_app(app)

order = Order(...)
db.session.add(order)
run = stepfast.enqueue("fulfilment", {"order": 7}, key="order-7")
db.session.commit()
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from getpass import getuser
from typing import Any
from uuid import UUID

import click
from flask import Flask, current_app
from flask.cli import AppGroup

from stepfast.client import INPUT_MAX_BYTES, Client
from stepfast.databases import Database
from stepfast.errors import Misuse, NotReady, StepfastError
from stepfast.operating import LIST_MAX, list_runs, plain, resume_failed, since, table
from stepfast.runs import RunHandle


class Stepfast:
    """The extension.

    It joins the session of Flask-SQLAlchemy, unless the configuration names STEPFAST_DATABASE_URL: then each call has a
    transaction of its own there. STEPFAST_BROKER is the URL of Stepfast's broker, or your own Celery app where that
    shares it. STEPFAST_INPUT_MAX_BYTES is 1,000,000.
    """

    def __init__(self, app: Flask | None = None) -> None:
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        app.extensions["stepfast"] = Client(
            app.config.get("STEPFAST_DATABASE_URL"),
            app.config.get("STEPFAST_BROKER"),
            input_max_bytes=app.config.get("STEPFAST_INPUT_MAX_BYTES", INPUT_MAX_BYTES),
        )
        app.cli.add_command(commands)

    def enqueue(
        self,
        pipeline: str,
        input: dict[str, Any],  # noqa: A002  # what the pipeline calls it
        *,
        key: str | None = None,
        tenant: str | None = None,
        labels: dict[str, Any] | None = None,
        priority: int = 0,
    ) -> RunHandle:
        """Starts a run in the session's transaction: `db.session.commit()` starts it, a rollback never did."""
        options: dict[str, Any] = {"key": key, "tenant": tenant, "labels": labels, "priority": priority}
        return _client().enqueue(pipeline, input, connection=_session(), **options)

    def run(self, run_id: UUID | str) -> RunHandle:
        """A run by its id. What is ordered by it waits for `db.session.commit()`, too."""
        return _client().run(run_id, connection=_session())


def _client() -> Client:
    if "stepfast" not in current_app.extensions:
        raise NotReady("This application has no Stepfast.", next_step="Call Stepfast.init_app(app).")
    client: Client = current_app.extensions["stepfast"]
    return client


def _session() -> object:
    """Flask-SQLAlchemy's, where it is to be joined."""
    joined = "sqlalchemy" in current_app.extensions and not current_app.config.get("STEPFAST_DATABASE_URL")
    return current_app.extensions["sqlalchemy"].session if joined else None


@contextmanager
def _connected() -> Iterator[Database]:
    """For the commands: each order is its own transaction, so that a worker sees it while this waits."""
    session: Any = _session()
    if session is None:
        yield _client().database()
    else:
        with session.get_bind().connect() as connection:
            yield _client().database(connection.execution_options(isolation_level="AUTOCOMMIT"))


commands = AppGroup("stepfast", help="Runs of Stepfast's pipelines.")


@contextmanager
def _sentences() -> Iterator[None]:
    """An error of ours becomes a sentence and an exit code: 1 failed, 2 misuse, 3 not ready."""
    try:
        yield
    except StepfastError as error:
        click.echo(f"Error: {plain(str(error))}", err=True)
        code = 2 if isinstance(error, Misuse) else 3 if isinstance(error, NotReady) else 1
        raise click.exceptions.Exit(code) from error


@commands.command("runs")
@click.option("--state", help="Only runs in this state, such as failed.")
@click.option("--pipeline", help="Only runs of this pipeline.")
@click.option("--limit", type=click.IntRange(1, LIST_MAX), default=20, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="Print a list of runs.")
def _runs(state: str | None, pipeline: str | None, limit: int, as_json: bool) -> None:
    """List runs, newest first."""
    with _sentences(), _connected() as database:
        found = list_runs(database, state=state, pipeline=pipeline, limit=limit)
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        click.echo(table(found) if found else "There is no such run.")


@commands.command("resume")
@click.argument("run", required=False)
@click.option("--failed", is_flag=True, help="All failed runs that a resume can mend, instead of one RUN.")
@click.option("--pipeline", help="With --failed: only runs of this pipeline.")
@click.option("--since", "begin", help="With --failed: only what failed since 2h, 3d or an ISO time.")
@click.option("--plan", is_flag=True, help="With --failed: say what would be resumed, and do nothing.")
@click.option("--by", default=None, help="Who orders it, for the record (you).")
def _resume(
    run: str | None, *, failed: bool, pipeline: str | None, begin: str | None, plan: bool, by: str | None
) -> None:
    """Continue a failed run, by its whole id, from its last checkpoint; or all failed runs.

    Where more than 5 failed alike, one goes first, and the others only if it gets past the step that failed.
    """
    if failed == bool(run) or (run and (pipeline or begin or plan)):
        raise click.UsageError("Name a RUN, or use --failed, which --pipeline, --since and --plan belong to.")
    with _sentences(), _connected() as database:
        if run:
            agents = _client().run(run, connection=database).resume(by=by or getuser()).wait()["agents"]
            click.echo(f"Run {run} goes on{' with ' if agents else ''}{', '.join(agents)}.")
            return
        at = since(begin) if begin else None
        who = by or getuser()
        good = resume_failed(database, by=who, pipeline=pipeline, begin=at, plan=plan, tell=click.echo)
    if not good:
        raise click.exceptions.Exit(1)


@commands.command("approve")
@click.argument("run")
@click.argument("agent")
@click.option("--reason", help="Why, for the record.")
@click.option("--by", default=None, help="Who decides, for the record (you).")
@click.option("--yes", is_flag=True, help="Do not ask.")
def _approve(run: str, agent: str, reason: str | None, by: str | None, *, yes: bool) -> None:
    """Show what AGENT of RUN is about to work on, ask, and let it."""
    with _sentences(), _connected() as database:
        handle = _client().run(run, connection=database)
        ask = next((ask for ask in handle.status().asks if ask.agent == agent), None)
        if ask is None:
            raise Misuse(f"{agent} of run {run} waits for no decision.")
        click.echo(json.dumps(ask.shown, indent=2))
        if not yes:
            click.confirm(f"Approve {agent}?", abort=True)
        decided = handle.approve(agent, by=by or getuser(), reason=reason, digest=ask.digest).wait()["decision"]
        click.echo(f"{agent} is {decided}.")
