"""The private servers of a crash test: Postgres, and Valkey or RabbitMQ, in a folder of its own."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from app import embedded
from app.crashtest.proxy import Proxy
from app.errors import NotReady
from app.rabbitmq import RabbitMQ

Broker = Literal["valkey", "rabbitmq"]
DOWN_TIMEOUT_S = 30.0
POLL_S = 0.02
DATABASE = "crashtest"


class Servers:
    """Each lane has a database and a virtual host of its own on them. `stack` ends what is started again."""

    def __init__(self, stack: ExitStack, home: Path, broker: Broker, say: Callable[[str], None]) -> None:
        self._stack = stack
        self._home = home
        running = stack.enter_context(embedded.servers(home, on_progress=say))
        self._rabbitmq: RabbitMQ | None = None
        if broker == "rabbitmq":
            say("Starting RabbitMQ.")
            self._rabbitmq = stack.enter_context(RabbitMQ(home / "rabbitmq"))
        from sqlalchemy.engine import make_url

        self._database = make_url(running.database_url)
        self._valkey = running.broker_url.partition("?")[0]

    def make_lanes(self, count: int) -> None:
        """A migrated database for each lane, and a place on the broker."""
        import psycopg

        from app.runs.database import migrate

        plain = self.database_url(None).replace("postgresql+psycopg://", "postgresql://")
        with psycopg.connect(plain, autocommit=True) as connection:
            connection.execute(f"create database {DATABASE}0")
            migrate(self.database_url(0))
            for lane in range(1, count):
                connection.execute(f"create database {DATABASE}{lane} template {DATABASE}0")
        if self._rabbitmq and count > 1:
            self._rabbitmq.add_virtual_hosts([f"lane{lane}" for lane in range(1, count)])

    def database_url(self, lane: int | None) -> str:
        name = self._database.database if lane is None else f"{DATABASE}{lane}"
        return self._database.set(database=name).render_as_string(hide_password=False)

    def broker_url(self, lane: int) -> str:
        if self._rabbitmq:
            return self._rabbitmq.url(f"lane{lane}" if lane else "/")
        return f"{self._valkey}?virtual_host={lane}"

    @contextmanager
    def proxy(self, lane: int) -> Iterator[tuple[Proxy, str]]:
        """A way to a lane's database that can be cut, and its URL."""
        query = self._database.query
        with Proxy(Path(str(query["host"])) / f".s.PGSQL.{query['port']}") as proxy:
            url = self._database.set(
                host=proxy.host, port=proxy.port, database=f"{DATABASE}{lane}", query={"sslmode": "disable"}
            )
            yield proxy, url.render_as_string(hide_password=False)

    @contextmanager
    def postgres_away(self, number: signal.Signals) -> Iterator[None]:
        """Ends Postgres: SIGINT is its fast shutdown, SIGQUIT its immediate one. It is back after the block."""
        self._end("postgres", number)
        yield
        self._stack.enter_context(embedded.servers(self._home))

    @contextmanager
    def broker_away(self, *, forgets: bool) -> Iterator[None]:
        """Ends the broker; afterwards it is back, with the messages that it kept, or with nothing at all."""
        if self._rabbitmq:
            self._rabbitmq.stop(at_once=True)
            yield
            if forgets:
                self._rabbitmq.forget()
            self._rabbitmq.start()
        else:
            self._end("valkey", signal.SIGTERM)
            yield
            if forgets:
                for file in (self._home / "servers" / "valkey").rglob("*"):
                    if file.is_file():
                        file.unlink()
            self._stack.enter_context(embedded.servers(self._home))

    def _end(self, name: str, number: signal.Signals) -> None:
        os.kill(embedded.running(self._home)[name], number)
        deadline = time.monotonic() + DOWN_TIMEOUT_S
        while name in embedded.running(self._home):
            if time.monotonic() > deadline:
                raise NotReady(f"The embedded {name} did not end within {DOWN_TIMEOUT_S:.0f} s.")
            time.sleep(POLL_S)
