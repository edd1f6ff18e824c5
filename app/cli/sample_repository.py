"""The repository that the bundled example repairs: made anew from its template, and described as a run's input."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from app.agents.git import bare_environment
from app.errors import NotReady
from app.pipelines.model import Json

FILES_MAX_COUNT = 50
FILE_MAX_BYTES = 64_000
_GIT_TIMEOUT_S = 30.0
_ISSUE = (
    "The last page is missing. With 21 entries and 10 on a page, page 3 should show the 21st entry, but we get "
    "'there is no page 3'. With 20 entries all is well."
)
# A fixed time and identity give the same commit id on every machine.
_IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (
        ("NAME", "Stepfast example"),
        ("EMAIL", "example@stepfast.invalid"),
        ("DATE", "2026-01-01T00:00:00Z"),
    )
}


def make_repository(template: Path, folder: Path) -> str:
    """Makes a git repository of the template's files in the new folder `folder`; the id of its only commit."""
    folder.mkdir(parents=True)
    for source in _files(template):
        target = folder / source.relative_to(template)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    _git(folder, "init", "--quiet", "--initial-branch=main")
    _git(folder, "add", "--all")
    _git(folder, "commit", "--quiet", "--message=Cut a list of entries into pages")
    return head(folder)


def head(repo: Path) -> str:
    """The id of the commit that is checked out."""
    return _git(repo, "rev-parse", "HEAD").strip()


def run_input(repo: Path) -> Json:
    """The input of a run of the example: the reported bug, the files at HEAD, and how the tests are run."""
    commit = head(repo)
    paths = _git(repo, "ls-tree", "-r", "--name-only", "-z", commit).split("\0")[:-1]
    assert len(paths) <= FILES_MAX_COUNT
    files = {path: _git(repo, "show", f"{commit}:{path}") for path in paths}
    assert all(len(content) <= FILE_MAX_BYTES for content in files.values())
    return {
        "repo": str(repo.resolve()),
        "base_commit": commit,
        "test_command": [sys.executable, "-m", "unittest"],
        "issue": _ISSUE,
        "files": files,
    }


def _files(template: Path) -> list[Path]:
    return [path for path in sorted(template.rglob("*")) if path.is_file() and "__pycache__" not in path.parts]


def _git(folder: Path, *arguments: str) -> str:
    """Runs git with neither the user's config nor a template's hooks."""
    if shutil.which("git") is None:
        raise NotReady("git is not installed.", next_step="Install it: the example ends in a commit.")
    with tempfile.TemporaryDirectory() as home:
        return subprocess.run(  # noqa: S603  # our own words
            ["git", "-c", "init.templateDir=", "-c", "core.hooksPath=/dev/null", *arguments],  # noqa: S607
            cwd=folder,
            env=bare_environment(Path(home)) | _IDENTITY,
            check=True,
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
        ).stdout
