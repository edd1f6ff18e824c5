"""What a handler's source says of its effects and of what it reads: parsed, and never run or imported.

A handler is followed through imports, renamings and decorators to its function, and from there to the functions and
classes of the same module that it names. What is called beyond that module counts as an effect, unless it is known to
have none.
"""

import ast
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import PathFinder
from itertools import islice
from pathlib import Path
from typing import TypeVar

from app.pipelines import files, handlers
from app.pipelines.limits import FAULTS_MAX_COUNT, HANDLERS_MAX_BYTES
from app.pipelines.names import HANDLERS_MODULE
from app.pipelines.report import Place, Unreadable

FOLLOWED_MAX = 5
NAME_MAX_PARTS = 10  # of `a.b.c`: what is known has at most three

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


class Reader:
    """Reads the handlers of one skill: each module is parsed once, and each function looked at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._modules: dict[Path, _Module | None] = {}

    def read(self, handler: str) -> HandlerSource | None:
        """The source of `module:function`, beside the skill file or on Python's path; None where none can be read."""
        name, _, function = handler.partition(":")
        file = self._folder / f"{HANDLERS_MODULE}.py" if name == HANDLERS_MODULE else _find(name)
        found = self._follow(file, function, FOLLOWED_MAX)
        if found is None:
            return None
        module, node, wrappers = found
        context = next((arg.arg for arg in (*node.args.posonlyargs, *node.args.args)), "ctx")
        parts = [module.part(each, context) for each in module.reached(node)]
        acting = sorted((name for part in parts for name in part.acts), key=lambda name: name != f"{context}.once")
        decorators = {_last_name(decorator) for decorator in node.decorator_list} | wrappers
        return HandlerSource(
            module.file,
            module.place(node),
            "effects_once" in decorators,
            acting[0] if acting else None,
            _some(once for part in parts for once in part.onces),
            _some(read for part in parts for read in part.reads),
        )

    def _module(self, file: Path) -> "_Module | None":
        if file not in self._modules:
            try:
                self._modules[file] = _Module(file, files.read(file, HANDLERS_MAX_BYTES))
            except Unreadable:
                self._modules[file] = None
        return self._modules[file]

    def _follow(self, file: Path | None, name: str, left: int) -> "_Followed | None":
        """The function that a module's name stands for, and the names of what it was wrapped in."""
        module = self._module(file) if file and left else None
        if module is None:
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
                found = self._follow(file, value.id, left - 1) if isinstance(value, ast.Name) else None
                return (found[0], found[1], found[2] | wrappers) if found else None
        where, _, original = module.imports.get(name, "").rpartition(".")
        return self._follow(_find(where) if where else None, original, left - 1)


@dataclass(frozen=True, slots=True)
class _Part:
    """What one function or class says: the names of its calls that may have an effect, and what it does by `ctx`."""

    acts: tuple[str, ...]
    onces: tuple[Once, ...]
    reads: tuple[Read, ...]


class _Module:
    def __init__(self, file: Path, text: str) -> None:
        self.file = file
        self._lines = text.split("\n")
        self.tree = handlers.parse(text)
        self.definitions = {
            node.name: node for node in self.tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        self._parts: dict[tuple[ast.AST, str], _Part] = {}
        self._named: dict[ast.AST, list[str]] = {}

    def part(self, node: ast.AST, context: str) -> _Part:
        """What a definition says, where its context has that name."""
        if (node, context) not in self._parts:
            reads = _some(_Reads(self, context).of(node))
            self._parts[node, context] = _Part(tuple(self.acting(node)), _some(_onces(self, node)), reads)
        return self._parts[node, context]

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
            if node not in self._named:
                named = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
                self._named[node] = sorted(named & self.definitions.keys())
            for name in self._named[node]:
                if id(self.definitions[name]) not in seen:
                    seen.add(id(self.definitions[name]))
                    waiting.append(self.definitions[name])

    def qualified(self, node: ast.expr) -> str:
        """`datetime.datetime.now` for what is called, or how that begins; a name alone where no import binds it."""
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
        return ".".join([self.imports.get(node.id, node.id), *reversed(names[-NAME_MAX_PARTS:])])

    def acting(self, node: ast.AST) -> Iterator[str]:
        """The calls in a definition that may have an effect outside, by their names."""
        imports = frozenset(self.imports.values())
        for call in _calls(node):
            name = self.qualified(call.func)
            root = name.split(".")[0]
            imported = _within(name, imports)
            acts = imported and not _is_pure(name) if imported else root in _ACTING_BUILTINS and name == root
            if acts or _is_once(call):
                yield name.lstrip(".")

    def unstable(self, value: ast.expr, names: Mapping[str, str]) -> str | None:
        """What makes an expression differ from attempt to attempt; None where nothing is seen to. `names` do so."""
        for node in ast.walk(value):
            if isinstance(node, ast.Call):
                name = self.qualified(node.func)
                if _within(name, _UNSTABLE) or name in _UNSTABLE_BUILTINS:
                    return name
            elif isinstance(node, ast.Attribute) and node.attr == "number" and _last_name(node.value) == "run":
                return "the number of the attempt"
            elif isinstance(node, ast.Name) and node.id in names:
                return names[node.id]
        return None

    def unstable_names(self, node: ast.AST) -> dict[str, str]:
        """Each name in a definition that is given a value which differs so, also through other names -> by what."""
        found: dict[str, str] = {}
        users: dict[str, list[ast.Assign]] = {}
        waiting: list[tuple[ast.Assign, str]] = []
        for each in ast.walk(node):
            if isinstance(each, ast.Assign):
                if why := self.unstable(each.value, {}):
                    waiting.append((each, why))
                for name in {inner.id for inner in ast.walk(each.value) if isinstance(inner, ast.Name)}:
                    users.setdefault(name, []).append(each)
        while waiting:
            assign, why = waiting.pop()
            for target in assign.targets:
                if isinstance(target, ast.Name) and target.id not in found:
                    found[target.id] = why
                    waiting += [(user, why) for user in users.get(target.id, ())]
        return found


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
_T = TypeVar("_T")


def _some(found: Iterable[_T]) -> tuple[_T, ...]:
    """Past the limit a further finding helps nobody."""
    return tuple(islice(found, FAULTS_MAX_COUNT))


def _calls(node: ast.AST) -> list[ast.Call]:
    calls = [each for each in ast.walk(node) if isinstance(each, ast.Call)]
    return sorted(calls, key=lambda call: (call.lineno, call.col_offset))


def _is_once(call: ast.Call) -> bool:
    return (
        isinstance(call.func, ast.Attribute) and call.func.attr == "once" and len(call.args) + len(call.keywords) >= 2
    )


def _onces(module: _Module, node: ast.AST) -> Iterator[Once]:
    names = module.unstable_names(node)
    for call in filter(_is_once, _calls(node)):
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        check = keywords.get("check")
        has_check = None in keywords or not (check is None or (isinstance(check, ast.Constant) and check.value is None))
        key = call.args[0] if call.args else keywords.get("key")
        yield Once(module.place(call), has_check, module.unstable(key, names) if key else None)


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
