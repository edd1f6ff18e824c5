"""Gates: boolean expressions over recorded outputs and the run's input, such as `{{coder.confidence}} >= 0.85`.

The language: comparisons (`== != < <= > >=`, `in`, `not in`), `and`, `or`, `not`, `+ - * /`, brackets, numbers, text in
quotes, lists, `true`, `false`, `null`. A reference becomes a variable and never enters the text, so that no agent's
output can become code. Anything unclear is an error and never false: a missing field, a comparison of unlike things
(`"0.9" >= 0.85`, `"yes" == true`), an `and` over numbers, a result that is neither true nor false.
"""

import ast
import math
import operator
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Never

import simpleeval  # type: ignore[import-untyped]

from app.errors import AuthorMistake
from app.pipelines.limits import GATE_MAX_CHARS, GATE_MAX_LEVELS
from app.pipelines.report import cut
from app.pipelines.templates import BadText, Path, lookup, variables

_NAMED = {"true": True, "false": False, "null": None}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the gate held, and what each reference was: `{"coder.confidence": 0.9}`."""

    held: bool
    values: dict[str, object]


@dataclass(frozen=True, slots=True)
class Gate:
    """A parsed gate. `references` are the paths that it reads, each once."""

    text: str
    references: tuple[Path, ...]
    tree: ast.expr

    @property
    def literals(self) -> tuple[object, ...]:
        """The numbers and texts that stand in the expression."""
        return tuple(node.value for node in ast.walk(self.tree) if isinstance(node, ast.Constant))

    def evaluate(self, values: Mapping[str, object]) -> Verdict:
        """The verdict over outputs by agent id, and the run's input as `input`.

        Raises AuthorMistake, with the values seen among its details, where it is neither true nor false.
        """
        seen: dict[str, object] = {}
        try:
            for path in self.references:
                seen[".".join(path)] = lookup(path, values)
            result = _evaluate(self.tree, list(seen.values()))
            held = _boolean(result)
        except (_Unclear, AuthorMistake, ArithmeticError, RecursionError, simpleeval.InvalidExpression) as error:
            reason = str(error) if str(error).endswith((".", "?")) else f"{error}."
            message = f"The gate {cut(self.text)} cannot be evaluated: {reason}"
            raise AuthorMistake(message, details={"gate": self.text, "values": seen}) from error
        return Verdict(held, seen)


@lru_cache(maxsize=1_024)
def parse(text: str) -> Gate:
    """A gate from its text. Raises BadText, with the offset of what is wrong."""
    if len(text) > GATE_MAX_CHARS:
        raise BadText(0, f"a gate is at most {GATE_MAX_CHARS} characters long.")
    if "\\" in text:
        raise BadText(text.index("\\"), "a gate holds no backslash.")
    found = list(variables(text))
    references = tuple(dict.fromkeys(path for _, _, path in found))
    # Each reference gives way to a variable of its own width, so that offsets stay true.
    code = "".join(" " if char.isspace() else char for char in text)
    variable_at = {}
    for start, end, path in found:
        variable_at[start] = f"v{references.index(path)}"
        code = code[:start] + variable_at[start].ljust(end - start) + code[end:]
    tree = _tree(code)
    used = _check(tree, code, variable_at)
    for start in variable_at:
        if start not in used:
            raise BadText(start, "a reference stands in quotes or in a comment, where it is not read.")
    return Gate(text, references, tree)


def _tree(code: str) -> ast.expr:
    """The expression, with the offsets of `code`."""
    indent = len(code) - len(code.lstrip())
    try:
        tree = ast.parse(code.strip(), mode="eval").body
    except SyntaxError as error:
        # Python gives no offset where the text ends too soon.
        offset = min(indent + error.offset - 1, len(code)) if error.offset else len(code)
        hints = {"&&": "write 'and'", "||": "write 'or'", "==": error.msg, "=": "write '=='"}
        hint = next((hint for wrong, hint in hints.items() if wrong in code), error.msg)
        raise BadText(offset, f"is no expression ({hint}).") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise BadText(0, f"is no expression ({error}).") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.expr):
            node.col_offset += indent
    return tree


def _check(tree: ast.expr, code: str, variable_at: Mapping[int, str]) -> set[int]:
    """The offsets of the references used. Raises BadText at whatever the language lacks."""
    used = set()
    encoded = code.encode()
    waiting: list[tuple[ast.expr, int]] = [(tree, 1)]
    while waiting:
        node, level = waiting.pop()
        offset = len(encoded[: node.col_offset].decode())  # Python counts bytes
        if level > GATE_MAX_LEVELS:
            raise BadText(offset, f"is nested deeper than {GATE_MAX_LEVELS} levels.")
        if isinstance(node, ast.Name) and variable_at.get(offset) == node.id:
            used.add(offset)
        elif problem := _problem(node):
            raise BadText(offset, problem)
        waiting += [(child, level + 1) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
    return used


def _problem(node: ast.expr) -> str | None:
    """What makes a node no part of the language; None for one that is."""
    match node:
        case ast.Name():
            known = node.id in _NAMED
            return None if known else f"{cut(node.id)} is no reference: write {{{{agent.field}}}}, or text in quotes."
        case ast.Constant():
            known = isinstance(node.value, bool | int | float | str | None) and _kind(node.value) != _NOT_A_NUMBER
            return None if known else "is no number, text, true, false or null."
        case ast.Attribute():
            return "a reference stands in braces: write {{agent.field}}."
        case ast.Compare() | ast.BinOp() | ast.UnaryOp():
            operators = node.ops if isinstance(node, ast.Compare) else [node.op]
            foreign = [type(op).__name__ for op in operators if type(op) not in _OPERATORS]
            return f"the operator {foreign[0]} is not part of a gate's language." if foreign else None
        case ast.BoolOp() | ast.List():
            return None
        case _:
            return f"{type(node).__name__} is not part of a gate's language."


# What the operators mean. Each takes values of one kind, and raises _Unclear for others.


class _Unclear(ValueError):
    pass


_NOT_A_NUMBER = "infinity or no number"


_KINDS = {type(None): "null", bool: "a boolean", int: "a number", str: "a text", list: "a list"}


def _kind(value: object) -> str:
    if isinstance(value, float):
        return "a number" if math.isfinite(value) else _NOT_A_NUMBER
    return _KINDS.get(type(value), "an object")


def _unlike(left: object, right: object, verb: str) -> Never:
    raise _Unclear(f"it {verb} {_kind(left)} and {_kind(right)}")


def _boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise _Unclear(f"{_kind(value)} stands where true or false must")
    return value


def _equal(left: object, right: object) -> bool:
    kinds = {_kind(left), _kind(right)}
    if _NOT_A_NUMBER in kinds or (len(kinds) == 2 and "null" not in kinds):
        _unlike(left, right, "compares")
    return left == right


def _within(value: object, container: object) -> bool:
    if isinstance(container, str) and isinstance(value, str):
        return value in container
    if isinstance(container, list):
        return any(_kind(value) == _kind(item) and value == item for item in container)
    return _unlike(value, container, "looks for one in the other:")


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[object, object], bool]:
    def compared(left: object, right: object) -> bool:
        if _kind(left) != _kind(right) or _kind(left) not in {"a number", "a text"}:
            _unlike(left, right, "compares")
        return compare(left, right)

    return compared


def _counted(compute: Callable[[Any, Any], Any]) -> Callable[[object, object], object]:
    def computed(left: object, right: object) -> object:
        if {_kind(left), _kind(right)} != {"a number"}:
            _unlike(left, right, "computes with")
        result = compute(left, right)
        if not math.isfinite(result):
            raise _Unclear("it computes a number that is too large")
        return result

    return computed


_OPERATORS: dict[type[ast.AST], Callable[..., object]] = {
    ast.Eq: _equal,
    ast.NotEq: lambda left, right: not _equal(left, right),
    ast.Lt: _ordered(operator.lt),
    ast.LtE: _ordered(operator.le),
    ast.Gt: _ordered(operator.gt),
    ast.GtE: _ordered(operator.ge),
    ast.In: _within,
    ast.NotIn: lambda value, container: not _within(value, container),
    ast.Not: lambda value: not _boolean(value),
    ast.USub: lambda value: _counted(operator.sub)(0, value),
    ast.Add: _counted(operator.add),
    ast.Sub: _counted(operator.sub),
    ast.Mult: _counted(operator.mul),
    ast.Div: _counted(operator.truediv),
}
_NODES = (ast.Name, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.List)


class _Evaluator(simpleeval.EvalWithCompoundTypes):  # type: ignore[misc]
    """simpleeval, reduced to the language above: no functions, no attributes, no truth of numbers."""

    def __init__(self) -> None:
        super().__init__(operators=_OPERATORS, functions={}, names={})
        self.nodes: dict[type[ast.AST], Any] = {kind: self.nodes[kind] for kind in _NODES}

    def _eval_boolop(self, node: ast.BoolOp) -> bool:
        decisive = isinstance(node.op, ast.Or)
        for value in node.values:
            if _boolean(self._eval(value)) is decisive:
                return decisive
        return not decisive


# simpleeval keeps the names of one evaluation in the evaluator, and its constructor touches the process's warnings:
# one evaluator, and one evaluation (30 microseconds) at a time.
_evaluator = _Evaluator()
_lock = threading.Lock()


def _evaluate(tree: ast.expr, values: Sequence[object]) -> object:
    with _lock:
        _evaluator.names = {**_NAMED, **{f"v{index}": value for index, value in enumerate(values)}}
        try:
            return _evaluator.eval("", previously_parsed=tree)
        finally:
            _evaluator.names = {}
