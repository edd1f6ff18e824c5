"""The bundled deployer: makes one tested commit of the coder's diff, on a branch of its own, in the run's repository.

It reads the run's input (`repo`, an absolute path; `base_commit`, the full id of the commit that the coder saw;
`test_command`, a list of words, or a string that is split like a shell's line but never run by one), and the output of
the agent `coder` (`diff`, a unified diff with a/ and b/ before its paths; `summary`). It returns

    {"branch": "stepfast/<run>-<generation>", "commit": id, "files_changed": [path, …],
     "tests": {"command": [word, …], "exit_code": 0, "duration_ms": n}}

It never pushes, and never touches the user's working tree, index or checked-out branch: it works in a linked worktree
in a temporary folder, and the branch appears in one step, with the finished commit, after the tests passed.

Killed at any instant and run again, there is one commit: it carries the run's id and generation as trailers, by which
it is found, and a branch is only ever created, never moved.

This is no sandbox. The tests are the repository's code and the coder's, and run with the rights of the worker's user:
see app/agents/confined.py and app/agents/git.py for what is limited. Where that is not enough, run the worker that
serves the handlers in a container or as a user of its own.
"""

import re
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from app.agents import Context, Happened, NotHappened, Unknown, effects_once
from app.agents.confined import run
from app.agents.git import Git, bare_environment, words
from app.errors import AuthorMistake, Permanent, TimedOut
from app.pipelines.model import Json

DIFF_MAX_CHARS = 1_000_000
FILES_MAX_COUNT = 500
SUBJECT_MAX_CHARS = 72
BODY_MAX_CHARS = 2_000
TEST_OUTPUT_MAX_BYTES = 4_000
# Kept from the tests' time for the commit and for tidying up.
RESERVE_S = 2.0

_ABSENT, _FILE, _EXECUTABLE = "000000", "100644", "100755"
# A file's header, told from a removed and an added line by the hunk that must follow it.
_ABSOLUTE_PATH = re.compile(
    r'^(?:--- "?(?!/dev/null\s)/.*\n\+\+\+ |--- .*\n\+\+\+ "?(?!/dev/null\s)/).*\n@@ ', re.MULTILINE
)
# Its inflated size is not bounded by the diff's. Inside a hunk no line can begin like this.
_BINARY_PATCH = re.compile(r"^(?:GIT binary patch|Binary files )", re.MULTILINE)


class DeployRefused(Permanent):
    """The deployer will not make this commit. `details["reason"]` says why: `head_moved`, `tests_failed`, …."""

    code = "deploy_refused"
    who = "person"


@dataclass(frozen=True, slots=True)
class _Order:
    run: str
    generation: int
    repo: Path
    base: str
    test_command: list[str]
    diff: bytes
    summary: str

    @property
    def branch(self) -> str:
        return f"stepfast/{self.run[:13]}-{self.generation}"

    @property
    def folder_prefix(self) -> str:
        """Of every attempt's temporary folder, so that the next attempt finds those of killed ones."""
        return f"stepfast-{self.run}-"


@effects_once
def deploy(ctx: Context) -> Json:
    """Raises DeployRefused with `details["reason"]`, TimedOut, AuthorMistake, or Permanent for the machine's faults."""
    order = _order(ctx)
    scratch = Path(tempfile.mkdtemp(prefix=order.folder_prefix)).resolve()
    try:
        git = Git(order.repo, scratch, ctx.remaining_s)
        return ctx.once("commit", lambda: _deploy(git, order, scratch), check=lambda: _look(git, order))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _deploy(git: Git, order: _Order, scratch: Path) -> Json:
    git.open()
    _remove_leftovers(git, order)
    _refuse_moved_head(git, order)
    ref = f"refs/heads/{order.branch}"
    if not git.ask("rev-parse", "--verify", "--quiet", ref).exit_code:
        raise _refused("branch_taken", f"The branch {order.branch} exists, and this run did not make it.")

    tree_folder = scratch / "tree"
    with git.worktree(tree_folder, order.base):
        tree = _stage(git, order, tree_folder)
        duration_ms = _test(order, tree_folder, scratch, max(0.0, git.remaining_s() - RESERVE_S))
    _refuse_moved_head(git, order)
    message = _message(order, duration_ms)
    commit = git("commit-tree", tree, "-p", order.base, "-F", "-", stdin=message.encode())
    # All zeros: only where there is no such branch yet. A fenced attempt that is still alive may have been first.
    created = git.ask("update-ref", ref, commit, "0" * len(commit))
    output = _find(git, order)
    if output is None:
        raise _refused("branch_taken", f"The branch {order.branch} could not be created: {words(created)}")
    return output


