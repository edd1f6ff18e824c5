"""Agents without a model: Python functions of one argument, found, called, and kept within their bounds.

Their code is the worker's own: `handlers.py` beside a skill file in a folder that STEPFAST_SKILLS names, or a module
that STEPFAST_HANDLER_MODULES allows. A row in a database never chooses what is imported. A worker reads the code once:
restart it to change it.
"""

import contextlib
import hashlib
import importlib
import importlib.abc
import importlib.util
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from app.agents.alarm import Alarm, DeadlinePassed
from app.agents.context import OBSERVED_MAX_BYTES, Context, ways_out
from app.agents.outputs import check_object, check_output
from app.agents.printing import printing_as_events
from app.agents.work import Answer, Effect, Effects, Work
from app.errors import AgentError, AuthorMistake, HandlerFailed, OutcomeUnknown, StaleClaim, TimedOut
from app.pipelines import files, yaml_source
from app.pipelines.limits import FILE_MAX_BYTES, HANDLERS_MAX_BYTES
from app.pipelines.loader import SUFFIXES
from app.pipelines.model import Agent, Json
from app.pipelines.report import Unreadable
from app.settings import Settings

Function = Callable[[Context], Json | None]

BESIDE = "handlers:"  # as the loader writes it: a function of the skill folder's handlers.py
TRACEBACK_MAX_CHARS = 4_000
TOLD_MAX_CHARS = 500
SKILL_FOLDERS_MAX = 1_000


# A module is run once, though many threads may ask for it at once.
_loading = threading.Lock()


@dataclass(frozen=True, slots=True)
class Handler:
    """`code_hash` is the sha256 of the module's file. `repeatable`: all its effects stand in `ctx.once`."""

    function: Function
    code_hash: str
    repeatable: bool
    module: ModuleType | None = None


def find(pipeline: str, agent: Agent, settings: Settings) -> Handler | None:
    """The handler of an agent; None where this worker lacks it. Raises AuthorMistake where its module is broken."""
    assert agent.handler is not None
    return _find(pipeline, agent.handler, settings)


def find_probe(pipeline: str, observer: Agent, probe: str, settings: Settings) -> Handler | None:
    """Likewise a probe, which stands beside the handler of the agent that observed."""
    assert observer.handler is not None
    return _find(pipeline, f"{observer.handler.partition(':')[0]}:{probe}", settings)


def _find(pipeline: str, reference: str, settings: Settings) -> Handler | None:
    place, _, name = reference.partition(":")
    try:
        with _loading:
            if reference.startswith(BESIDE):
                module, code_hash = _load_beside(_skill_folder(pipeline, settings.skills))
            elif any(place == allowed or place.startswith(f"{allowed}.") for allowed in settings.handler_modules):
                module, code_hash = _load_module(place)
            else:
                return None
    except _Lacking:
        return None
    function = getattr(module, name, None)
    if not callable(function):
        return None
    return Handler(function, code_hash, bool(getattr(function, "effects_once", False)), module)


class _Lacking(Exception):
    """It is not here now. Raised and not returned, so that the caches below remember only what was found."""


@lru_cache(SKILL_FOLDERS_MAX)
def _skill_folder(pipeline: str, skills: tuple[Path, ...]) -> Path:
    """The folder among `skills`, or one level below them, whose skill file has this name."""
    folders = {
        file.parent.resolve()
        for folder in skills
        for near in (folder, *_entries(folder))[:SKILL_FOLDERS_MAX]
        for file in _entries(near)
        if file.name.endswith(SUFFIXES) and _name_of(file) == pipeline
    }
    if len(folders) > 1:
        listed = " and ".join(map(str, sorted(folders)[:5]))
        raise AuthorMistake(f"Several folders hold a skill file named {pipeline}: {listed}.")
    if not folders:
        raise _Lacking
    return folders.pop()


def _entries(folder: Path) -> list[Path]:
    """What a folder holds; nothing where it is none, or cannot be read."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _name_of(file: Path) -> str | None:
    try:
        top = yaml_source.parse(files.read(file, FILE_MAX_BYTES))
    except Unreadable:
        return None
    _, name = top.entries.get("name", (None, None)) if isinstance(top, yaml_source.Mapping) else (None, None)
    return name.text if isinstance(name, yaml_source.Scalar) else None


@lru_cache(SKILL_FOLDERS_MAX)
def _load_beside(folder: Path) -> tuple[ModuleType, str]:
    """`handlers.py` of a folder, as a module of a private name: two skills may each have one."""
    file = (folder / "handlers.py").resolve()
    if not file.is_file() or file.parent != folder:
        raise _Lacking
    try:
        with file.open("rb") as stream:
            source = stream.read(HANDLERS_MAX_BYTES + 1)
    except OSError as error:
        raise AuthorMistake(f"{file} cannot be read: {error.strerror}.") from error
    if len(source) > HANDLERS_MAX_BYTES:
        raise AuthorMistake(f"{file} has more than {HANDLERS_MAX_BYTES:,} bytes.")
    name = f"stepfast_handlers_{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_loader(name, _Source(file, source))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # pickles and dataclasses look a class's module up there
    with _broken_import(str(file)), printing_as_events():
        spec.loader.exec_module(module)
    return module, hashlib.sha256(source).hexdigest()


class _Source(importlib.abc.SourceLoader):
    """Runs exactly the bytes that are hashed: no compiled file is read, or left in the skill's folder."""

    def __init__(self, file: Path, source: bytes) -> None:
        self._file = file
        self._source = source

    def get_filename(self, fullname: str) -> str:  # noqa: ARG002  # one loader for one module
        return str(self._file)

    def get_data(self, path: str | bytes) -> bytes:  # noqa: ARG002
        return self._source


