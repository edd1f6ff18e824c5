"""git in somebody's repository, such that as little as possible of that repository's config can run a program.

git runs programs that a repository's own config or attributes name. What was considered, and what stands against it:

  hooks (also post-checkout and reference-transaction)      core.hooksPath=/dev/null
  core.fsmonitor                                            off
  filter.*.clean, smudge, process (run by a checkout)       each one that is configured is emptied, by name
  diff.external, diff.*.command, diff.*.textconv            only `diff-tree --raw` is used, which runs none
  merge.*.driver                                            nothing is merged
  gpg.program (commit.gpgSign, log.showSignature)           `commit-tree` and `rev-list` neither sign nor verify
  core.pager, core.editor, core.askPass, credential.helper  replaced or emptied
  core.sshCommand, remote helpers, fetches on demand        no protocol is allowed, no lazy fetch
  submodules                                                never recursed into
  aliases                                                   cannot replace git's own commands, and only those are used
  the user's and the machine's config and attributes        not read
  gc and maintenance in the background                      off

So files that a filter would make (git-lfs) stay as they are stored, and submodules stay empty.
This is no sandbox: git itself parses what the repository holds, and the repository's tests run its code.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from app.agents.confined import Finished, run
from app.errors import Permanent, TimedOut

_OPTIONS = {
    "core.hooksPath": "/dev/null",
    "core.fsmonitor": "false",
    "core.attributesFile": "/dev/null",
    "core.sparseCheckout": "false",
    "core.protectHFS": "true",
    "core.protectNTFS": "true",
    "core.fsync": "committed",  # a recorded commit must survive what the record survives
    "apply.whitespace": "nowarn",
    "credential.helper": "",
    "gc.auto": "0",
    "i18n.commitEncoding": "UTF-8",
    "maintenance.auto": "false",
    "submodule.recurse": "false",
}
_IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "Stepfast deployer"), ("EMAIL", "deployer@stepfast.invalid"))
}
_OUTPUT_MAX_BYTES = 1 << 20
_WORDS_MAX_CHARS = 600
# Tidying up may take this long, also when the attempt's own time is over.
_TIDY_S = 10.0


def bare_environment(home: Path) -> dict[str, str]:
    """What git and the tests see: where programs lie, an empty home, a language. Nothing else, so no keys."""
    # A relative entry would be looked up in the repository.
    path = [entry for entry in os.environ.get("PATH", os.defpath).split(os.pathsep) if Path(entry).is_absolute()]
    return {
        "PATH": os.pathsep.join(path),
        "HOME": str(home),
        "TMPDIR": str(home),
        "LANG": "C.UTF-8",
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": "/dev/null",
    }


class Git:
    """Runs git in the folder `repo`, each command within `remaining_s()` seconds. `home` is a folder without config."""

    def __init__(self, repo: Path, home: Path, remaining_s: Callable[[], float]) -> None:
        self.repo = repo
        self._home = home
        self.remaining_s = remaining_s
        self._environment = bare_environment(home) | {
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_NO_LAZY_FETCH": "1",
            "GIT_ALLOW_PROTOCOL": "none",
            "GIT_PAGER": "cat",
            "GIT_EDITOR": "false",
            "GIT_ASKPASS": "false",
            # Else a plain folder inside a repository would be taken for that repository.
            "GIT_CEILING_DIRECTORIES": str(repo.parent),
            **_IDENTITY,
        }
        self._options = dict(_OPTIONS)

    def open(self) -> None:
        """Raises Permanent, in one sentence, unless `repo` is the top folder of a repository of this user."""
        if shutil.which("git", path=self._environment["PATH"]) is None:
            raise Permanent("git is not on this worker's PATH.", next_step="Install git where the handlers run.")
        if not self.repo.is_dir():
            raise Permanent(f"The repository {self.repo} is not a folder on this worker.")
        found = self.ask("rev-parse", "--is-bare-repository", "--show-toplevel")
        words = found.errors.decode(errors="replace")
        if "dubious ownership" in words or "owned by someone else" in words:
            raise Permanent(
                f"The repository {self.repo} belongs to another user, so git refuses it.",
                next_step="Run the worker that serves the handlers as the repository's owner.",
            )
        bare, _, top = found.output.decode(errors="replace").partition("\n")
        if bare == "true":
            raise Permanent(f"The repository {self.repo} is bare: it has no HEAD that the coder could have read from.")
        if found.exit_code or Path(top.rstrip("\n")) != self.repo:
            raise Permanent(f"{self.repo} is not the top folder of a git repository.")
        self._empty_filters()

    def _empty_filters(self) -> None:
        listed = self.ask("config", "--null", "--name-only", "--get-regexp", r"^filter\.")  # 1 where there is none
        for name in listed.output.decode(errors="replace").split("\0")[:-1]:
            if "=" in name:  # `git -c` could not name it
                raise Permanent(f"The repository {self.repo} configures a filter with '=' in its name, {name!r}.")
            self._options[name] = "false" if name.endswith(".required") else ""

    def ask(self, *arguments: str, folder: Path | None = None, stdin: bytes = b"", tidy: bool = False) -> Finished:
        """Runs a command whose failure is an answer. Raises TimedOut."""
        options = [part for name, value in self._options.items() for part in ("-c", f"{name}={value}")]
        finished = run(
            ["git", "--no-pager", *options, *arguments],
            folder=folder or self.repo,
            environment=self._environment,
            timeout_s=_TIDY_S if tidy else self.remaining_s(),
            output_max_bytes=_OUTPUT_MAX_BYTES,
            stdin=stdin,
        )
        if finished.exit_code is None:
            raise TimedOut(f"git {arguments[0]} did not end in the time that the attempt had left.")
        if finished.cut:
            raise Permanent(f"git {arguments[0]} wrote more than {_OUTPUT_MAX_BYTES} bytes.")
        return finished

    def __call__(self, *arguments: str, folder: Path | None = None, stdin: bytes = b"") -> str:
        """Runs a command that must succeed, and returns its output without the last newline. Raises Permanent."""
        finished = self.ask(*arguments, folder=folder, stdin=stdin)
        if finished.exit_code:
            raise Permanent(f"git {arguments[0]} failed in {self.repo}: {words(finished)}")
        return finished.output.decode(errors="replace").removesuffix("\n")

    @contextmanager
    def worktree(self, folder: Path, commit: str) -> Iterator[None]:
        """A linked worktree at `folder`, detached at `commit`, with no files yet; removed at the end."""
        self("worktree", "add", "--quiet", "--no-checkout", "--detach", str(folder), commit)
        try:
            yield
        finally:
            self.remove_worktree(folder)

    def remove_worktree(self, folder: Path) -> None:
        """By name, and never `git worktree prune`, which would forget the user's own on an unmounted disk."""
        self.ask("worktree", "remove", "--force", "--force", str(folder), tidy=True)


def words(finished: Finished) -> str:
    """What git said, bounded."""
    return finished.errors.decode(errors="replace").strip()[:_WORDS_MAX_CHARS]
