"""The bundled deployer on real git repositories: its one commit, also after SIGKILL, and what surrounds its processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import deploying
import pytest
from conftest import eventually
from deploying import BRANCH, CODER, RUN, Loses, Memory, alive, commits_of, context, git

from app.agents.deployer import TEST_OUTPUT_MAX_BYTES, DeployRefused, deploy
from app.cli.sample_repository import head, run_input
from app.errors import OutcomeUnknown, TimedOut


@pytest.fixture
def repo(tmp_path, monkeypatch):
    yield from deploying.example_repository(tmp_path, monkeypatch)


@pytest.fixture
def given(repo):
    return run_input(repo)


def test_a_diff_becomes_one_tested_commit_on_a_branch_of_its_own(repo, given):
    """The example's bug is repaired on a new branch, whose only commit names the run and passes the tests."""
    output = deploy(context(given))

    assert output["branch"] == BRANCH
    assert output["files_changed"] == ["paging.py"]
    assert output["tests"]["command"] == [sys.executable, "-m", "unittest"]
    assert output["tests"]["exit_code"] == 0
    assert output["tests"]["duration_ms"] > 0
    assert git(repo, "rev-list", f"main..{BRANCH}") == output["commit"]
    assert git(repo, "log", "-1", "--format=%s", BRANCH) == CODER["summary"]
    assert git(repo, "log", "-1", "--format=%(trailers:key=Stepfast-Run,valueonly)", BRANCH) == str(RUN)
    assert git(repo, "log", "-1", "--format=%(trailers:key=Stepfast-Generation,valueonly)", BRANCH) == "1"
    assert git(repo, "log", "-1", "--format=%an <%ae> %cn", BRANCH).startswith("Stepfast deployer <")
    failed = subprocess.run([sys.executable, "-B", "-m", "unittest"], cwd=repo, capture_output=True, check=False)
    git(repo, "checkout", "--quiet", BRANCH)
    passed = subprocess.run([sys.executable, "-B", "-m", "unittest"], cwd=repo, capture_output=True, check=False)
    assert (failed.returncode, passed.returncode) == (1, 0)
    assert json.loads(json.dumps(output)) == output


def test_the_users_working_tree_index_and_branch_stay_as_they_are(repo, given):
    """What is staged, changed and untracked, HEAD and the list of worktrees are the same after a deployment."""
    (repo / "README.md").write_text("staged\n")
    git(repo, "add", "README.md")
    (repo / "README.md").write_text("changed\n")
    (repo / "paging.py").write_text("changed\n")
    (repo / "untracked.txt").write_text("mine\n")

    def state():
        files = {path.name: path.read_bytes() for path in repo.iterdir() if path.is_file()}
        index = (repo / ".git" / "index").read_bytes()
        return files, index, git(repo, "symbolic-ref", "HEAD"), head(repo), git(repo, "worktree", "list")

    before = state()
    deploy(context(given))

    assert state() == before
    assert git(repo, "show", f"{BRANCH}:README.md").startswith("# paging")


def test_a_commit_whose_record_was_lost_is_found_and_not_repeated(repo, given):
    """An attempt that committed and could not record it is followed by one that returns the same commit."""
    effects = Loses()
    with pytest.raises(ConnectionError):
        deploy(context(given, effects=effects))
    (made,) = commits_of(repo)
    git(repo, "merge", "--quiet", BRANCH)  # HEAD may move after the commit

    again = Memory()
    again._effects = effects._effects
    first = deploy(context(given, effects=again))
    second = deploy(context(given, effects=again))

    assert first == second
    assert first["commit"] == made
    assert commits_of(repo) == [made]


def deploy_elsewhere(given, effects, *, killed_when=None):
    """Deploys in a process of its own; SIGKILLs it once `killed_when` holds, or lets it kill itself."""
    code = (
        "import json, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "import deploying as t; from app.agents.deployer import deploy;"
        "deploy(t.context(json.loads(sys.argv[2]), effects=getattr(t, sys.argv[3])(Path(sys.argv[4]))))"
    )
    tests = Path(__file__).parent
    record = Path(given["repo"]).parent / "effect"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tests), json.dumps(given), effects, str(record)], cwd=tests.parent
    )
    if killed_when:
        eventually(killed_when)
        process.kill()
    assert process.wait(30) == -signal.SIGKILL
    return Memory(record)


