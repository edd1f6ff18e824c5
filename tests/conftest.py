"""What the tests share: real servers, a fresh database each, real worker processes, and no way out of this machine."""

import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest

ROOT = Path(__file__).parent.parent
_TEMPLATE = "stepfast_template"
_numbers = itertools.count(1)
# What the settings read: nothing of it comes from the developer's shell.
SETTINGS = ("STEPFAST_", "ANTHROPIC_", "LANGFUSE_", "LANGSMITH_", "OTEL_")


def eventually(check: Callable[[], object], *, within_s: float = 20.0, what: str = "") -> object:
    """Polls until `check` gives something true, and returns it. Fails loudly after `within_s`."""
    deadline = time.monotonic() + within_s
    pause = threading.Event()
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {within_s} s: {what or check}"
        pause.wait(0.02)


@pytest.fixture
def statements(monkeypatch) -> list[str]:
    """What this thread has Postgres do from now on: the first line of each statement."""
    made: list[str] = []
    thread, execute = threading.get_ident(), psycopg.Cursor.execute

    def noted(cursor, query, *args, **options):
        if threading.get_ident() == thread:
            made.append(str(query).strip().splitlines()[0])
        return execute(cursor, query, *args, **options)

    monkeypatch.setattr(psycopg.Cursor, "execute", noted)
    return made


@pytest.fixture(autouse=True)
def _no_way_out(monkeypatch):
    """Sockets to anything but this machine are refused."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in {socket.AF_INET, socket.AF_INET6} and address[0] not in {"127.0.0.1", "::1", "localhost"}:
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _bare_settings(monkeypatch):
    """No setting of the developer's shell reaches a test."""
    from app import settings

    for name in list(os.environ):
        if name.startswith(SETTINGS):
            monkeypatch.delenv(name)
    settings.load.cache_clear()
    yield
    settings.load.cache_clear()


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """Takes back all that `observe.logs.setup`, which any command or worker calls, sets for a whole process."""
    import structlog

    from app import events

    handlers, level, show = logging.root.handlers[:], logging.root.level, warnings.showwarning
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(events, "_subscribers", [])
    yield
    logging.captureWarnings(capture=False)
    warnings.showwarning = show
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()
    events.clear()


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    """One embedded Postgres and one Valkey for the whole session."""
    from app import embedded

    with embedded.servers(tmp_path_factory.mktemp("servers")) as running:
        yield running


@pytest.fixture(scope="session")
def _template(servers):
    import psycopg

    from app.runs.database import migrate

    with psycopg.connect(_plain(servers.database_url), autocommit=True) as connection:
        connection.execute(f"create database {_TEMPLATE}")
    migrate(_named(servers.database_url, _TEMPLATE))
    return _TEMPLATE


@contextmanager
def fresh_database(servers, template: str) -> Iterator[str]:
    """A migrated database of one's own."""
    import psycopg

    name = f"test_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(_plain(servers.database_url), autocommit=True) as connection:
        connection.execute(f"create database {name} template {template}")
    yield _named(servers.database_url, name)
    with psycopg.connect(_plain(servers.database_url), autocommit=True) as connection:
        connection.execute(f"drop database {name} with (force)")


@pytest.fixture
def database_template(_template):
    """What each test's database is a copy of; tests of a host add its tables."""
    return _template


@pytest.fixture
def database_url(servers, database_template):
    """A database of the test's own, migrated."""
    with fresh_database(servers, database_template) as url:
        yield url


@pytest.fixture
def fast_store(database_url):
    """A store for what is not about a crash of Postgres: its commits need not reach the disk."""
    from app.runs.database import engine
    from app.runs.store import Store

    made = Store(engine(f"{database_url}&options=-c%20synchronous_commit%3Doff", pool_max=4))
    yield made
    made.engine.dispose()


@pytest.fixture
def empty_database_url(servers):
    """A database of the test's own, not migrated."""
    import psycopg

    name = f"empty_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(_plain(servers.database_url), autocommit=True) as connection:
        connection.execute(f"create database {name}")
    yield _named(servers.database_url, name)
    with psycopg.connect(_plain(servers.database_url), autocommit=True) as connection:
        connection.execute(f"drop database {name} with (force)")


@pytest.fixture
def broker_url(servers):
    """A virtual host of Valkey, emptied."""
    url = f"{servers.broker_url.split('?')[0]}?virtual_host={next(_numbers) % 14 + 1}"
    with valkey(url) as client:
        client.flushdb()
    return url


def valkey(url: str):
    """A client of a broker's database, to look into it."""
    import redis

    path, _, number = url.removeprefix("redis+socket://").partition("?virtual_host=")
    return redis.Redis(unix_socket_path=path, db=int(number))


def _plain(url: str) -> str:
    return url.replace("postgresql+psycopg://", "postgresql://")


def _named(url: str, name: str) -> str:
    head, _, query = url.partition("?")
    return f"{head.rsplit('/', 1)[0]}/{name}?{query}"


def use_broker(celery, url: str) -> None:
    """Points this process's Celery app at a broker, and closes its connections to the one before."""
    import kombu.pools

    celery.conf.broker_url = celery.conf.broker_read_url = celery.conf.broker_write_url = url
    kombu.pools.reset()
    celery._pool = celery.amqp._producer_pool = None
    for kept in ("_event_dispatcher", "send_task_message"):  # they know how the last broker sends to all
        celery.amqp.__dict__.pop(kept, None)
    celery.set_current()  # which any other app that a test makes becomes