def _look(git: Git, order: _Order) -> Happened | NotHappened | Unknown:
    """Whether an earlier attempt made the commit."""
    try:
        git.open()
        output = _find(git, order)
    except Permanent:  # the repository is gone, or cannot be read: nobody can tell
        return Unknown()
    return NotHappened() if output is None else Happened(output)


def _find(git: Git, order: _Order) -> Json | None:
    """The output, read back from the commit that carries this run's id and generation; None where there is none.

    Every attempt returns what stands in the commit, so that a repetition returns the identical output.
    """
    ref = f"refs/heads/{order.branch}"
    if git.ask("rev-parse", "--verify", "--quiet", ref).exit_code:
        return None
    trailers = (f"--grep=^Stepfast-Run: {order.run}$", f"--grep=^Stepfast-Generation: {order.generation}$")
    commit = git("rev-list", "--max-count=1", "--basic-regexp", "--all-match", *trailers, f"{order.base}..{ref}")
    if not commit:
        return None
    duration = re.search(r"^Stepfast-Tests-Ms: (\d+)$", git("cat-file", "commit", commit), re.MULTILINE)
    return {
        "branch": order.branch,
        "commit": commit,
        "files_changed": [path for _, _, path in _changes(git, order.base, commit)],
        "tests": {
            "command": order.test_command,
            "exit_code": 0,
            "duration_ms": int(duration[1]) if duration else 0,
        },
    }


def _stage(git: Git, order: _Order, folder: Path) -> str:
    """Applies the diff and fills the worktree; the id of the new tree, in which nothing stands that the tests make.

    The diff goes to the index first, where it can write no file, and what came out of it is judged there.
    """
    git("read-tree", order.base, folder=folder)
    applied = git.ask("apply", "--cached", folder=folder, stdin=order.diff)
    if applied.exit_code:
        # Models miscount the lines in a hunk's header. The lines themselves must still match exactly.
        recounted = git.ask("apply", "--cached", "--recount", folder=folder, stdin=order.diff)
        if recounted.exit_code:
            raise _refused("diff_does_not_apply", f"git refused the coder's diff: {words(applied)}")
    tree = git("write-tree", folder=folder)
    _refuse_unusual(_changes(git, order.base, tree))
    git("checkout-index", "--all", "--force", "--quiet", folder=folder)
    return tree


def _changes(git: Git, base: str, other: str) -> list[tuple[str, str, str]]:
    """(old mode, new mode, path) of each file that differs."""
    fields = git("diff-tree", "-r", "--raw", "-z", "--no-renames", base, other).split("\0")[:-1]
    return [(meta[1:7], meta[8:14], path) for meta, path in zip(fields[::2], fields[1::2], strict=True)]


def _refuse_unusual(changes: list[tuple[str, str, str]]) -> None:
    """Only ordinary files may change. git itself refused `..`, `.git`, and what lies behind a symlink."""
    if not changes:
        raise _refused("diff_empty", "The coder's diff changes nothing.")
    if len(changes) > FILES_MAX_COUNT:
        raise _refused(
            "diff_too_large", f"The coder's diff changes {len(changes)} files; {FILES_MAX_COUNT} may change."
        )
    for old, new, path in changes:
        if not {old, new} <= {_ABSENT, _FILE, _EXECUTABLE} or path == ".gitmodules":
            raise _refused("diff_not_a_file", f"The coder's diff makes or changes a symlink or submodule: {path!r}.")
        if _ABSENT not in {old, new} and old != new:
            raise _refused("diff_changes_mode", f"The coder's diff changes the mode of {path!r}.")
        if not path.isprintable() or "\N{REPLACEMENT CHARACTER}" in path:
            raise _refused("diff_path", f"The coder's diff names a file with unprintable characters: {path!r}.")


def _test(order: _Order, folder: Path, home: Path, timeout_s: float) -> int:
    """Runs the tests in `folder` and returns how many ms they took."""
    finished = run(
        order.test_command,
        folder=folder,
        environment=bare_environment(home),
        timeout_s=timeout_s,
        output_max_bytes=TEST_OUTPUT_MAX_BYTES,
    )
    details: dict[str, object] = {
        "command": order.test_command,
        "exit_code": finished.exit_code,
        "duration_ms": finished.duration_ms,
        # A NUL could not be stored.
        "output_tail": (finished.output + finished.errors)
        .decode(errors="replace")
        .replace("\0", "\N{SYMBOL FOR NULL}"),
    }
    if finished.exit_code is None:
        raise TimedOut(f"The repository's tests did not end within {timeout_s:.0f} s.", details=details)
    if finished.exit_code:
        raise _refused("tests_failed", f"The repository's tests failed with exit code {finished.exit_code}.", **details)
    return finished.duration_ms


