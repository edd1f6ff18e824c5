"""What the bundled deployer refuses: diffs, repositories and inputs, each by name and with nothing left behind."""

import os
import shutil

import deploying
import pytest
from deploying import BRANCH, CODER, RUN, adds, commits_of, context, git

from app.agents.deployer import DIFF_MAX_CHARS, DeployRefused, deploy
from app.cli.sample_repository import head, run_input
from app.errors import AuthorMistake, Permanent


@pytest.fixture
def repo(tmp_path, monkeypatch):
    yield from deploying.example_repository(tmp_path, monkeypatch)


@pytest.fixture
def given(repo):
    return run_input(repo)


def test_a_head_that_moved_is_refused_by_name(repo, given):
    """The coder saw another commit than the one that is checked out now: nothing is made of its diff."""
    git(repo, "-c", "user.name=a", "-c", "user.email=b@c", "commit", "--quiet", "--allow-empty", "--message=later")

    with pytest.raises(DeployRefused, match=r"HEAD of .* moved from 9cfb") as refused:
        deploy(context(given))

    assert refused.value.details == {"reason": "head_moved", "base_commit": given["base_commit"], "head": head(repo)}
    assert commits_of(repo) == []


def test_failing_tests_are_refused_with_the_end_of_their_output(repo, given):
    """A diff that does not repair the bug leaves no branch, and the dead letter shows what the tests said."""
    useless = CODER | {"diff": adds("note.txt")}

    with pytest.raises(DeployRefused, match="failed with exit code 1") as refused:
        deploy(context(given, useless))

    assert refused.value.details["reason"] == "tests_failed"
    assert "test_the_last_page_holds_the_rest" in refused.value.details["output_tail"]
    assert git(repo, "branch", "--list", "stepfast/*") == ""


SYMLINK = "diff --git a/link b/link\nnew file mode 120000\n--- /dev/null\n+++ b/link\n@@ -0,0 +1 @@\n+/etc/passwd\n"
SUBMODULE = SYMLINK.replace("120000", "160000").replace("/etc/passwd", f"Subproject commit {'1' * 40}")
MODE = "diff --git a/paging.py b/paging.py\nold mode 100644\nnew mode 100755\n"
BINARY = "diff --git a/x b/x\nnew file mode 100644\nindex 0..1\nGIT binary patch\nliteral 1\nIcmZPo000310RR91\n\n"


@pytest.mark.parametrize(
    ("diff", "reason"),
    [
        ("", "diff_empty"),
        (" \n", "diff_empty"),
        ("no diff at all", "diff_does_not_apply"),
        (adds("../outside.txt"), "diff_does_not_apply"),
        (adds("a/../../outside.txt"), "diff_does_not_apply"),
        (adds(".git/hooks/post-checkout"), "diff_does_not_apply"),
        (adds("sub/.GIT/config"), "diff_does_not_apply"),
        (adds("git~1/config"), "diff_does_not_apply"),
        (adds("/etc/stepfast", header="--- /dev/null\n+++ "), "diff_path"),
        (adds("/etc/stepfast"), "diff_does_not_apply"),
        ("--- /etc/passwd\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n", "diff_path"),
        (adds('"b/new\\nline"', header="--- /dev/null\n+++ "), "diff_path"),
        (adds(".gitmodules"), "diff_not_a_file"),
        (SYMLINK, "diff_not_a_file"),
        (SUBMODULE, "diff_not_a_file"),
        (MODE, "diff_changes_mode"),
        (BINARY, "diff_binary"),
        (CODER["diff"].replace("entries // size", "items // size"), "diff_does_not_apply"),
        (adds("x").replace("text", "a\0b"), "diff_not_text"),
        (adds("x").replace("text", "a\ud800b"), "diff_not_text"),
        (adds("x") + "+" * DIFF_MAX_CHARS, "diff_too_large"),
        ("".join(adds(f"f{n}") for n in range(501)), "diff_too_large"),
    ],
)
def test_a_diff_that_is_more_than_text_in_ordinary_files_is_refused(repo, given, diff, reason):
    """Nothing outside the repository, in .git, through a link, in a mode or in binary form is written or committed."""
    before = sorted(repo.parent.iterdir())

    with pytest.raises(DeployRefused) as refused:
        deploy(context(given, CODER | {"diff": diff}))

    assert refused.value.details["reason"] == reason
    assert sorted(repo.parent.iterdir()) == before
    assert git(repo, "for-each-ref", "--format=%(refname)") == "refs/heads/main"
    assert sorted(path.name for path in repo.iterdir()) == [".git", "README.md", "paging.py", "test_paging.py"]


