"""A PgBouncer of the tests' own, from Debian's package: transaction mode, a unix socket, a folder of its own."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conftest import eventually
from sqlalchemy import make_url

from app import embedded

SERVER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
MISSING = "Debian's pgbouncer is not installed"
PORT = 6432  # part of the socket's file name; nothing listens on TCP


@contextmanager
def running(folder: Path, database_url: str) -> Iterator[str]:
    """Starts it before the server of a database, and gives the database's URL through it.

    It drops each connection to the server that is idle for a second, as it does in production after ten minutes: with
    it goes whatever somebody believed to hold there.
    """
    address = make_url(database_url)
    folder.mkdir()
    (folder / "users.txt").write_text(f'"{address.username}" ""\n')
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\n* = host={address.query['host']} port={address.query['port']}\n"
        f"[pgbouncer]\nlisten_addr =\nlisten_port = {PORT}\nunix_socket_dir = {folder}\nauth_type = trust\n"
        f"auth_file = {folder / 'users.txt'}\n"
        f"pool_mode = transaction\ndefault_pool_size = 5\nserver_idle_timeout = 1\nserver_lifetime = 3\n"
    )
    _, _, as_nobody = embedded._server_user()  # it refuses root, as Postgres does
    log = folder / "server.log"
    with log.open("wb") as stream:
        server = subprocess.Popen([*as_nobody, SERVER, str(folder / "pgbouncer.ini")], stdout=stream, stderr=stream)
    try:
        socket = folder / f".s.PGSQL.{PORT}"
        eventually(lambda: socket.exists() or server.poll() is not None, what="PgBouncer")
        assert server.poll() is None, log.read_text()[-2000:]
        query = {**address.query, "host": str(folder), "port": str(PORT)}
        yield address.set(query=query).render_as_string(hide_password=False)
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(10)
        finally:
            server.kill()
            server.wait()