def test_sigkill_between_the_commit_and_its_record_makes_one_commit(repo, given):
    """A worker killed right after the commit is followed by an attempt that finds it by its trailers."""
    record = deploy_elsewhere(given, "Dies")
    (made,) = commits_of(repo)
    leftovers = list((repo.parent / "scratch").iterdir())

    assert deploy(context(given, effects=record))["commit"] == made
    assert commits_of(repo) == [made]
    for folder in leftovers:  # its worktree was removed before the commit
        folder.rmdir()


def test_sigkill_during_the_tests_leaves_nothing_running_and_the_next_attempt_tidies_up(repo, given):
    """The tests die with their worker; the next attempt removes the worktree and makes the only commit."""
    pids = repo.parent / "pids"
    hang = f"import os, time; open({str(pids)!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(300)"
    record = deploy_elsewhere(
        given | {"test_command": [sys.executable, "-c", hang]},
        "Memory",
        killed_when=lambda: pids.exists() and pids.read_text().endswith(" "),
    )
    eventually(lambda: not alive(pids.read_text().strip()))
    assert "stepfast-" in git(repo, "worktree", "list")

    deploy(context(given, effects=record))

    assert len(commits_of(repo)) == 1
    assert git(repo, "worktree", "list").count("\n") == 0


def test_neither_hooks_nor_config_of_the_repository_run_programs(repo, given, tmp_path):
    """Hooks, filters, fsmonitor and the rest of a hostile repository are not run, though plain git runs them."""
    (repo / ".gitattributes").write_text("* filter=evil diff=evil merge=evil\n")
    git(repo, "add", "--all")
    git(repo, "-c", "user.name=a", "-c", "user.email=b@c", "commit", "--quiet", "--message=attributes")
    trap, sprung = tmp_path / "trap", tmp_path / "sprung"
    trap.write_text(f"#!/bin/sh\necho $0 $* >> {sprung}\ncat\n")
    trap.chmod(0o755)
    (repo / ".git" / "hooks").mkdir()
    for hook in ("post-checkout", "pre-commit", "post-commit", "reference-transaction", "post-index-change"):
        shutil.copy(trap, repo / ".git" / "hooks" / hook)
    evil = ("core.fsmonitor", "core.pager", "core.editor", "core.askPass", "core.sshCommand", "gpg.program")
    evil += ("filter.evil.clean", "filter.evil.smudge", "filter.evil.process", "diff.external", "diff.evil.command")
    evil += ("diff.evil.textconv", "merge.evil.driver", "credential.helper", "alias.apply", "sequence.editor")
    for name in evil:
        git(repo, "config", name, str(trap))
    for name in ("commit.gpgSign", "log.showSignature", "filter.evil.required", "core.sparseCheckout"):
        git(repo, "config", name, "true")
    given["base_commit"] = git(repo, "rev-parse", "HEAD")

    deploy(context(given))

    assert not sprung.exists(), sprung.read_text()
    assert "-(-entries // size)" in git(repo, "cat-file", "blob", f"{BRANCH}:paging.py")
    subprocess.run(["git", "status"], cwd=repo, env=deploying.ENVIRONMENT, capture_output=True, check=False)
    assert sprung.exists(), "the trap itself does not work"


def test_git_and_the_tests_see_none_of_the_workers_environment(repo, given, monkeypatch):
    """The tests' environment holds where programs lie and an empty home, and no key."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-planted")
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    monkeypatch.setenv("PATH", f".:{os.environ['PATH']}")
    show = "import json, os, sys; print(json.dumps([dict(os.environ), os.listdir(os.environ['HOME'])])); sys.exit(1)"

    with pytest.raises(DeployRefused) as refused:
        deploy(context(given | {"test_command": [sys.executable, "-c", show]}))

    environment, home = json.loads(refused.value.details["output_tail"])
    assert set(environment) == {"PATH", "HOME", "TMPDIR", "LANG", "GIT_CONFIG_NOSYSTEM", "GIT_CONFIG_GLOBAL"}
    assert not environment["PATH"].startswith(".")
    assert home == ["tree"]


def test_tests_without_an_end_are_killed_with_all_that_they_started(repo, given):
    """When the attempt's time is over the whole process group dies, and the failure is one that a retry may mend."""
    pids = repo.parent / "pids"
    script = f"sleep 300 & echo $! $$ > {pids}; wait"

    with pytest.raises(TimedOut, match="did not end within"):
        deploy(context(given | {"test_command": ["sh", "-c", script]}, timeout_ms=8_000))

    for pid in pids.read_text().split():
        eventually(lambda pid=pid: not alive(pid))
    assert commits_of(repo) == []


