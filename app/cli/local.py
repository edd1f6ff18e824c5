"""A whole system on this machine: servers, the simulator and the Procfile's processes, as long as a command runs."""

import fcntl
import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from app import settings
from app.cli.processes import OrderlyExit, Processes, procfile
from app.errors import Misuse, NotReady
from app.pipelines import loader
from app.settings import variable

LOOPBACK = "127.0.0.1"
FLOWER_PORT = 5555
WORKERS = ("agents", "handlers")
SCRIPT = "simulator.yaml"
_LAST_SKILLS = "last-skills"
ANSWER_TIMEOUT_S = 0.2
# Celery reads these too, and they stand in the shells of those who use Celery elsewhere.
_CELERYS = re.compile(r"CELERY_.*|APP|BROKER_URL|RESULT_BACKEND|LOADER|CONFIG_MODULE")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Running:
    """Where to look at what was started; None for what was not."""

    logs: Path
    simulator: str | None
    flower: str | None


def start_system(
    stack: OrderlyExit, skills: Sequence[Path], *, simulate: bool, names: Sequence[str] = WORKERS, say: Say
) -> Running:
    """Starts migrated servers and the Procfile's processes of these names; `stack` stops them.

    The servers are embedded ones where the settings name none; from then on this process's settings name them. Without
    skills it takes those that this home's workers had last. Raises NotReady where something does not start, or where
    this home has workers already; Misuse for two simulator scripts.
    """
    configured = settings.load()
    skills = skills or _last_skills(configured.home)
    if simulate:
        script_of(skills)  # refused before anything is started
    stack.enter_context(only_one(configured.home))
    if configured.database_url is None and configured.broker_url is None:
        stack.enter_context(embedded_servers(configured.home, say))
    else:
        configured.need_broker()
        migrate(say)
    return start_processes(stack, names, skills, simulate=simulate, say=say)


@contextmanager
def only_one(home: Path) -> Iterator[None]:
    """Raises NotReady where another system has its workers on this home: each would take the other's messages."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "workers.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise NotReady(
                f"Workers are running already on {home}, under process {file.read().strip() or '?'}.",
                next_step="Use them, end that process, or set STEPFAST_HOME to another folder.",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def embedded_servers(home: Path, say: Say) -> Iterator[None]:
    """The embedded servers of a home, migrated; inside, this process's settings name them."""
    from app.embedded import servers

    with (
        servers(home, on_progress=unfailing(say)) as found,
        _settings(
            home=home,
            database_url=found.database_url,
            session_database_url="",
            broker_url=found.broker_url,
            redis_url=found.broker_url,
        ),
    ):
        migrate(say)
        try:
            yield
        finally:
            _close_connections()


def migrate(say: Say) -> None:
    """Brings the database of the settings to this version's schema."""
    from app.runs import database

    before, after = database.migrate(settings.load().need_database())
    if before != after:
        say(f"Migrated the database to {after}.")


def start_processes(
    stack: OrderlyExit, names: Sequence[str], skills: Sequence[Path], *, simulate: bool, say: Say
) -> Running:
    """Starts the Procfile's processes of these names, and the simulator if asked for; `stack` stops them.

    A second process of a name is called `name.2`.
    """
    configured = settings.load()
    commands = {name: procfile()[_service(name)] for name in names}
    environ = _environment(configured, skills)
    ports: dict[str, int] = {}
    if "flower" in commands:
        ports["flower"] = free_port(FLOWER_PORT)
        environ |= {"FLOWER_ADDRESS": LOOPBACK, "FLOWER_PORT": str(ports["flower"])}
    if simulate:
        ports["simulator"] = free_port(0)
        environ = {name: value for name, value in environ.items() if not name.startswith("ANTHROPIC_")}
        environ |= {"ANTHROPIC_BASE_URL": _url(ports["simulator"]), "ANTHROPIC_API_KEY": "sk-simulated"}
        script = script_of(skills)
        chosen = f" --script {shlex.quote(str(script))}" if script else ""
        commands = {"simulator": f"python -m app.simulator --port {ports['simulator']}{chosen}", **commands}
    say(f"Starting {', '.join(commands)}.")
    logs = configured.home / "logs"
    with stack.held():
        processes = stack.enter_context(Processes(commands, environ, logs, unfailing(say), lambda: stack.hurry))
    (configured.home / _LAST_SKILLS).write_text("\n".join(map(str, _folders(skills))))
    processes.wait_ready(lambda name, pid: answers(ports[name]) if name in ports else _is_consuming(name, pid))
    return Running(logs, *(_url(ports[name]) if name in ports else None for name in ("simulator", "flower")))


