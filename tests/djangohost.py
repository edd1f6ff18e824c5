"""A Django host for the tests: the project of examples/django_shop, on the test's own database, in processes of its own."""

import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
from conftest import ROOT, _named, _numbers, eventually
from hosting import plain

from app.cli import local

SHOP = ROOT / "examples" / "django_shop"
PASSWORD = "of-the-tests"


@dataclass
class Host:
    """`environ` is the host's own: it knows nothing of the workers' variables."""

    environ: dict[str, str]

    def run(self, *argv: str, check: bool = True, **more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", *argv]
        done = subprocess.run(
            command, cwd=SHOP, env=self.environ | more, capture_output=True, text=True, timeout=100, check=False
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def manage(self, *arguments: str, check: bool = True, **more: str) -> subprocess.CompletedProcess:
        return self.run("manage.py", *arguments, check=check, **more)

    def script(self, text: str, *, check: bool = True, **more: str) -> str:
        """What a script prints, that begins where a view would: with the project set up."""
        code = "import django; django.setup()\n" + textwrap.dedent(text)
        return self.run("-c", code, check=check, **more).stdout

    @contextmanager
    def started(self, *argv: str, log: Path):
        """A process that goes on; `log` has what it says."""
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, *argv], cwd=SHOP, env=self.environ, stdout=stream, stderr=stream
            )
        process.log = log
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    @contextmanager
    def served(self):
        """The address of a web server."""
        port = local.free_port(0)
        argv = [sys.executable, "manage.py", "runserver", "--noreload", "--insecure", f"127.0.0.1:{port}"]
        with subprocess.Popen(
            argv, cwd=SHOP, env=self.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as server:
            try:
                eventually(lambda: local.answers(port) or server.poll() is not None, within_s=60, what="a web server")
                assert server.poll() is None, server.stdout.read()
                yield f"http://127.0.0.1:{port}"
            finally:
                server.kill()
                server.communicate()


def environment(database_url: str, broker_url: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("STEPFAST_", "ANTHROPIC_"))}
    return kept | {
        "DJANGO_SETTINGS_MODULE": "shop.settings",
        "EXAMPLE_DATABASE_URL": plain(database_url),
        "EXAMPLE_BROKER_URL": broker_url,
        "EXAMPLE_PASSWORD": PASSWORD,
        "SHOP_SECRET": "of the tests",
        "PYTHONPATH": str(SHOP),
    }


@contextmanager
def template(servers, source: str):
    """The name of a database to copy: Stepfast's, with the host's own tables, and its user admin."""
    name = f"django_template_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(plain(servers.database_url), autocommit=True) as connection:
        connection.execute(f"create database {name} template {source}")
    host = Host(environment(_named(servers.database_url, name), "redis://127.0.0.1:1/0"))
    host.script("""
        from django.core.management import call_command
        call_command("migrate", verbosity=0)
        call_command("sign_in_as_admin")
    """)
    yield name
    with psycopg.connect(plain(servers.database_url), autocommit=True) as connection:
        connection.execute(f"drop database {name} with (force)")
