"""Private servers, a simulator and real workers, and what can be done to them: kill, freeze, cut, wipe, restart."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

ROOT = Path(__file__).resolve().parent.parent
SKILLS = Path(__file__).resolve().parent / "skills"
sys.path.insert(0, str(ROOT))

from sqlalchemy import text  # noqa: E402  # after the path

from app import embedded, operations, settings  # noqa: E402
from app.execution import worker as our_worker  # noqa: E402
from app.execution.persistence import through_outage  # noqa: E402
from app.pipelines import loader  # noqa: E402
from app.rabbitmq import RabbitMQ  # noqa: E402
from app.runs.database import migrate  # noqa: E402

T = TypeVar("T")
READY_TIMEOUT_S = 90.0
POLL_S = 0.01
STARTED_AT_ONCE = 500
# No session of ours waits longer for a Postgres that is away on purpose.
OUTAGE_MAX_S = 180


class TookTooLong(Exception):
    """What was waited for did not come: no figure can be given."""


def eventually(check: Callable[[], T], *, within_s: float, what: str) -> T:
    """What `check` gives, once it is true. Raises TookTooLong."""
    deadline = time.monotonic() + within_s
    while not (found := check()):
        if time.monotonic() > deadline:
            raise TookTooLong(f"not within {within_s:.0f} s: {what}")
        time.sleep(POLL_S)
    return found


@dataclass(slots=True)
class Worker:
    """One `celery worker`, leading a process group of its own."""

    process: subprocess.Popen[bytes]
    log: Path
    pool: str

    @property
    def ready(self) -> bool:
        return self.process.poll() is None and b" ready." in self.log.read_bytes()

    def pids(self) -> list[int]:
        """It and its children."""
        return [int(stat[0]) for stat in _stats() if int(stat[4]) == self.process.pid]

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the whole group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()


@dataclass(slots=True)
class System:
    """What runs now. Its client is this process, on the same servers."""

    home: Path
    broker: str
    say: Callable[[str], None]
    environ: dict[str, str]
    simulator: str
    _servers: ExitStack
    workers: list[Worker] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    # Workers.

    def start_worker(
        self,
        pool: str = "threads",
        concurrency: int = 8,
        *,
        queues: str = "agents,handlers",
        ready: bool = True,
        **env: str,
    ) -> Worker:
        """Starts one; `ready` waits until it takes messages. `env` changes its environment."""
        number = next(self._numbers)
        log = self.home / f"worker-{number}.log"
        argv = [
            *(sys.executable, "-m", "celery", "-A", "app", "worker", "-n", f"soak-{os.getpid()}-{number}@%h"),
            *("-Q", queues, "-P", pool, "-c", str(concurrency), "--without-mingle", "--without-gossip"),
        ]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                argv, cwd=ROOT, env=self.environ | env, stdout=stream, stderr=stream, start_new_session=True
            )
        started = Worker(process, log, pool)
        self.workers.append(started)
        if ready:
            self.await_ready([started])
        return started

    def await_ready(self, workers: Sequence[Worker]) -> None:
        """Waits until all of them take messages. Raises TookTooLong with the end of a log."""
        for worker in workers:
            try:
                eventually(lambda w=worker: w.ready, within_s=READY_TIMEOUT_S, what="a ready worker")  # type: ignore[misc]
            except TookTooLong as error:
                raise TookTooLong(f"{error}; the end of its log:\n{worker.log.read_text()[-2_000:]}") from None

    def end(self, workers: Sequence[Worker]) -> None:
        """Kills workers that are no longer needed."""
        for worker in workers:
            worker.signal(signal.SIGKILL)
            self.workers.remove(worker)

    def logged(self, event: str) -> int:
        """How often the workers logged an event, those that have ended too."""
        needle = f'"event": "{event}"'
        return sum(log.read_text(errors="replace").count(needle) for log in self.home.glob("worker-*.log"))

    # Servers.

    def stop_postgres(self, how: signal.Signals) -> None:
        """SIGINT ends it in order, SIGQUIT at once, as a crash does."""
        pid = embedded.running(self.home)["postgres"]
        os.kill(pid, how)
        eventually(lambda: not Path(f"/proc/{pid}").exists(), within_s=30, what="the end of Postgres")

    def start_postgres(self) -> None:
        """Starts it again, with its data."""
        self._servers.enter_context(embedded.servers(self.home))

    def wipe_broker(self) -> None:
        """Every message is gone, those that are being worked on too."""
        from app.celery import celery

        with celery.connection_for_write() as connection, connection.channel() as channel:
            if self.broker == "rabbitmq":
                for queue in ("agents", "handlers"):
                    channel.queue_purge(queue)
            else:
                channel.client.flushall()

    def cut_sessions(self) -> list[int]:
        """Ends the session that shows that a process lives, of every process. Returns their workers' ids."""
        ids = [row.id for row in self.rows("select id from stepfast.workers where ended_at is null")]
        self.rows(
            "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'stepfast-presence'"
            " and datname = current_database()"
        )
        return ids

    # The client.

    def rows(self, statement: str, **parameters: object) -> list[Any]:
        """What a statement gives, also through an outage."""

        def ask() -> list[Any]:
            with our_worker.current().store.engine.connect() as connection:
                result = connection.execute(text(statement), parameters)
                return list(result) if result.returns_rows else []

        return through_outage(ask, max_s=OUTAGE_MAX_S)

    def value(self, statement: str, **parameters: object) -> Any:  # noqa: ANN401  # a column
        return self.rows(statement, **parameters)[0][0]

    def start_run(self, pipeline: str, run_input: dict[str, Any], key: str) -> UUID:
        """Starts a run, once, whatever is away meanwhile."""
        started = through_outage(
            lambda: operations.start(our_worker.current(), pipeline, run_input, key=key), max_s=OUTAGE_MAX_S
        )
        return started.run_id

    def start_runs(self, pipeline: str, run_input: dict[str, Any], prefix: str, runs: int) -> None:
        """Starts so many, by plain SQL, STARTED_AT_ONCE a transaction; their keys are the prefix and a number."""
        for first in range(1, runs + 1, STARTED_AT_ONCE):
            self.rows(
                "select count(*) from generate_series(cast(:first as int), cast(:last as int)) n,"
                " stepfast.enqueue_v1(:pipeline, cast(:input as jsonb), p_key => :prefix || n)",
                first=first,
                last=min(first + STARTED_AT_ONCE - 1, runs),
                pipeline=pipeline,
                input=json.dumps(run_input),
                prefix=prefix,
            )

    def ended_runs(self, prefix: str) -> int:
        """How many runs whose key begins so have ended."""
        return int(
            self.value("select count(*) from stepfast.runs where key like :k and ended_at is not null", k=f"{prefix}%")
        )

    def ended(self, run_id: object) -> bool:
        return bool(self.value("select ended_at is not null from stepfast.runs where id = :r", r=run_id))

    def executing(self, pids: Sequence[int]) -> list[Any]:
        """The attempts, by agent, that these processes execute."""
        return self.rows(
            "select a.agent, a.run_id from stepfast.attempts a join stepfast.workers w on w.id = a.worker_id"
            " where a.state = 'executing' and w.pid = any(:pids) and w.ended_at is null",
            pids=list(pids),
        )

    # The simulator.

    def script(self, *, delay_ms: int, **delays_ms: int) -> None:
        """How long each agent's calls take; also forgets the calls that were counted."""
        rules = [
            {
                "match": {"system": f"the {agent} of"},
                "delay_ms": delays_ms.get(agent, delay_ms),
                "reply": {"text": agent},
            }
            for agent in ("research", "code", "review", "report")
        ]
        self._ask("script", json.dumps({"rules": rules}).encode())

    def calls(self) -> int:
        """How many calls were made since the last script."""
        return int(self._ask("state")["requests"])

    def calls_in_flight(self) -> int:
        return int(self._ask("state")["in_flight"])

    def arrivals(self) -> list[float]:
        """When the last calls arrived, in seconds since 1970."""
        return [request["at"] for request in self._ask("requests")]

    def _ask(self, path: str, body: bytes | None = None) -> Any:  # noqa: ANN401  # JSON
        request = urllib.request.Request(f"{self.simulator}/_simulator/{path}", data=body)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"null")