@lru_cache(SKILL_FOLDERS_MAX)
def _load_module(name: str) -> tuple[ModuleType, str]:
    with _broken_import(name), printing_as_events():
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise _Lacking from error
        file = getattr(module, "__file__", None)
        return module, hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()


@contextlib.contextmanager
def _broken_import(what: str) -> Iterator[None]:
    try:
        yield
    except _Lacking:
        raise
    except (Exception, SystemExit) as error:
        message = f"{what} cannot be imported: {_told(error)}"
        raise AuthorMistake(message, details={"traceback": _frames(error)}) from error


def call(handler: Handler, work: Work, effects: Effects, settings: Settings) -> Answer:
    """Runs a handler and checks its output. Raises AgentError, or StaleClaim where the attempt was fenced.

    In the main thread (prefork, solo) the deadline interrupts the handler: TimedOut, or OutcomeUnknown where it may not
    be repeated. In a thread, which nothing can interrupt, a late output is returned, and the fence decides about it: to
    drop it would be to do again what was done.
    """
    output, context = _guarded(handler, work, effects)
    checked = check_output({} if output is None else output, work.agent, settings.output_max_bytes)
    return Answer(checked, observed=tuple(context.seen.values()))


def look(probe: Handler, work: Work) -> object:
    """What a probe sees of the world now. Raises AgentError. It may have no effect, and so may be repeated."""
    value, _ = _guarded(replace(probe, repeatable=True), work, _NoEffects())
    return check_object({"value": value}, "What a probe returns", OBSERVED_MAX_BYTES)["value"]


class _NoEffects:
    """The record of effects of a probe."""

    def begin(self, key: str) -> Effect:
        raise AuthorMistake(f"A probe only looks: it may not do ctx.once({key!r}).")

    def finish(self, key: str, output: Json) -> None:
        raise AssertionError(key, output)

    def forget(self, key: str) -> None:
        raise AssertionError(key)


def _guarded(handler: Handler, work: Work, effects: Effects) -> tuple[object, Context]:
    """What a function returns, and the context that it was given; AgentError or StaleClaim for what it raises."""
    pid = os.getpid()
    alarm = Alarm(work.deadline)
    module = handler.module
    has_probe = (lambda name: callable(getattr(module, name, None))) if module else None
    context = Context(work, _Recorded(effects, alarm), has_probe)
    try:
        with printing_as_events():
            return _run(handler.function, context, alarm), context
    except (AgentError, StaleClaim, KeyboardInterrupt):
        raise
    except DeadlinePassed as error:
        raise _interrupted(handler, work) from error
    except SystemExit as error:
        if os.getpid() != pid:
            os._exit(error.code if isinstance(error.code, int) else 1)
        if _is_shutdown(error):
            if work.agent.repeatable or handler.repeatable:
                raise  # the process ends, and the step goes on elsewhere
            raise _unknown(work, "was interrupted by the end of its worker") from error
        raise HandlerFailed(f"The handler of {work.agent.id} called sys.exit({error.code!r:.50}).") from error
    except BaseException as error:
        # Also what is no Exception (asyncio.CancelledError): it would leave the step executing under a live worker.
        raise HandlerFailed(_told(error), details={"traceback": _frames(error)}) from error
    finally:
        if os.getpid() != pid:
            # The handler forked, and this is the child: it must never go on as the worker.
            os._exit(1 if sys.exc_info()[0] else 0)


def _run(function: Function, context: Context, alarm: Alarm) -> Json | None:
    try:
        alarm.start()
        return function(context)
    finally:
        alarm.held = True
        alarm.stop()


class _Recorded:
    """The record of effects, which the alarm does not interrupt."""

    def __init__(self, effects: Effects, alarm: Alarm) -> None:
        self._effects = effects
        self._alarm = alarm

    def begin(self, key: str) -> Effect:
        with self._alarm.silent():
            return self._effects.begin(key)

    def finish(self, key: str, output: Json) -> None:
        with self._alarm.silent():
            self._effects.finish(key, output)

    def forget(self, key: str) -> None:
        with self._alarm.silent():
            self._effects.forget(key)


def _interrupted(handler: Handler, work: Work) -> TimedOut | OutcomeUnknown:
    agent = work.agent
    late = f"was interrupted at its timeout_ms, {agent.timeout_ms}"
    if agent.repeatable or handler.repeatable:
        return TimedOut(f"{agent.id} {late}.")
    return _unknown(work, late)


def _unknown(work: Work, how: str) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"{work.agent.id} {how}, and nobody knows what it had done by then.",
        next_step=ways_out(work),
        details={"interrupted": True},
    )


def _is_shutdown(error: SystemExit) -> bool:
    """Whether Celery ends this process: by an exception of its own, or by billiard's code for signal n, n - 256."""
    return type(error) is not SystemExit or (isinstance(error.code, int) and -256 < error.code < -192)


def _told(error: BaseException) -> str:
    """Its type and what it says, which its own code may get wrong."""
    return "".join(traceback.format_exception_only(error)).strip()[:TOLD_MAX_CHARS]


def _frames(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-TRACEBACK_MAX_CHARS:]
