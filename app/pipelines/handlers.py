"""What a handlers.py defines, read without running it."""

import ast
import warnings

from app.pipelines.limits import HANDLERS_MAX_LEVELS, HANDLERS_MAX_NODES
from app.pipelines.report import Place, Unreadable


def functions(text: str) -> dict[str, tuple[Place, str | None]]:
    """Each name that the module binds -> its place, and what keeps it from being a handler. Raises Unreadable.

    A handler is called with one argument, its context. Of a name that is imported or assigned, nothing more is known.
    """
    found: dict[str, tuple[Place, str | None]] = {}
    for node in parse(text).body:
        place = (node.lineno, node.col_offset + 1)
        match node:
            case ast.FunctionDef():
                takes_one = _takes_one(node.args)
                found[node.name] = (place, None if takes_one else f"{node.name} must take one argument, its context.")
            case ast.AsyncFunctionDef():
                found[node.name] = (place, f"{node.name} is async: write a plain def.")
            case ast.Import() | ast.ImportFrom():
                found |= {alias.asname or alias.name: (place, None) for alias in node.names}
            case ast.Assign():
                found |= {target.id: (place, None) for target in node.targets if isinstance(target, ast.Name)}
    return found


def parse(text: str) -> ast.Module:
    """The tree of a module, of a size that whoever walks it needs no bound of his own. Raises Unreadable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a handler's own, such as an odd escape, are not ours to report
            tree = ast.parse(text)
    except SyntaxError as error:
        raise Unreadable((error.lineno or 1, error.offset or 1), f"is not Python: {error.msg}.") from error
    except ValueError as error:
        raise Unreadable((1, 1), f"is not Python: {error}.") from error
    except (RecursionError, MemoryError) as error:
        raise Unreadable((1, 1), "is not Python: it nests too deeply to be read.") from error
    _check_size(tree)
    return tree


def _check_size(tree: ast.Module) -> None:
    level: list[ast.AST] = [tree]
    levels = nodes = 0
    while level:
        levels, nodes = levels + 1, nodes + len(level)
        place = next(
            ((node.lineno, node.col_offset + 1) for node in level if isinstance(node, ast.expr | ast.stmt)), (1, 1)
        )
        if levels > HANDLERS_MAX_LEVELS:
            raise Unreadable(place, f"nests deeper than {HANDLERS_MAX_LEVELS} levels.")
        if nodes > HANDLERS_MAX_NODES:
            raise Unreadable((1, 1), f"has more than {HANDLERS_MAX_NODES} names, calls and the like.")
        level = [child for node in level for child in ast.iter_child_nodes(node)]


def _takes_one(args: ast.arguments) -> bool:
    positional = len(args.posonlyargs) + len(args.args)
    required = positional - len(args.defaults)
    required_keywords = [default for default in args.kw_defaults if default is None]
    return required <= 1 and (positional >= 1 or args.vararg is not None) and not required_keywords
