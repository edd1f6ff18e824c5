"""What the documents say: links that lead somewhere, commands that exist, settings that are all named."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from app.cli.main import COMMANDS
from app.settings import Settings, variable

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    """A relative link names a file that is there."""
    links = re.findall(r"\]\(([^)#]+)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist_with_their_options(document):
    """Each `stepfast …` in a document is a command, and each of its options is that command's."""
    from importlib import import_module

    for line in re.findall(r"(?:^|`|\s)stepfast ([a-z][^`#\n]*)", document.read_text(), re.MULTILINE):
        words = shlex.split(line.split("  ")[0].split(" · ")[0].replace("'", ""))
        name = words[0]
        if name not in COMMANDS:
            assert document.name == "ARCHITECTURE.md" or not re.match(r"[a-z]+$", name), f"stepfast {line}"
            continue
        command = import_module(COMMANDS[name].module).command
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        asked = {word.strip("[]").split("=")[0] for word in words[1:] if word.strip("[").startswith("--")}
        assert asked <= known, f"stepfast {line}"


def test_peers_scenarios_are_tested_where_it_says():
    """docs/peers-scenarios.md names tests that are there, and each of them names a peer."""
    listed = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "peers-scenarios.md").read_text()))
    sources = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    named = re.findall(
        r'def (test_\w+)\([^)]*\):\n    """[^"]*(?:aws-durable-execution|dbos-transact-py|Absurd) ', "\n".join(sources)
    )
    assert listed - set(named) == set()


def test_readme_is_short():
    """At most 120 lines."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_setting_is_documented():
    """docs/settings.md has a row for each variable, with its default."""
    text = (ROOT / "docs" / "settings.md").read_text()
    for field in fields(Settings):
        assert f"`{variable(field.name)}`" in text


@pytest.mark.slow
def test_readmes_run_of_your_own_works_as_it_stands(tmp_path):
    """Each line of the README's block, typed by a newcomer in an empty folder, on servers of its own."""
    block = re.search(r"## A run of your own\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    environ = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "STEPFAST_HOME": str(tmp_path / "home")}
    for line in block.splitlines():
        done = subprocess.run(
            shlex.split(line, comments=True),
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert "completed" in done.stdout