def test_a_background_process_of_passing_tests_does_not_outlive_them(repo, given):
    """What the tests leave running neither holds up the deployment nor stays."""
    pids = repo.parent / "pids"

    deploy(context(given | {"test_command": ["sh", "-c", f"sleep 300 & echo $! > {pids}"]}))

    eventually(lambda: not alive(pids.read_text().strip()))


def test_much_output_of_the_tests_is_read_and_only_its_end_is_kept(repo, given):
    """100 MB of output neither fill the memory nor block the tests."""
    noisy = "import sys\nfor _ in range(100): sys.stdout.write('x' * 1_000_000)\nprint('\\0the end'); sys.exit(1)"

    with pytest.raises(DeployRefused) as refused:
        deploy(context(given | {"test_command": [sys.executable, "-c", noisy]}))

    tail = refused.value.details["output_tail"]
    assert len(tail) == TEST_OUTPUT_MAX_BYTES
    assert tail.endswith("xxx\N{SYMBOL FOR NULL}the end\n")


def test_the_tests_have_limits_on_memory_and_open_files(repo, given):
    """A test that takes more memory than allowed fails, and does not take its machine along."""
    greedy = "import resource as r, sys; print(r.getrlimit(r.RLIMIT_NOFILE)[0] <= 1024); bytearray(5 << 30)"

    with pytest.raises(DeployRefused) as refused:
        deploy(context(given | {"test_command": [sys.executable, "-c", greedy]}))

    assert "True" in refused.value.details["output_tail"]
    if sys.platform == "linux":
        assert "MemoryError" in refused.value.details["output_tail"]


def test_the_test_command_is_split_and_never_given_to_a_shell(repo, given):
    """A semicolon, a redirection or a variable is a word like any other."""
    output = deploy(context(given | {"test_command": "echo 'a b' ; touch $HOME/../../shell"}))

    assert output["tests"]["command"] == ["echo", "a b", ";", "touch", "$HOME/../../shell"]
    assert not (repo.parent / "shell").exists()


def test_an_attempt_that_lost_its_claim_and_its_successor_make_one_commit(repo, given):
    """Both attempts pass their tests at the same moment; the branch is created once, and both return what it holds."""
    meeting = repo.parent / "meeting"
    meeting.mkdir()
    meet = (
        "import os, pathlib, time\n"
        f"folder = pathlib.Path({str(meeting)!r}); (folder / str(os.getpid())).touch()\n"
        "while len(list(folder.iterdir())) < 2: time.sleep(0.01)"
    )
    given |= {"test_command": [sys.executable, "-c", meet]}

    with ThreadPoolExecutor() as pool:
        stale = pool.submit(deploy, context(given, timeout_ms=20_000))
        eventually(lambda: list(meeting.iterdir()))
        successor = pool.submit(deploy, context(given, timeout_ms=20_000))

    first, second = stale.result(), successor.result()
    assert first == second
    assert git(repo, "rev-list", f"main..{BRANCH}") == first["commit"]


def test_two_runs_deploy_to_one_repository_at_once(repo, given):
    """Each run gets its own branch with its own commit, on the same base."""
    runs = [uuid4(), uuid4()]

    with ThreadPoolExecutor() as pool:
        outputs = list(pool.map(deploy, [context(given, run=run) for run in runs]))

    assert len({output["branch"] for output in outputs}) == 2
    for run in runs:
        (commit,) = commits_of(repo, run)
        assert git(repo, "rev-parse", f"{commit}^") == given["base_commit"]


def test_a_new_generation_makes_a_commit_of_its_own(repo, given):
    """A deliberate repetition is another branch; the first stays."""
    branches = [deploy(context(given, generation=generation))["branch"] for generation in (1, 2)]

    assert branches == [BRANCH, BRANCH.removesuffix("1") + "2"]
    assert len(commits_of(repo)) == 2


def test_an_unknown_outcome_stays_unknown_where_the_repository_is_gone(repo, given):
    """Nobody can tell whether a killed attempt committed to a repository that cannot be read: a person must look."""
    effects = Loses()
    with pytest.raises(ConnectionError):
        deploy(context(given, effects=effects))
    shutil.rmtree(repo)

    with pytest.raises(OutcomeUnknown):
        deploy(context(given, effects=effects))
