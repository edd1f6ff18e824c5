"""What a handler's source says of its effects and of what it reads: parsed, and never run or imported.

A handler is followed through imports, renamings and decorators to its function, and from there to the functions and
classes of the same module that it names. What is called beyond that module counts as an effect, unless it is known to
have none.
"""

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import PathFinder
from pathlib import Path

from app.pipelines import files, handlers
from app.pipelines.limits import HANDLERS_MAX_BYTES
from app.pipelines.names import HANDLERS_MODULE
from app.pipelines.report import Place, Unreadable

FOLLOWED_MAX = 5

# Modules whose functions change nothing outside the process.
_PURE_NAMES = """
    __future__ abc ast base64 binascii bisect calendar collections contextlib copy dataclasses datetime decimal difflib
    enum fractions functools hashlib heapq hmac html itertools json math numbers operator random re secrets shlex
    statistics string struct textwrap time types typing unicodedata urllib.parse uuid zoneinfo zlib
    os.environ os.getenv os.path app.errors app.agents.context app.pipelines
"""
_PURE = frozenset(_PURE_NAMES.split())
_PURE_OF_OURS = "app.agents"  # what it exports itself; its modules are looked at as anybody's
_ACTING_BUILTINS = frozenset({"open", "exec", "eval", "compile", "input", "breakpoint", "__import__"})
_UNSTABLE_NAMES = """
    time random secrets os.urandom os.getpid uuid.uuid1 uuid.uuid4
    datetime.datetime.now datetime.datetime.utcnow datetime.datetime.today datetime.date.today
"""
_UNSTABLE = frozenset(_UNSTABLE_NAMES.split())
_UNSTABLE_BUILTINS = frozenset({"id", "hash"})  # differ from process to process


@dataclass(frozen=True, slots=True)
class Once:
    """A call of `ctx.once`. `unstable` is what makes its key differ from attempt to attempt."""

    place: Place
    has_check: bool
    unstable: str | None


@dataclass(frozen=True, slots=True)
class Read:
    """A field that is read by its name: ("writer", "text") of `ctx.inputs`, ("input", "topic") of `ctx.run.input`."""

    place: Place
    path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HandlerSource:
    """`acts` is the first call that may have an effect outside; `declares_once` is @effects_once."""

    file: Path
    place: Place
    declares_once: bool
    acts: str | None
    onces: tuple[Once, ...]
    reads: tuple[Read, ...]


def read(folder: Path, handler: str) -> HandlerSource | None:
    """The source of `module:function`, beside a skill file or on Python's path; None where none can be read."""
    name, _, function = handler.partition(":")
    file = folder / f"{HANDLERS_MODULE}.py" if name == HANDLERS_MODULE else _find(name)
    found = _follow(_module(file), function, FOLLOWED_MAX) if file else None
    if found is None:
        return None
    module, node, wrappers = found
    reached = list(module.reached(node))
    context = next((arg.arg for arg in (*node.args.posonlyargs, *node.args.args)), "ctx")
    onces = tuple(once for each in reached for once in _onces(module, each))
    acting = [call for each in reached for call in module.acting(each)]
    acting.sort(key=lambda call: call != f"{context}.once")
    decorators = {_last_name(decorator) for decorator in node.decorator_list} | wrappers
    return HandlerSource(
        module.file,
        module.place(node),
        "effects_once" in decorators,
        acting[0] if acting else None,
        onces,
        tuple(found for each in reached for found in _Reads(module, context).of(each)),
    )


class _Module:
    def __init__(self, file: Path, text: str) -> None:
        self.file = file
        self._lines = text.split("\n")
        self.tree = handlers.parse(text)
        self.definitions = {
            node.name: node for node in self.tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }

    @cached_property
    def imports(self) -> dict[str, str]:
        """Each name that an import binds, anywhere in the module -> what it names, with its module."""
        found = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    top = alias.name.split(".")[0]
                    found[alias.asname or top] = alias.name if alias.asname else top
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {alias.asname or alias.name: f".{alias.name}" for alias in node.names}
        return found

    def place(self, node: ast.expr | ast.stmt) -> Place:
        """Python counts bytes; a column counts characters."""
        return node.lineno, len(self._lines[node.lineno - 1].encode()[: node.col_offset].decode(errors="replace")) + 1

    def reached(self, start: ast.AST) -> Iterator[ast.AST]:
        """A definition, and those of this module that it names, at any distance."""
        waiting, seen = [start], {id(start)}
        while waiting:
            node = waiting.pop()
            yield node
            named = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
            for name in sorted(named & self.definitions.keys()):
                if id(self.definitions[name]) not in seen:
                    seen.add(id(self.definitions[name]))
                    waiting.append(self.definitions[name])

    def qualified(self, node: ast.expr) -> str:
        """`datetime.datetime.now` for what is called or read; a name alone where no import binds it."""
        names: list[str] = []
        while not isinstance(node, ast.Name):
            if isinstance(node, ast.Attribute):
                names.append(node.attr)
                node = node.value
            elif isinstance(node, ast.Call):
                node = node.func
            elif isinstance(node, ast.Subscript):
                node = node.value
            else:
                return ""
        return ".".join([self.imports.get(node.id, node.id), *reversed(names)])

    def acting(self, node: ast.AST) -> Iterator[str]:
        """The calls in a definition that may have an effect outside, by their names."""
        for call in _calls(node):
            name = self.qualified(call.func)
            root = name.split(".")[0]
            imported = name and any(name == full or name.startswith(f"{full}.") for full in self.imports.values())
            acts = imported and not _is_pure(name) if imported else root in _ACTING_BUILTINS and name == root
            if acts or _is_once(call):
                yield name.lstrip(".")

    def unstable(self, key: ast.expr, assigned: dict[str, list[ast.expr]], levels: int = 3) -> str | None:
        """What makes a key's expression differ from attempt to attempt; None where nothing is seen to."""
        for node in ast.walk(key):
            if isinstance(node, ast.Call):
                name = self.qualified(node.func)
                if _within(name, _UNSTABLE) or name in _UNSTABLE_BUILTINS:
                    return name
            elif isinstance(node, ast.Attribute) and node.attr == "number" and _last_name(node.value) == "run":
                return "the number of the attempt"
            elif isinstance(node, ast.Name) and levels:
                for value in assigned.get(node.id, ()):
                    if found := self.unstable(value, {**assigned, node.id: []}, levels - 1):
                        return found
        return None