@dataclass
class System:
    """A database, a broker, and the workers that a test starts on them."""

    database_url: str
    broker_url: str
    folder: Path
    environ: dict[str, str]
    workers: list[subprocess.Popen] = field(default_factory=list)

    def use(self, database_url: str, broker_url: str) -> None:
        """Other servers, from now on."""
        self.database_url = self.environ["STEPFAST_DATABASE_URL"] = database_url
        self.broker_url = self.environ["STEPFAST_BROKER_URL"] = broker_url

    def start_worker(self, *, queues: str = "agents,handlers", pool: str = "threads", concurrency: int = 4, **env: str):
        """A real `celery worker` process, ready to take messages."""
        number = len(self.workers)
        log = self.folder / f"worker-{number}.log"
        argv = [
            *(sys.executable, "-m", "celery", "-A", "app", "worker", "-n", f"w{os.getpid()}-{next(_numbers)}@%h"),
            *("-Q", queues, "-P", pool, "-c", str(concurrency), "--without-mingle", "--without-gossip"),
        ]
        with log.open("wb") as stream:
            worker = subprocess.Popen(
                argv, cwd=ROOT, env=self.environ | env, stdout=stream, stderr=stream, start_new_session=True
            )
        worker.log = log
        self.workers.append(worker)
        eventually(
            lambda: b" ready." in log.read_bytes() or worker.poll() is not None, within_s=30, what="a ready worker"
        )
        assert worker.poll() is None, log.read_text()[-3000:]
        return worker

    def publish(self, here, folder: Path) -> str:
        """Loads and publishes a skill folder. Returns the pipeline's name."""
        from app import operations
        from app.pipelines import loader

        pipeline = loader.load(folder, aliases=here.settings.model_aliases, handler_modules=())
        operations.publish(here, pipeline)
        return pipeline.name

    def stop(self) -> None:
        for worker in self.workers:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()

    def run(self, run_id) -> dict:
        """The run as `stepfast show --json` gives it."""
        from app.runs.database import engine
        from app.runs.reads import Reads

        opened = engine(self.database_url, pool_max=1)
        try:
            return Reads(opened).run(run_id)
        finally:
            opened.dispose()

    def states(self, run_id) -> dict[str, str]:
        return {step["agent"]: step["state"] for step in self.run(run_id)["steps"]}

    def ended(self, run_id, *, within_s: float = 30.0) -> dict:
        """The run, once it is completed, failed or cancelled."""
        return eventually(
            lambda: (run := self.run(run_id))["ended_at"] and run, within_s=within_s, what=f"the end of {run_id}"
        )

    def logged(self, event: str) -> list[dict]:
        """Every line of this event in the workers' logs."""
        lines = [line for worker in self.workers for line in worker.log.read_text().splitlines()]
        parsed = [json.loads(line) for line in lines if line.startswith("{")]
        return [line for line in parsed if line["event"] == event]

    @contextmanager
    def here(self, monkeypatch) -> Iterator[object]:
        """The test process's own Worker on the same servers, to publish, start and resume with."""
        from app import settings
        from app.execution import worker

        for name, value in self.environ.items():
            if name.startswith(SETTINGS):
                monkeypatch.setenv(name, value)
        settings.load.cache_clear()
        from app.celery import celery

        use_broker(celery, self.broker_url)
        try:
            yield worker.current()
        finally:
            worker.stop()
            use_broker(celery, self.broker_url)


@pytest.fixture
def system(database_url, broker_url, tmp_path):
    """Servers without workers; `start_worker` adds them."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    environ |= {
        "STEPFAST_DATABASE_URL": database_url,
        "STEPFAST_BROKER_URL": broker_url,
        "STEPFAST_HOME": str(tmp_path / "home"),
        "STEPFAST_SKILLS": str(tmp_path / "skills"),
        "ANTHROPIC_API_KEY": "sk-ant-test",
    }
    running = System(database_url, broker_url, tmp_path, environ)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def rabbit(tmp_path_factory):
    """One RabbitMQ for the whole session; its URL."""
    from app.rabbitmq import RabbitMQ

    with RabbitMQ(tmp_path_factory.mktemp("rabbitmq")) as running:
        yield running.url()


@pytest.fixture
def here(system, monkeypatch):
    """The test process's Worker on the test's servers."""
    with system.here(monkeypatch) as current:
        yield current


@pytest.fixture
def write_skill(tmp_path):
    """Writes a skill folder of agents that are handlers, or of what the files say."""

    def write(agents: str, handlers: str = "", *, name: str = "tested", files: dict[str, str] | None = None) -> Path:
        folder = tmp_path / "skills" / name
        folder.mkdir(parents=True, exist_ok=True)
        body = textwrap.indent(textwrap.dedent(agents).strip(), "  ")
        (folder / f"{name}.skill.yaml").write_text(f"name: {name}\nversion: 1.0.0\nagents:\n{body}\n")
        if handlers:
            (folder / "handlers.py").write_text(textwrap.dedent(handlers))
        for place, text in (files or {}).items():
            (folder / place).parent.mkdir(exist_ok=True)
            (folder / place).write_text(textwrap.dedent(text))
        return folder

    return write


# Of the tests of `stepfast`, the client.


@pytest.fixture
def pipeline(system, here, write_skill):
    """A published pipeline, without workers."""
    from hosting import publish

    return publish(system, here, write_skill)


@pytest.fixture
def engine(database_url):
    """A host's own, of SQLAlchemy."""
    import sqlalchemy

    made = sqlalchemy.create_engine(database_url)
    yield made
    made.dispose()


@pytest.fixture
def client(database_url, broker_url):
    import stepfast

    return stepfast.Client(database_url, broker_url)
