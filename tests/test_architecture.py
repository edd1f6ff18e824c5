"""What ARCHITECTURE.md says of the code, and the limits that hold for every file."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from app.runs import states

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for folder in ("app", "bench", "client", "migrations", "tests", "examples")
    for path in (ROOT / folder).rglob("*.py")
    if "__pycache__" not in path.parts
)


@pytest.mark.parametrize("transitions", [states.STEP_TRANSITIONS, states.RUN_TRANSITIONS])
def test_diagrams_are_those_of_the_transitions_table(transitions):
    """ARCHITECTURE.md draws exactly what app/runs/states.py declares."""
    assert f"```mermaid\n{states.diagram(transitions)}\n```" in (ROOT / "ARCHITECTURE.md").read_text()


def test_files_and_functions_stay_small():
    """Files have at most 500 lines, functions at most 70 (tigerbeetle tidy)."""
    large = []
    for path in SOURCES:
        source = path.read_text()
        if source.count("\n") > 500:
            large.append(f"{path.name}: {source.count(chr(10))} lines")
        large += [
            f"{path.name}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 70
        ]
    assert large == []


def test_every_test_states_its_rule():
    """Each test opens with a sentence."""
    silent = [
        f"{path.name}: {node.name}"
        for path in SOURCES
        if path.name.startswith("test_")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("app", {"celery", "sqlalchemy"}),
        ("app.pipelines.loader", {"celery", "sqlalchemy", "anthropic"}),
        ("app.runs.store", {"celery", "anthropic"}),
        ("app.execution.executor", {"anthropic"}),
        ("app.operations", {"anthropic"}),
    ],
)
def test_imports_stay_light(module, unwanted):
    """Nobody waits for a library that the work at hand does not use."""
    code = f"import {module}, sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert unwanted & set(loaded.stdout.split()) == set()