@contextmanager
def system(home: Path, broker: str, say: Callable[[str], None]) -> Iterator[System]:
    """Everything but workers, which `start_worker` adds; all of it is ended at the end."""
    with ExitStack() as servers:
        found = servers.enter_context(embedded.servers(home, on_progress=say))
        broker_url = found.broker_url
        if broker == "rabbitmq":
            say("Starting RabbitMQ.")
            broker_url = servers.enter_context(RabbitMQ(home / "rabbitmq")).url()
        migrate(found.database_url)
        simulator = servers.enter_context(_simulator(home))
        environ = {
            name: value for name, value in os.environ.items() if not name.startswith(("STEPFAST_", "ANTHROPIC_"))
        }
        given = {
            "STEPFAST_DATABASE_URL": found.database_url,
            "STEPFAST_BROKER_URL": broker_url,
            "STEPFAST_HOME": str(home),
            "STEPFAST_SKILLS": str(SKILLS),
            "ANTHROPIC_BASE_URL": simulator,
            "ANTHROPIC_API_KEY": "sk-simulated",
        }
        running = System(home, broker, say, environ | given, simulator, servers)
        servers.enter_context(_client(given))
        for skill in ("soak", "held", "chain"):
            pipeline = loader.load(SKILLS / skill, aliases=settings.load().model_aliases, handler_modules=())
            operations.publish(our_worker.current(), pipeline)
        try:
            yield running
        finally:
            for worker in running.workers:
                worker.signal(signal.SIGKILL)


