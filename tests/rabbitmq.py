"""A RabbitMQ of the tests' own, from Debian's package: private ports, a folder of its own, ended with the session."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conftest import eventually

SERVER = "/usr/lib/rabbitmq/bin/rabbitmq-server"
MISSING = "Debian's rabbitmq-server is not installed"


def installed() -> bool:
    return Path(SERVER).exists() and shutil.which("erl") is not None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running(folder: Path) -> Iterator[str]:
    """Starts it and gives its URL."""
    port, distribution, epmd = _free_port(), _free_port(), _free_port()
    (folder / "enabled_plugins").write_text("[].")
    (folder / "rabbitmq.conf").write_text(f"listeners.tcp.1 = 127.0.0.1:{port}\nloopback_users = none\n")
    environ = os.environ | {
        "HOME": str(folder),
        "RABBITMQ_NODENAME": f"test{os.getpid()}@localhost",
        "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
        "RABBITMQ_LOG_BASE": str(folder / "log"),
        "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
        "RABBITMQ_DIST_PORT": str(distribution),
        "ERL_EPMD_PORT": str(epmd),
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
    }
    log = folder / "server.log"
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [SERVER], env=environ, stdout=stream, stderr=stream, start_new_session=True, cwd=folder
        )
    try:
        eventually(lambda: _listens(port) or server.poll() is not None, within_s=60, what="RabbitMQ")
        assert server.poll() is None, log.read_text()[-2000:]
        yield f"amqp://guest:guest@127.0.0.1:{port}//"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            server.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        # The name server that it started is a daemon of its own.
        subprocess.run(["epmd", "-port", str(epmd), "-kill"], capture_output=True, check=False)
