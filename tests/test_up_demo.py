"""`stepfast up` and `stepfast demo`, as a user starts them: what is said, what is left behind, what an interruption costs."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from commanding import STEPFAST, answer
from conftest import ROOT, eventually

from app import embedded
from app.cli.main import stepfast
from app.simulator import script
from app.simulator.server import Simulator

EXAMPLE = ROOT / "examples" / "bugfix"
NOTHING_HERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home whose servers' data is made once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def environ(home):
    """A shell of somebody who uses Celery elsewhere, behind a proxy, without a home."""
    return {
        "PATH": os.environ["PATH"],
        "STEPFAST_HOME": str(home),
        "BROKER_URL": NOTHING_HERE,
        "CELERY_BROKER_URL": NOTHING_HERE,
        "CELERY_CONFIG_MODULE": "nothing",
        "HTTP_PROXY": NOTHING_HERE,
    }


@pytest.fixture
def folder(tmp_path):
    """A folder that holds modules with the names of ours."""
    for name in ("app", "celeryconfig"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not ours')\n")
    return tmp_path


@contextmanager
def started(*arguments, env, cwd):
    """`stepfast` as a process, and a function that reads its output until a line matches."""
    process = subprocess.Popen(
        [STEPFAST, *map(str, arguments)], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    seen = []

    def until(pattern: str) -> re.Match:
        for line in process.stdout:
            seen.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError("".join(seen))

    process.until, process.seen = until, seen
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def using(home: Path) -> list[str]:
    """The command lines of all processes that have to do with a home. The dead whom init has not buried have none."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            seen = command + (process / "environ").read_bytes().decode(errors="replace")
            if int(process.name) != os.getpid() and (
                str(home) in seen or str(home) in str((process / "cwd").readlink())
            ):
                found.append(command)
    return found


def listening_beyond_loopback(home: Path) -> list[str]:
    """TCP sockets of a home's processes that others than this machine could reach."""
    sockets = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if str(home) in (link.parent.parent / "environ").read_bytes().decode(errors="replace"):
                sockets.add(str(link.readlink()))
    rows = [row.split() for file in ("tcp", "tcp6") for row in Path("/proc/net", file).read_text().splitlines()[1:]]
    listening = [row for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]
    assert listening
    return [row[1] for row in listening if not row[1].startswith("0100007F:")]


def test_demo_ends_in_tested_commits(tmp_path_factory, environ, folder):
    """From nothing to commits that the failing tests accept, from any folder; what is printed is true, and works."""
    home = tmp_path_factory.mktemp("fresh")  # no interrupted run goes on beside
    environ["STEPFAST_HOME"] = str(home)
    done = answer("demo", env=environ, cwd=folder)
    lines = done.out.splitlines()
    assert done.code == 0, done
    assert lines[0] == "Claude is simulated here, by a server that comes with Stepfast: nothing is paid for."
    assert lines.count("Its own test, python -m unittest: FAILED (failures=1)") == 2
    assert lines.count("Its own test, python -m unittest: OK") == 2
    assert re.fullmatch(r"All is stopped. This took \d+\.\d s.", lines[-2])
    assert using(home) == []
    _check_part_one(done.out, _show(home, done.out, 0, folder))
    _check_part_two(done.out, _show(home, done.out, 1, folder), home, folder)

    repositories = re.findall(r"^A small git repository: (.*)", done.out, re.MULTILINE)
    commits = re.findall(r"^The deployer's commit (\w+) on (\S+): (.*)", done.out, re.MULTILINE)
    for repository, (commit, branch, subject) in zip(repositories, commits, strict=True):
        git = ["git", "-C", repository, "-c", "safe.directory=*"]
        told = subprocess.check_output([*git, "log", "-1", "--format=%h %s", "--abbrev=12", branch], text=True)
        assert told == f"{commit} {subject}\n"
        assert subprocess.check_output([*git, "status", "--porcelain", "--branch"], text=True) == "## main\n"

    following = lines[-1].removeprefix("Next: ")
    assert following == f"export STEPFAST_HOME={home}/demo && {shlex.quote(str(STEPFAST))} show last --embedded"
    shown = subprocess.check_output(
        ["/bin/sh", "-c", following], cwd=folder, env={"PATH": os.environ["PATH"]}, text=True
    )
    assert re.search(r"^deployer +completed +1 ", shown, re.MULTILINE)
    assert using(home) == []


def _show(home: Path, said: str, number: int, folder: Path) -> dict:
    """The attempts of each agent of a run of the demo."""
    run = re.findall(r"^Run (\S+) of bugfix", said, re.MULTILINE)[number]
    env = {"PATH": os.environ["PATH"], "STEPFAST_HOME": f"{home}/demo"}
    shown = answer("show", run, "--embedded", "--json", env=env, cwd=folder).json
    return {step["agent"]: step["tries"] for step in shown["steps"]}