@contextmanager
def _client(given: dict[str, str]) -> Iterator[None]:
    """Until the end our own settings name the servers."""
    before = dict(os.environ)
    os.environ.update(given)
    settings.load.cache_clear()
    from app.celery import celery

    celery.conf.broker_url = celery.conf.broker_read_url = celery.conf.broker_write_url = given["STEPFAST_BROKER_URL"]
    try:
        yield
    finally:
        our_worker.stop()
        celery.close()
        celery.amqp._producer_pool = None  # noqa: SLF001  # the next system's messages would go to this one's broker
        os.environ.clear()
        os.environ.update(before)
        settings.load.cache_clear()


@contextmanager
def _simulator(home: Path) -> Iterator[str]:
    """A process of its own: its work is not ours."""
    log = home / "simulator.log"
    argv = [sys.executable, "-m", "app.simulator"]
    with log.open("wb") as stream:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=stream, stderr=stream)
    try:
        eventually(lambda: "http" in log.read_text(), within_s=READY_TIMEOUT_S, what="the simulator")
        yield log.read_text().split()[-1]
    finally:
        process.terminate()
        process.wait()


@contextmanager
def spinning(processes: int) -> Iterator[None]:
    """A busy machine: so many processes that only compute."""
    spinners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.wait()


@contextmanager
def relay(home: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Postgres's address behind a process that passes bytes on: stopped, it is a network cut without a word."""
    source = settings.load().need_database()
    server = source.split("host=")[1].split("&")[0]
    folder = home / "relay"
    folder.mkdir(mode=0o700)
    listen = folder / ".s.PGSQL.5432"
    argv = [sys.executable, Path(__file__).with_name("relay.py"), listen, f"{server}/{listen.name}"]
    process = subprocess.Popen(argv)
    try:
        eventually(listen.exists, within_s=30, what="the relay")
        yield source.replace(server, str(folder)), process
    finally:
        process.kill()
        process.wait()


def cpu_s(pids: Sequence[int]) -> float:
    """The processor time that these processes have used."""
    ticks = sum(int(stat[13]) + int(stat[14]) for stat in _stats() if int(stat[0]) in pids)
    return ticks / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    return [int(stat[0]) for stat in _stats() if int(stat[3]) == pid]


def _stats() -> Iterator[list[str]]:
    """/proc/PID/stat of every process, split; the name's spaces are out."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            head, _, tail = file.read_text().rpartition(")")
            pid, _, _name = head.partition(" ")
            yield [pid, "", *tail.split()]
