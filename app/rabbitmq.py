"""A RabbitMQ of our own, from Debian's package, on private loopback ports: for tests and crash tests."""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from app.errors import NotReady

PROGRAMS = Path("/usr/lib/rabbitmq/bin")
MISSING = "Debian's rabbitmq-server is not installed"
LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
TOOL_TIMEOUT_S = 60.0
POLL_S = 0.05
LOG_TAIL_MAX_BYTES = 2_000


def installed() -> bool:
    return (PROGRAMS / "rabbitmq-server").exists() and shutil.which("erl") is not None


class RabbitMQ:
    """Runs between `with` and its end; `stop`, `forget` and `start` in between keep its ports. Raises NotReady."""

    def __init__(self, folder: Path) -> None:
        if not installed():
            raise NotReady(f"{MISSING}.", next_step="Install it: apt-get install rabbitmq-server.")
        self._folder = folder
        self._port, distribution, self._epmd_port = _free_ports(3)
        self._server: subprocess.Popen[bytes] | None = None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "enabled_plugins").write_text("[].")
        (folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = {LOOPBACK}:{self._port}\nloopback_users.guest = true\n"
        )
        # Of our own environment it needs where its programs are, and nothing else.
        self._environ = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(folder),
            "RABBITMQ_NODENAME": f"stepfast{os.getpid()}-{self._port}@localhost",
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_DIST_PORT": str(distribution),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()
        # The name server that it started is a daemon of its own.
        subprocess.run(["epmd", "-port", str(self._epmd_port), "-kill"], capture_output=True, check=False)  # noqa: S603, S607

    def url(self, virtual_host: str = "/") -> str:
        return f"amqp://guest:guest@{LOOPBACK}:{self._port}/{virtual_host}"

    def start(self) -> None:
        """Starts it with the data that it had, and waits until it takes connections."""
        log = self._folder / "server.log"
        with log.open("wb") as stream:
            self._server = subprocess.Popen(  # noqa: S603  # Debian's program, no user's text
                [PROGRAMS / "rabbitmq-server"],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                cwd=self._folder,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._listens():
            ended = self._server.poll() is not None
            if ended or time.monotonic() > deadline:
                tail = log.read_bytes()[-LOG_TAIL_MAX_BYTES:].decode(errors="replace").strip()
                raise NotReady(
                    f"RabbitMQ {'ended' if ended else 'was not ready in time'}; the end of its log:\n{tail}\n",
                    next_step="Mend what the log names.",
                )
            time.sleep(POLL_S)

    def stop(self, *, at_once: bool = False) -> None:
        """Ends it in its own way, or at last, or `at_once`, by force; its data stays."""
        if self._server is None:
            return
        for number in (signal.SIGKILL,) if at_once else (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._server.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._server.wait(STOP_TIMEOUT_S)
        self._server = None

    def forget(self) -> None:
        """Removes its data: queues, messages, virtual hosts. Only while it is stopped."""
        assert self._server is None
        shutil.rmtree(self._folder / "mnesia")

    def add_virtual_hosts(self, names: list[str]) -> None:
        """Makes virtual hosts that its only user may use; one run of its tool for all, which takes seconds."""
        calls = ", ".join(
            f'rabbit_vhost:add(<<"{name}">>, <<"stepfast">>), '
            f'rabbit_auth_backend_internal:set_permissions(<<"guest">>, <<"{name}">>, '
            '<<".*">>, <<".*">>, <<".*">>, <<"stepfast">>)'
            for name in names
        )
        done = subprocess.run(  # noqa: S603
            [PROGRAMS / "rabbitmqctl", "eval", f"{calls}."],
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=TOOL_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise NotReady(f"RabbitMQ's tool failed: {(done.stderr or done.stdout).strip()[-LOG_TAIL_MAX_BYTES:]}")

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((LOOPBACK, self._port)) == 0


def _free_ports(count: int) -> list[int]:
    """All probed before any is given back, so that they differ."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
