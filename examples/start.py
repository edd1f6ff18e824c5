"""Starts an example, with everything that it needs, until Ctrl-C: `python examples/start.py django_shop`.

Embedded servers, workers with a simulated Claude, and the example's own web server, all on this machine alone. The web
server knows Stepfast only by the package `stepfast`, and signs in to Postgres as an operator, which owns nothing of it.
"""

import os
import secrets
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import psycopg
from psycopg import sql

from app import settings
from app.cli import local
from app.cli.processes import OrderlyExit, Processes
from app.errors import StepfastError
from app.settings import variable

HERE = Path(__file__).resolve().parent
PORT = 8000
PREPARE_TIMEOUT_S = 120


@dataclass(frozen=True)
class Example:
    """`prepare` are commands that are done once; `web` serves, with the port in place of {port}."""

    skill: str
    prepare: tuple[tuple[str, ...], ...]
    web: str
    environ: dict[str, str] = field(default_factory=dict)
    note: str = ""


EXAMPLES = {
    "django_shop": Example(
        "fulfilment",
        (("manage.py", "migrate", "--verbosity=0"), ("manage.py", "sign_in_as_admin")),
        "manage.py runserver --noreload --insecure 127.0.0.1:{port}",
        {"PYTHONPATH": "{folder}", "DJANGO_SETTINGS_MODULE": "shop.settings", "SHOP_SECRET": secrets.token_urlsafe(40)},
        "The admin is at /admin/: user admin, password ",
    ),
    "flask_desk": Example(
        "triage",
        (("-m", "flask", "--app", "app", "create-tables"),),
        "-m flask --app app run --port {port}",
        {"DESK_SECRET": secrets.token_urlsafe(40)},
    ),
}


def main(name: str) -> None:
    example, folder = EXAMPLES[name], HERE / name
    os.environ[variable("home")] = str(settings.load().home / name)
    settings.load.cache_clear()
    home, password = settings.load().home, secrets.token_urlsafe(12)
    with OrderlyExit() as stack, suppress(KeyboardInterrupt):
        stack.enter_context(local.only_one(home))
        stack.enter_context(local.embedded_servers(home, local.say))
        url = _sign_in(name)
        os.environ.update({name: value.format(folder=folder) for name, value in example.environ.items()})
        os.environ |= {"EXAMPLE_DATABASE_URL": url, "EXAMPLE_BROKER_URL": settings.load().need_broker()}
        for command in example.prepare:
            _do(folder, command, password)
        local.start_processes(stack, local.WORKERS, [folder / example.skill], simulate=True, say=local.say)
        _publish(folder / example.skill)
        port = local.free_port(PORT)
        # The web server is told nothing of the workers' own.
        environ = {name: value for name, value in os.environ.items() if not name.startswith("STEPFAST_")}
        arguments = example.web.format(port=port)
        web = f"cd {folder} && exec {sys.executable} {arguments}"
        with stack.held():
            started = Processes({"web": f"sh -c '{web}'"}, environ, home / "logs", local.say, lambda: stack.hurry)
            stack.enter_context(started)
        started.wait_ready(lambda _name, _pid: local.answers(port))
        local.say(f"Open http://127.0.0.1:{port}/ in a browser. {example.note}{password if example.note else ''}")
        local.say("Ctrl-C stops everything.")
        Event().wait()
    local.say("Stopped.")


def _sign_in(name: str) -> str:
    """The URL of the example's own role: it may make tables of its own, and order what people order of runs."""
    from app.runs.database import allow

    url = settings.load().need_database()
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        if connection.execute("select from pg_roles where rolname = %s", (name,)).fetchone() is None:
            connection.execute(sql.SQL("create role {} login").format(sql.Identifier(name)))
        connection.execute(sql.SQL("grant create on schema public to {}").format(sql.Identifier(name)))
    allow(url, {name: "operator"})
    return url.replace("+psycopg", "").replace("postgres@", f"{name}@", 1)


def _do(folder: Path, command: tuple[str, ...], password: str) -> None:
    subprocess.run(  # noqa: S603  # the example's own command
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | {"EXAMPLE_PASSWORD": password},
        check=True,
        timeout=PREPARE_TIMEOUT_S,
    )


def _publish(skill: Path) -> None:
    from app import operations
    from app.cli import system
    from app.execution import worker

    operations.publish(worker.current(), system.load_skill(skill))


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in EXAMPLES:
        sys.exit(f"Name one of {', '.join(EXAMPLES)}.")
    try:
        main(sys.argv[1])
    except StepfastError as problem:
        local.say(f"Error: {problem}")
        sys.exit(problem.exit_code)
