"""A standby that is promoted knows of no lock that workers held on the server before it: nobody is taken for dead there."""

import os
import signal
import subprocess
from contextlib import contextmanager

import pytest
from benches import Bench
from conftest import eventually
from pipelines import line
from sqlalchemy import make_url, text

from app import embedded
from app.runs.database import engine
from app.runs.store import Store

LEASE_S = 4
PORT = 5433  # part of the socket's file name; nothing listens on TCP


@contextmanager
def standby(folder, database_url):
    """A hot standby of a database's server, and the URL of the same database there."""
    folder.mkdir(mode=0o700)
    place = embedded._place(folder)
    programs = place.postgres_wheel / "pginstall" / "bin"
    address = make_url(database_url)
    data = folder / "data"
    data.mkdir(mode=0o700)
    os.chown(data, place.uid, place.gid)
    source = ("-h", address.query["host"], "-p", address.query["port"], "-U", address.username)
    subprocess.run(
        [*place.run_as, programs / "pg_basebackup", "-D", data, "-R", "-X", "stream", "-c", "fast", *source],
        check=True,
        capture_output=True,
    )
    options = ("-k", place.sockets, "-p", str(PORT), "-c", "listen_addresses=", "-c", f"external_pid_file={folder}/pid")
    log = folder / "log"
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [*place.run_as, programs / "postgres", "-D", data, *options], stdout=stream, stderr=stream
        )
    try:
        ready = b"ready to accept read-only connections"
        eventually(lambda: ready in log.read_bytes() or server.poll() is not None, what="the standby")
        assert server.poll() is None, log.read_text()[-2000:]
        query = {**address.query, "host": str(place.sockets), "port": str(PORT)}
        yield address.set(query=query).render_as_string(hide_password=False)
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait(20)


@pytest.mark.slow
def test_nobody_is_dead_for_a_lease_after_a_failover(database_url, tmp_path):
    """The standby itself started long before: what counts is since when it is the one that workers hold locks on."""
    primary = Store(engine(database_url, pool_max=1))
    bench = Bench(primary)
    run = bench.start(line("a"))
    bench.claim(run, "a")
    bench.sql("update stepfast.workers set lease_until = stepfast.now()")
    with standby(tmp_path / "standby", database_url) as url:
        promoted = Store(engine(url, pool_max=1))
        old = f"select clock_timestamp() - pg_postmaster_start_time() > interval '{LEASE_S} s'"
        eventually(lambda: _is(promoted, old), within_s=40, what="an old standby")
        assert _is(promoted, "select pg_promote()")
        bench.store = promoted
        assert bench.sweep(lease_ms=LEASE_S * 1000).lost == ()
        # The truce is over after a lease. Whoever has not come by then is looked at, and is dead.
        found = eventually(lambda: bench.sweep(lease_ms=LEASE_S * 1000).lost, what="the end of the truce")
        assert found == (bench.worker_id,)
        assert _is(promoted, f"select clock_timestamp() - since > interval '{LEASE_S} s' from stepfast.awake")
        promoted.engine.dispose()
    primary.engine.dispose()


def _is(store, question: str) -> bool:
    with store.engine.connect() as connection:
        return bool(connection.execute(text(question)).scalar())