def _refuse_moved_head(git: Git, order: _Order) -> None:
    head = git.ask("rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    if head.exit_code:
        raise _refused("head_unborn", f"The repository {order.repo} has no commit yet.")
    now = head.output.decode().strip()
    if now != order.base:
        raise _refused(
            "head_moved",
            f"HEAD of {order.repo} moved from {order.base[:12]}, which the coder saw, to {now[:12]}.",
            base_commit=order.base,
            head=now,
        )


def _remove_leftovers(git: Git, order: _Order) -> None:
    """Worktrees of this run's killed attempts. Only inside the folder where this worker makes them."""
    ours = Path(tempfile.gettempdir()).resolve()
    for line in git("worktree", "list", "--porcelain").splitlines():
        folder = Path(line.removeprefix("worktree "))
        scratch = folder.parent
        if line.startswith("worktree ") and scratch.parent == ours and scratch.name.startswith(order.folder_prefix):
            git.remove_worktree(folder)
            shutil.rmtree(scratch, ignore_errors=True)


def _message(order: _Order, duration_ms: int) -> str:
    """The summary is on one line, so that no line of it can pass for a trailer."""
    summary = " ".join("".join(c if c.isprintable() else " " for c in order.summary).split())
    subject, body = summary or "Apply the coder's diff", ""
    if len(subject) > SUBJECT_MAX_CHARS:
        subject, body = summary[: SUBJECT_MAX_CHARS - 1] + "…", summary[:BODY_MAX_CHARS] + "\n\n"
    return (
        f"{subject}\n\n{body}"
        f"Stepfast-Run: {order.run}\nStepfast-Generation: {order.generation}\nStepfast-Tests-Ms: {duration_ms}\n"
    )


def _order(ctx: Context) -> _Order:
    """Everything that the deployer needs, checked."""
    given, coder = ctx.run.input, ctx.inputs.get("coder")
    if coder is None:
        raise AuthorMistake("The deployer needs the output of an agent `coder` among those it depends on.")
    repo, base = given.get("repo"), given.get("base_commit")
    if not isinstance(repo, str) or "\0" in repo or not Path(repo).is_absolute():
        raise AuthorMistake("The run's input needs `repo`, the absolute path of a git repository.")
    if not isinstance(base, str) or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", base):
        raise AuthorMistake("The run's input needs `base_commit`, the full id of the commit that the coder saw.")
    return _Order(
        run=str(ctx.run.id),
        generation=ctx.run.generation,
        repo=Path(repo).resolve(),
        base=base,
        test_command=_test_command(given.get("test_command")),
        diff=_diff(coder.get("diff")),
        summary=str(coder.get("summary") or ""),
    )


def _test_command(given: object) -> list[str]:
    try:
        command = shlex.split(given) if isinstance(given, str) else given
    except ValueError:  # a quotation without an end
        command = None
    if not isinstance(command, list) or not command or not all(isinstance(w, str) and "\0" not in w for w in command):
        raise AuthorMistake("The run's input needs `test_command`: a list of words, or a string of them.")
    return command


def _diff(given: object) -> bytes:
    """The diff as git wants it. What git would accept and we do not is refused here or by `_refuse_unusual`."""
    if not isinstance(given, str) or not given.strip():
        raise _refused("diff_empty", "The coder's diff is empty.")
    if len(given) > DIFF_MAX_CHARS:
        raise _refused("diff_too_large", f"The coder's diff has {len(given)} characters; {DIFF_MAX_CHARS} are allowed.")
    if "\0" in given or any("\ud800" <= c <= "\udfff" for c in given):
        raise _refused("diff_not_text", "The coder's diff holds NUL characters or lone surrogates, so it is no text.")
    if _ABSOLUTE_PATH.search(given):
        raise _refused("diff_path", "The coder's diff names an absolute path.")
    if _BINARY_PATCH.search(given):
        raise _refused("diff_binary", "The coder's diff holds a binary patch.")
    return (given if given.endswith("\n") else given + "\n").encode()


def _refused(reason: str, message: str, **details: object) -> DeployRefused:
    """`reason` is stable; the message is for people."""
    return DeployRefused(message, details={"reason": reason, **details})