def _module(file: Path) -> _Module | None:
    try:
        return _Module(file, files.read(file, HANDLERS_MAX_BYTES))
    except Unreadable:
        return None


def _find(name: str) -> Path | None:
    """The file of a module on Python's path. Looking for a submodule does not import the package above it."""
    top, *below = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
        for number in range(1, len(below) + 1):
            folders = spec.submodule_search_locations if spec else None
            spec = PathFinder.find_spec(".".join([top, *below[:number]]), folders) if folders else None
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


_Followed = tuple[_Module, ast.FunctionDef, frozenset[str]]


def _follow(module: _Module | None, name: str, left: int) -> _Followed | None:
    """The function that a module's name stands for, and the names of what it was wrapped in."""
    if module is None or not left:
        return None
    if isinstance(node := module.definitions.get(name), ast.FunctionDef):
        return module, node, frozenset()
    for statement in module.tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else ()
        if isinstance(statement, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in targets):
            value, wrappers = statement.value, frozenset[str]()
            if isinstance(value, ast.Call) and len(value.args) == 1:
                wrappers = frozenset({_last_name(value.func)})
                value = value.args[0]
            found = _follow(module, value.id, left - 1) if isinstance(value, ast.Name) else None
            return (found[0], found[1], found[2] | wrappers) if found else None
    where, _, original = module.imports.get(name, "").rpartition(".")
    file = _find(where) if where else None
    return _follow(_module(file), original, left - 1) if file else None


def _calls(node: ast.AST) -> list[ast.Call]:
    calls = [each for each in ast.walk(node) if isinstance(each, ast.Call)]
    return sorted(calls, key=lambda call: (call.lineno, call.col_offset))


def _is_once(call: ast.Call) -> bool:
    return (
        isinstance(call.func, ast.Attribute) and call.func.attr == "once" and len(call.args) + len(call.keywords) >= 2
    )


def _onces(module: _Module, node: ast.AST) -> Iterator[Once]:
    assigned: dict[str, list[ast.expr]] = {}
    for each in ast.walk(node):
        if isinstance(each, ast.Assign):
            for target in each.targets:
                if isinstance(target, ast.Name):
                    assigned.setdefault(target.id, []).append(each.value)
    for call in filter(_is_once, _calls(node)):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        check = keywords.get("check")
        has_check = None in keywords or not (check is None or (isinstance(check, ast.Constant) and check.value is None))
        key = call.args[0] if call.args else keywords.get("key")
        yield Once(module.place(call), has_check, module.unstable(key, assigned) if key else None)


class _Reads:
    """Finds what a function reads by constant names, also through a local variable that is assigned once."""

    def __init__(self, module: _Module, context: str) -> None:
        self._module = module
        self._context = context
        self._named: dict[str, tuple[str, ...] | None] = {}

    def of(self, node: ast.AST) -> Iterator[Read]:
        for each in ast.walk(node):
            if isinstance(each, ast.Assign) and len(each.targets) == 1 and isinstance(each.targets[0], ast.Name):
                name = each.targets[0].id
                self._named[name] = None if name in self._named else self._path(each.value)
        found = [each for each in ast.walk(node) if isinstance(each, ast.Subscript) and self._path(each)]
        inner = {id(each.value) for each in found}
        for each in found:
            path = self._path(each)
            if path and id(each) not in inner and isinstance(each.ctx, ast.Load):
                yield Read(self._module.place(each), path)

    def _path(self, node: ast.expr) -> tuple[str, ...] | None:
        match node:
            case ast.Attribute(value=ast.Name(id=self._context), attr="inputs"):
                return ()
            case ast.Attribute(value=ast.Attribute(value=ast.Name(id=self._context), attr="run"), attr="input"):
                return ("input",)
            case ast.Subscript(slice=ast.Constant(value=str() as name)):
                above = self._path(node.value)
                return None if above is None else (*above, name)
            case ast.Name():
                return self._named.get(node.id)
        return None


def _is_pure(name: str) -> bool:
    return _within(name, _PURE) or name.rpartition(".")[0] == _PURE_OF_OURS


def _within(name: str, known: frozenset[str]) -> bool:
    """Whether a dotted name, or one that it begins with, is among the known ones."""
    parts = name.split(".")
    return any(".".join(parts[:count]) in known for count in range(1, len(parts) + 1))


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