def _check_part_one(said: str, tries: dict) -> None:
    """The coder's worker was killed, and another one made that one call again."""
    calls = (
        r"Calls: 4 \(the simulator counted 4\); repeated: 1, for \$(\S+); commits: 1\. Claude would have cost \$0\.0"
    )
    lost, completed = tries["coder"]
    assert (lost["state"], completed["state"]) == ("lost", "completed")
    assert lost["worker_id"] != completed["worker_id"]
    assert [len(tries[agent]) for agent in ("researcher", "reviewer", "deployer")] == [1, 1, 1]
    assert float(re.search(calls, said)[1]) == pytest.approx(completed["cost_usd"], abs=1e-4)
    assert re.search(r"SIGKILL to process \d+ and its group", said)
    assert "Calls of the researcher: 1." in said


def _check_part_two(said: str, tries: dict, home: Path, folder: Path) -> None:
    """The gate refused, and the run went on with what a person gave; what is shown can be typed."""
    typed = [shlex.split(line)[2:] for line in said.splitlines() if line.startswith("$ ")]
    assert [arguments[0] for arguments in typed] == ["explain", "override", "resume"]
    assert "gate_refused" in said
    assert "Calls: 3 (the simulator counted 3); repeated: 0, for $0.0000; commits: 1. Claude would have cost" in said
    own, given = tries["coder"]
    assert (own["output"]["confidence"], given["worker_id"]) == (0.62, None)
    assert given["output"] == json.loads(Path(typed[1][typed[1].index("--output") + 1]).read_text())

    env = {"PATH": os.environ["PATH"], "STEPFAST_HOME": f"{home}/demo"}
    assert "the output of coder was given by hand" in answer(*typed[0], "--embedded", env=env, cwd=folder).out
    for name, *arguments in typed:
        assert stepfast.get_command(None, name).make_context(name, list(arguments))  # refuses what cannot be typed


@pytest.mark.parametrize(
    ("point", "times"),
    [
        ("Starting PostgreSQL", 1),
        ("Starting simulator", 2),
        ("SIGKILL to process", 1),
        ("Stopping the servers", 2),
    ],
)
def test_an_interrupted_demo_leaves_nothing_running(home, environ, folder, point, times):
    """Ctrl-C at any point, also twice: everything ends within seconds, without a traceback."""
    with started("demo", env=environ, cwd=folder) as demo:
        demo.until(point)
        for _ in range(times):
            demo.send_signal(signal.SIGINT)
        rest, _ = demo.communicate(timeout=20)
        # Once all is stopped, there is nothing left to interrupt.
        assert demo.returncode == (0 if point == "Stopping the servers" else 130), demo.seen
    assert "Traceback" not in "".join(demo.seen) + rest
    assert using(home) == []


def test_a_demo_whose_reader_leaves_ends_in_order(home, environ, folder):
    """`stepfast demo | head`, or a closed terminal: what cannot be printed stops nothing from being stopped."""
    with started("demo", env=environ, cwd=folder) as demo:
        demo.until("Starting PostgreSQL")
        demo.stdout.close()
        assert demo.wait(20) == 141
    assert using(home) == []


def test_an_interrupted_run_goes_on_in_the_next_demo(home, environ, folder):
    """Nothing is broken by an interruption, and nothing that was finished is repeated."""
    with started("demo", env=environ, cwd=folder) as demo:
        interrupted = demo.until(r"Run (\S+) of bugfix")[1]
        demo.until("coder +claimed")
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=20)
        assert demo.returncode == 130
    assert using(home) == []

    done = answer("demo", env=environ, cwd=folder)
    assert done.code == 0, done
    assert f"Run {interrupted[:8]} of an interrupted demo goes on beside the new one." in done.out
    env = {"PATH": os.environ["PATH"], "STEPFAST_HOME": f"{home}/demo"}
    researcher = answer("show", interrupted, "--embedded", "--json", env=env, cwd=folder).json["steps"][0]
    assert (researcher["state"], len(researcher["tries"])) == ("completed", 1)


def test_live_demo_names_its_ceiling_before_the_first_call(home, environ, folder):
    """With a key Claude is called, and the first thing said is that it is paid for, and how much at most."""
    with Simulator(script.load(EXAMPLE / "simulator.yaml")) as claude:
        environ |= {"ANTHROPIC_API_KEY": "sk-of-the-user", "ANTHROPIC_BASE_URL": claude.url}
        done = answer("demo", "--live", env=environ, cwd=folder)
    lines = done.out.splitlines()
    assert done.code == 0, done
    assert lines[0] == "LIVE: Claude answers, with your key, and is paid for."
    ceiling = next(number for number, line in enumerate(lines) if re.match(r"At most \$\d+\.\d+ will be spent", line))
    assert ceiling < next(number for number, line in enumerate(lines) if line.startswith("Starting agents"))
    assert any(re.match(r"Calls: 3; repeated: 0, for \$0.0000; commits: 1. Cost: \$0\.0", line) for line in lines)
    assert "sk-of-the-user" not in done.out + done.err