def _last_skills(home: Path) -> list[Path]:
    """The folders of skills that workers on this home had last, without those that are gone."""
    try:
        found = map(Path, (home / _LAST_SKILLS).read_text().splitlines())
    except OSError:
        return []
    return [folder for folder in found if any(path.name.endswith(loader.SUFFIXES) for path in folder.glob("*"))]


def script_of(skills: Sequence[Path]) -> Path | None:
    """What the simulator answers to these skills. Raises Misuse where there are several scripts: it takes one."""
    found = [path for folder in _folders(skills) if (path := folder / SCRIPT).is_file()]
    if len(found) > 1:
        raise Misuse(f"Several of these skills have a {SCRIPT}, and the simulator takes one.")
    return found[0] if found else None


def _environment(configured: settings.Settings, skills: Sequence[Path]) -> dict[str, str]:
    """What the processes see: ours, with absolute paths, this installation's programs first, and Celery's own out."""
    folders = dict.fromkeys([*_folders(skills), *configured.skills])
    return bare_environ() | {
        variable("home"): str(configured.home),
        variable("skills"): os.pathsep.join(map(str, folders)),
    }


def bare_environ() -> dict[str, str]:
    """Our environment, with this installation's programs first, and what is meant for another Celery out."""
    environ = {name: value for name, value in os.environ.items() if not _CELERYS.fullmatch(name)}
    return environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])}


def _folders(skills: Sequence[Path]) -> list[Path]:
    return list(dict.fromkeys(map(folder_of, skills)))


def folder_of(skill: Path) -> Path:
    """The folder of a skill file. Raises InvalidFile."""
    return loader.find(skill).resolve().parent


@contextmanager
def _settings(**fields: object) -> Iterator[None]:
    """Changes this process's settings, by its environment, which its children get."""
    before = dict(os.environ)
    for name in filter(_CELERYS.fullmatch, before):
        del os.environ[name]
    os.environ.update({variable(name): str(value) for name, value in fields.items()})
    settings.load.cache_clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        settings.load.cache_clear()


def _close_connections() -> None:
    """Those of this process, before their server stops."""
    from app.execution import worker

    worker.stop()


def _is_consuming(name: str, pid: int) -> bool:
    """Whether a worker answers. It does so only after it began to take messages."""
    from app.celery import celery

    node = f"{_service(name)}-{pid}@{socket.gethostname()}"  # as the Procfile names it
    return bool(celery.control.ping(destination=[node], timeout=ANSWER_TIMEOUT_S, limit=1))


def _service(name: str) -> str:
    """The Procfile's name of a process: `agents` of `agents.2`."""
    return name.partition(".")[0]


def answers(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(ANSWER_TIMEOUT_S)
        return client.connect_ex((LOOPBACK, port)) == 0


def free_port(wanted: int) -> int:
    """`wanted`, or where that is taken, another one. Who takes it meanwhile makes its process fail, by name."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, wanted))
        except OSError:
            probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def program() -> str:
    """How `stepfast` is typed here."""
    own = Path(sys.executable).parent / "stepfast"
    found = shutil.which("stepfast")
    if found and Path(found).resolve() == own.resolve():
        return "stepfast"
    try:
        return shlex.quote(str(own.relative_to(Path.cwd())))
    except ValueError:
        return shlex.quote(str(own))


def say(sentence: str) -> None:
    """For people who watch: a line, at once."""
    print(sentence, flush=True)


def unfailing(say: Say) -> Say:
    """`say`, where its failure must stop nothing: the terminal is closed, or the pipe's reader is gone."""

    def said(sentence: str) -> None:
        with suppress(OSError):
            say(sentence)

    return said


def _url(port: int) -> str:
    return f"http://{LOOPBACK}:{port}"