def test_a_symlink_of_the_repository_leads_nobody_out(repo, given, tmp_path):
    """A diff can neither write behind a symlink that the repository holds, nor change where it leads."""
    (tmp_path / "outside").mkdir()
    (repo / "link").symlink_to(tmp_path / "outside")
    git(repo, "add", "link")
    git(repo, "-c", "user.name=a", "-c", "user.email=b@c", "commit", "--quiet", "--message=link")
    given["base_commit"] = head(repo)
    there = f"-{tmp_path}/outside\n\\ No newline at end of file\n+/etc\n\\ No newline at end of file\n"

    for diff in (adds("link/x"), f"--- a/link\n+++ b/link\n@@ -1 +1 @@\n{there}"):
        with pytest.raises(DeployRefused, match=r"symbolic link|symlink"):
            deploy(context(given, CODER | {"diff": diff}))

    assert list((tmp_path / "outside").iterdir()) == []


def test_hunk_headers_that_miscount_are_corrected_and_lines_are_not(repo, given):
    """Models miscount lines; a diff whose lines match is applied whatever its headers count."""
    miscounted = CODER["diff"].replace("@@ -5,7 +5,7 @@", "@@ -4,9 +4,12 @@")
    assert miscounted != CODER["diff"]

    assert deploy(context(given, CODER | {"diff": miscounted}))["files_changed"] == ["paging.py"]


def test_a_branch_of_that_name_with_a_foreign_commit_is_left_alone(repo, given):
    """The deployer creates branches and never moves one."""
    git(repo, "branch", BRANCH)

    with pytest.raises(DeployRefused, match="this run did not make it") as refused:
        deploy(context(given))

    assert refused.value.details["reason"] == "branch_taken"
    assert git(repo, "rev-parse", BRANCH) == given["base_commit"]


def test_a_summary_cannot_forge_a_trailer_or_flood_the_message(repo, given):
    """The summary of a model becomes one bounded line of printable text and one bounded paragraph."""
    summary = "Repair\n\nStepfast-Run: 0000\x1b[31m\u202e " + "long " * 2_000

    deploy(context(given, CODER | {"summary": summary}))

    message = git(repo, "log", "-1", "--format=%B", BRANCH)
    assert len(message) < 2_500
    assert len(message.splitlines()[0]) <= 72
    assert "\x1b" not in message
    assert "\u202e" not in message
    assert git(repo, "log", "-1", "--format=%(trailers:key=Stepfast-Run,valueonly)", BRANCH) == str(RUN)


def _gone(repo):
    shutil.rmtree(repo)


def _plain_folder(repo):
    """A folder without a repository, inside one."""
    git(repo.parent, "init", "--quiet")
    shutil.rmtree(repo / ".git")


def _bare(repo):
    shutil.move(repo / ".git", repo.parent / "bare")
    shutil.rmtree(repo)
    shutil.move(repo.parent / "bare", repo)
    git(repo, "config", "core.bare", "true")


def _unborn(repo):
    git(repo, "checkout", "--quiet", "--orphan", "empty")


def _elsewhere(repo):
    git(repo, "config", "core.worktree", str(repo.parent))


def _odd_filter(repo):
    git(repo, "config", "filter.a=b.smudge", "cat")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_gone, "is not a folder"),
        (_plain_folder, "is not the top folder of a git repository"),
        (_bare, "is bare"),
        (_unborn, "has no commit yet"),
        (_elsewhere, "is not the top folder of a git repository"),
        (_odd_filter, "a filter with '='"),
    ],
)
def test_a_repository_that_cannot_be_used_gets_one_clear_sentence(repo, given, spoil, sentence):
    """A retry would fail again, so the failure is permanent, and it says what is wrong with which folder."""
    spoil(repo)

    with pytest.raises(Permanent, match=sentence) as failed:
        deploy(context(given))

    assert str(repo) in failed.value.message
    assert "\n" not in failed.value.message


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a repository away")
def test_a_repository_of_another_user_gets_one_clear_sentence(repo, given):
    """The protection of git itself stays on, and its long advice becomes one sentence."""
    for path in (repo, repo / ".git"):
        os.chown(path, 65534, 65534)

    with pytest.raises(Permanent, match="belongs to another user"):
        deploy(context(given))


def test_a_machine_without_git_gets_one_clear_sentence(repo, given, monkeypatch):
    """Where git is missing the operator is told so."""
    monkeypatch.setenv("PATH", str(repo.parent))

    with pytest.raises(Permanent, match="git is not on this worker's PATH"):
        deploy(context(given))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("repo", None),
        ("repo", "relative/path"),
        ("repo", "/nul\0"),
        ("base_commit", "HEAD"),
        ("base_commit", "--upload-pack=x"),
        ("base_commit", 7),
        ("test_command", None),
        ("test_command", []),
        ("test_command", ""),
        ("test_command", "an 'open quotation"),
        ("test_command", ["nul\0"]),
        ("test_command", [1]),
    ],
)
def test_an_input_that_says_too_little_is_the_authors_mistake(repo, given, field, value):
    """What is missing in the run's input is named."""
    with pytest.raises(AuthorMistake, match=field):
        deploy(context(given | {field: value}))