def test_live_demo_without_a_key_starts_nothing(environ, folder):
    """It falls back on nothing."""
    answer("demo", "--live", env=environ, cwd=folder).refuses(3, "ANTHROPIC_API_KEY is not set.")


def test_a_demo_whose_run_fails_says_why(environ, folder):
    """A wrong key, a revoked one, anything else: exit code 1, the reason, and where the logs are."""
    with Simulator(script.parse("rules: [{status: 401}]")) as claude:
        environ |= {"ANTHROPIC_API_KEY": "sk-wrong", "ANTHROPIC_BASE_URL": claude.url}
        done = answer("demo", "--live", env=environ, cwd=folder)
    assert done.code == 1, done
    assert "The run failed. researcher was given up after 1 attempt (account_problem)" in done.out


def test_up_runs_until_ctrl_c(home, environ, folder):
    """What it prints can be typed; what dies is started again; nobody else can reach it, and nothing stays behind."""
    with started("up", EXAMPLE, "--simulate", env=environ, cwd=folder) as up:
        flower = up.until(r"Flower +(http\S+)")[1]
        urls = dict(up.until(r"export (\w+)=(.*)").groups() for _ in range(2))
        typed = up.until("^  (?!export)(.*)")[1]
        up.until("Ctrl-C stops everything")
        env = {"PATH": os.environ["PATH"]} | {name: shlex.split(value)[0] for name, value in urls.items()}

        assert shlex.split(typed)[:3] == [str(STEPFAST), "run", "bugfix"]
        assert json.loads(answer("runs", "--json", env=env, cwd=folder).out) == []
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        assert direct.open(flower, timeout=10).status == 200
        assert listening_beyond_loopback(home) == []
        answer("up", env=environ, cwd=folder).refuses(
            3, f"Workers are running already on {home}, under process {up.pid}."
        )

        (worker,) = [pid for pid in _children(up.pid) if b"-nagents-" in _arguments(pid)]
        os.kill(worker, signal.SIGKILL)
        up.until("agents was ended by SIGKILL, and starts again in 1 s")
        os.kill(embedded.running(home)["postgres"], signal.SIGKILL)
        up.until("Starting PostgreSQL")
        eventually(lambda: answer("runs", env=env, cwd=folder).code == 0, what="Postgres again")
        up.send_signal(signal.SIGINT)
        rest, _ = up.communicate(timeout=20)
        assert up.returncode == 0, rest
        assert rest.endswith("Stopped. Runs are kept, and go on at the next start.\n")
    assert using(home) == []


def test_workers_do_not_outlive_a_killed_up(home, environ, folder):
    """SIGKILL of `up` leaves no worker behind; the servers stop with the next command that used them."""
    with started("up", "--no-flower", env=environ, cwd=folder) as up:
        up.until("Ctrl-C stops everything")
        up.kill()
        eventually(lambda: not any("celery" in command for command in using(home)), what="the end of the workers")
    assert (
        answer("runs", "--embedded", env={"PATH": os.environ["PATH"], "STEPFAST_HOME": str(home)}, cwd=folder).code == 0
    )
    assert using(home) == []


@pytest.mark.parametrize(
    ("arguments", "changes", "code", "said"),
    [
        (["missing.yaml"], {}, 2, "missing.yaml"),
        ([], {"STEPFAST_DATABASE_URL": "postgresql://x@/y"}, 3, "STEPFAST_BROKER_URL is not set."),
        ([], {"STEPFAST_BROKER_URL": "redis://x"}, 3, "STEPFAST_DATABASE_URL is not set."),
        ([], {"STEPFAST_HOME": "/proc/1/fd"}, 3, "/proc/1/fd"),
    ],
)
def test_up_refuses_before_it_starts_anything(environ, folder, arguments, changes, code, said):
    """What is wrong with the call is said first, in one sentence."""
    answer("up", *arguments, env=environ | changes, cwd=folder).refuses(code, said)


def test_the_simulator_takes_one_script(environ, folder):
    """Two skills that both script the simulator are refused, rather than one of them ignored."""
    shutil.copytree(EXAMPLE, folder / "other")
    refused = answer("up", "--simulate", EXAMPLE, "other", env=environ, cwd=folder)
    assert refused.code == 2
    assert "Several of these skills have a simulator.yaml" in refused.err
    assert refused.out == ""


def _children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def _arguments(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b"")
