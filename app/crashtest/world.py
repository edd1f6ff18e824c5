"""What the handlers of a run left behind in its folder, read to be compared with what an undisturbed run leaves."""

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

from app.agents.git import bare_environment
from app.pipelines.model import Json

PLACEHOLDER = "{scratch}"
FILES_MAX_COUNT = 10_000
GIT_TIMEOUT_S = 30.0
# Values whose name says that they are durations differ in every run.
_DURATIONS = ("_ms", "_s")


def renew(folder: Path, template: Path | None) -> None:
    """An empty folder, or a copy of the template, at the same place as before."""
    if folder.exists():
        shutil.rmtree(folder)
    if template:
        shutil.copytree(template, folder, symlinks=True)
    else:
        folder.mkdir(mode=0o700)


def placed(value: object, folder: Path) -> object:
    """A run's input, in which the placeholder has become the folder."""
    if isinstance(value, str):
        return value.replace(PLACEHOLDER, str(folder))
    if isinstance(value, dict):
        return {key: placed(entry, folder) for key, entry in value.items()}
    return [placed(entry, folder) for entry in value] if isinstance(value, list) else value


def left(folder: Path) -> dict[str, str]:
    """The files of a folder with their hashes; of a git repository in it instead how many commits it has."""
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == ".git":
            found[f"commits in {Path(name).parent}"] = _commits(path.parent)
        elif path.is_file() and not path.is_symlink() and ".git" not in path.relative_to(folder).parts:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        if len(found) > FILES_MAX_COUNT:
            break
    return found


def _commits(repository: Path) -> str:
    with tempfile.TemporaryDirectory() as home:
        counted = subprocess.run(
            ["git", "-c", "core.hooksPath=/dev/null", "rev-list", "--count", "--all"],  # noqa: S607
            cwd=repository,
            env=bare_environment(Path(home)),
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    return counted.stdout.strip() or "cannot be read"


def flat(value: object, path: str) -> dict[str, object]:
    """The leaves of a JSON value, by their places."""
    if isinstance(value, dict) and value:
        return {place: leaf for key, entry in value.items() for place, leaf in flat(entry, f"{path}.{key}").items()}
    if isinstance(value, list) and value:
        entries = {f"{path}[{number}]": entry for number, entry in enumerate(value)}
        return {place: leaf for name, entry in entries.items() for place, leaf in flat(entry, name).items()}
    return {path: value}


def outputs(run: Json) -> dict[str, object]:
    """The leaves of all outputs that a run's steps have now."""
    found: dict[str, object] = {}
    for step in run["steps"]:
        for entry in step["tries"]:
            if entry["id"] == step["attempt_id"] and entry["state"] == "completed":
                found |= flat(entry["output"], step["agent"])
    return found


def differing(one: dict[str, object], other: dict[str, object]) -> frozenset[str]:
    """The places at which two runs differ, those that name a duration left out."""
    nothing = object()
    return frozenset(
        place
        for place in one.keys() | other.keys()
        if one.get(place, nothing) != other.get(place, nothing) and not place.endswith(_DURATIONS)
    )
