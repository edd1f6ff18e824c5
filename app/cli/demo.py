"""`stepfast demo`: the bundled example on small repositories whose test fails, until a tested commit repairs each.

Part one kills a worker while the coder works. In part two a gate refuses, and a person goes on from there.
"""

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING
from uuid import UUID

import click

from app import settings
from app.cli import local, output
from app.cli.processes import OrderlyExit
from app.errors import Misuse, NotPossible, NotReady
from app.runs.states import RunState
from app.settings import ROOT, variable

if TYPE_CHECKING:
    from app.pipelines.model import Json, Pipeline
    from app.runs.reads import Reads

EXAMPLE = ROOT / "examples" / "bugfix"
SIMULATED = "Claude is simulated here, by a server that comes with Stepfast: nothing is paid for."
# Two take messages from the queue `agents`, so that another one goes on where one is killed.
WORKERS = ("agents", "agents.2", "handlers")
# For one lease after Postgres started nobody counts as dead. The demo has only just started it, and should not wait for
# the usual lease before it goes on.
LEASE_S = 5
# How long the coder's call takes in part one, and how much of that is seen before its worker is killed.
CALL_MS = 2_000
SEEN_S = 0.5
KILL_POLL_S = 0.05
VAGUE_ISSUE = "The end of a list is sometimes missing."
UNSURE, SURE = 0.62, 0.95
TEST_TIMEOUT_S = 60.0
TEST_OUTPUT_MAX_BYTES = 20_000
GIT_TIMEOUT_S = 30.0
SIMULATOR_TIMEOUT_S = 5.0
RUNS_MAX = 1_000
RUN_FAILED = 1


@dataclass(frozen=True, slots=True)
class _Repository:
    """The repository that is repaired, and the run's input that describes it."""

    folder: Path
    run_input: "Json"


@dataclass(frozen=True, slots=True)
class _Stage:
    """What both parts play on. `beside`: runs of an interrupted demo go on there too."""

    pipeline: "Pipeline"
    reads: "Reads"
    running: local.Running
    beside: bool


@click.command()
@click.option(
    "--live",
    is_flag=True,
    help="Claude answers, with the key in ANTHROPIC_API_KEY, and is paid for. No worker is killed then, because the "
    "call would be paid for twice, and there is no second part, because its coder is unsure by a script.",
)
@click.option("--keep", is_flag=True, help="Keep everything running afterwards, until Ctrl-C.")
def command(live: bool, keep: bool) -> int:
    """Run the bundled example on small git repositories whose test fails, on servers and workers of its own.

    First a worker is killed while the coder works, and another one goes on. Then the coder is unsure: a gate refuses,
    and the run is mended by hand. Each ends in a commit that the repository's own test accepts. Nothing but the demo's
    folder is changed.
    """
    began_s = time.monotonic()
    if live and not settings.load().anthropic_api_key:
        raise NotReady(
            "ANTHROPIC_API_KEY is not set.", next_step="Set it, or leave --live out: then Claude is simulated."
        )
    say("LIVE: Claude answers, with your key, and is paid for." if live else SIMULATED)
    home = settings.load().home / "demo"
    try:
        code = _ending_in_order(home, live=live, keep=keep)
    except KeyboardInterrupt:
        say(f"Nothing is left running. Again: {local.program()} demo")
        raise
    say(f"All is stopped. This took {output.seconds(time.monotonic() - began_s)}.")
    local.say(f"Next: {_look(home)}")
    return code


def say(text: str) -> None:
    """A line of a pipe; a terminal gets it in lines of its width."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, replace_whitespace=False, break_long_words=False, break_on_hyphens=False)
    local.say(text)


def _ending_in_order(home: Path, *, live: bool, keep: bool) -> int:
    with OrderlyExit() as stack:
        try:
            code = _demo(stack, home, live=live)
        except KeyboardInterrupt:
            say("\nStopping.")
            raise
        if keep:
            local.say(f"Kept running until Ctrl-C. To look at it, in another terminal:\n  {_look(home)}")
            with suppress(KeyboardInterrupt):
                Event().wait()
    return code


def _demo(stack: OrderlyExit, home: Path, *, live: bool) -> int:
    from app.pipelines import loader

    stack.enter_context(local.only_one(home))
    pipeline = loader.load(EXAMPLE, aliases=settings.load().model_aliases, handler_modules=())
    repository = _make_repository(home / "repositories")
    stack.enter_context(local.embedded_servers(home, say))
    os.environ[variable("lease_s")] = str(LEASE_S)  # for the workers; `embedded_servers` gives the old one back
    from app import operations
    from app.execution import worker
    from app.runs.reads import Reads

    reads = Reads(worker.current().store.engine)
    unfinished = [UUID(run["id"]) for run in reads.run_list(limit=RUNS_MAX) if not run["ended_at"]]
    for run_id in unfinished:
        say(f"Run {output.short(str(run_id))} of an interrupted demo goes on beside the new one.")
    if live:
        _say_ceiling(pipeline, repository.run_input, 1 + len(unfinished))
    names = local.WORKERS if live else WORKERS
    running = local.start_processes(stack, names, [EXAMPLE], simulate=not live, say=say)
    try:
        operations.publish(worker.current(), pipeline)
    except Misuse as error:
        raise NotPossible("The demo of another version left its data here.", next_step=f"Remove {home}.") from error
    stage = _Stage(pipeline, reads, running, beside=bool(unfinished))
    if live:
        return _conclude(stage, repository, _run(stage, _start(stage, repository)), 0)
    _ask_simulator(stage, "script", _script())
    return _part_one(stage, repository) or _part_two(stage, home)


def _part_one(stage: _Stage, repository: _Repository) -> int:
    _say_heading("Part one: a worker is killed while the coder works")
    before = _counted(stage)
    run_id = _start(stage, repository)
    with _killing_coders_worker(stage, run_id) as killed:
        run = _run(stage, run_id)
    tries = {step["agent"]: step["tries"] for step in run["steps"]}
    if killed and len(tries["coder"]) > 1:
        after_s = (datetime.fromisoformat(tries["coder"][1]["started_at"]) - killed[0]).total_seconds()
        say(
            f"Another worker went on with the coder {output.seconds(after_s)} after the kill. "
            f"Calls of the researcher: {len(tries['researcher'])}."
        )
    else:
        say("The coder was done before the kill.")
    return _conclude(stage, repository, run, before)


def _part_two(stage: _Stage, home: Path) -> int:
    """The run fails, and is mended by what the commands that are shown do."""
    from app import operations
    from app.cli import system
    from app.execution import worker
    from app.runs.explain import explain

    _say_heading("Part two: the coder is unsure, and a person decides")
    repository = _make_repository(home / "repositories", VAGUE_ISSUE)
    before = _counted(stage)
    run_id = _start(stage, repository)
    failed = _run(stage, run_id)
    if failed["state"] != RunState.FAILED:
        say(f"The run {failed['state']}, and should have failed at its gate.")
        return RUN_FAILED
    say("What stands behind `$` is what a person types, whose environment names the servers.")
    short = output.short(str(run_id))
    events = stage.reads.event_list(run_id)
    _say_typed("explain", short)
    say(output.one_line(explain(failed, events).text))

    unsure = next(step["tries"][-1]["output"] for step in failed["steps"] if step["agent"] == "coder")
    file = home / "coder.json"
    file.write_text(json.dumps(unsure | {"confidence": SURE}, indent=2))
    say(f"A person who read the diff and found it right puts it in a file, with a confidence of {SURE}:")
    _say_typed("override", short, "coder", "--output", _from_here(file))
    operations.override(worker.current(), run_id, "coder", json.loads(file.read_text()), by=system.user())
    _say_typed("resume", short, "--watch")
    operations.resume(worker.current(), run_id, by=system.user())
    return _conclude(stage, repository, _run(stage, run_id, after_seq=events[-1]["seq"]), before)


def _start(stage: _Stage, repository: _Repository) -> UUID:
    from app import operations
    from app.execution import worker

    started = operations.start(worker.current(), stage.pipeline.name, repository.run_input)
    say(f"Run {started.run_id} of {stage.pipeline.name} {stage.pipeline.version}:")
    return started.run_id


def _run(stage: _Stage, run_id: UUID, after_seq: int = 0) -> "Json":
    """Shows a run until it has ended, and returns it then."""
    from app.cli import show, watch

    run = watch.to_the_end(stage.reads, run_id, after_seq, quietly=False)
    if not sys.stdout.isatty():  # where the table was watched
        output.console().print(show.steps_table(run))
    return run


def _conclude(stage: _Stage, repository: _Repository, run: "Json", before: int) -> int:
    """Says what came of a run; the simulator had counted `before` calls when it began. Returns the exit code."""
    from app.runs.explain import explain

    if run["state"] != RunState.COMPLETED:
        why = explain(run, stage.reads.event_list(UUID(run["id"]))).why
        say(output.one_line(f"The run {run['state']}. {why}"))
        say(f"The workers' logs: {stage.running.logs}")
        return RUN_FAILED
    passed, commits = _look_at_commit(repository, run["steps"][-1]["tries"][-1]["output"])
    _say_figures(stage, run, commits, before)
    return 0 if passed else RUN_FAILED


# Part one's kill.


@contextmanager
def _killing_coders_worker(stage: _Stage, run_id: UUID) -> Iterator[list[datetime]]:
    """Meanwhile, in a thread, kills the worker whose call for the coder is in flight; the list gets the time of it."""
    stopping, killed = Event(), list[datetime]()

    def kill() -> None:
        while not stopping.wait(KILL_POLL_S):
            pid = stage.reads.executing_pid(run_id, "coder")
            if pid and _ask_simulator(stage, "state")["in_flight"] and not stopping.wait(SEEN_S):
                assert os.getpgid(pid) == pid  # it leads the group that we made for it
                os.killpg(pid, signal.SIGKILL)
                killed.append(datetime.now(UTC))
                local.unfailing(say)(
                    f"SIGKILL to process {pid} and its group: the worker that awaits the coder's answer."
                )
                return

    thread = Thread(target=kill, name="killer", daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        stopping.set()
        thread.join()


# What the simulator answers, and counts.


def _script() -> "Json":
    """The example's own script, with a coder that is slower, and unsure about a vague report."""
    import yaml

    rules = yaml.safe_load((EXAMPLE / local.SCRIPT).read_text())["rules"]
    (coder,) = (rule for rule in rules if "confidence" in rule["reply"])
    unsure = coder | {
        "match": coder["match"] | {"user": re.escape(VAGUE_ISSUE)},
        "reply": coder["reply"] | {"confidence": UNSURE},
    }
    return {"rules": [unsure, coder | {"delay_ms": CALL_MS}, *rules]}


def _counted(stage: _Stage) -> int:
    """How many requests the simulator got, by itself."""
    return int(_ask_simulator(stage, "state")["requests"])


def _ask_simulator(stage: _Stage, what: str, content: "Json | None" = None) -> "Json":
    """Its own paths; with content a POST."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = json.dumps(content).encode() if content else None
    with direct.open(f"{stage.running.simulator}/_simulator/{what}", data, timeout=SIMULATOR_TIMEOUT_S) as answer:
        found: Json = json.load(answer)
        return found


# The repository, before and after.


def _make_repository(folder: Path, issue: str | None = None) -> _Repository:
    """A fresh copy of the example's repository, whose test is shown to fail; `issue` is reported, or the example's."""
    from app.cli.sample_repository import make_repository, run_input

    own = next(path for number in itertools.count(1) if not (path := folder / str(number)).exists())
    make_repository(EXAMPLE / "repository", own)
    repository = _Repository(own, run_input(own) | ({"issue": issue} if issue else {}))
    say(f"A small git repository: {_from_here(own)}")
    with tempfile.TemporaryDirectory(prefix="stepfast-demo-") as scratch:
        passed = _say_test(repository, own, Path(scratch))
    assert not passed
    return repository


def _look_at_commit(repository: _Repository, deployed: "Json") -> tuple[bool, int]:
    """Whether the repository's test passes on the deployer's commit, in a new checkout; and how many commits came."""
    from app.agents.git import Git

    with tempfile.TemporaryDirectory(prefix="stepfast-demo-") as scratch:
        git = Git(repository.folder, Path(scratch), lambda: GIT_TIMEOUT_S)
        git.open()
        subject = git("log", "-1", "--format=%s", deployed["commit"])
        say(output.one_line(f"The deployer's commit {deployed['commit'][:12]} on {deployed['branch']}: {subject}"))
        tree = Path(scratch) / "tree"
        with git.worktree(tree, deployed["commit"]):
            git("reset", "--quiet", "--hard", folder=tree)
            passed = _say_test(repository, tree, Path(scratch))
        commits = int(git("rev-list", "--count", "--all", f"^{repository.run_input['base_commit']}"))
    return passed, commits


def _say_test(repository: _Repository, folder: Path, scratch: Path) -> bool:
    """Runs the repository's test in a folder, and says how it ended."""
    from app.agents.confined import run
    from app.agents.git import bare_environment

    test = repository.run_input["test_command"]
    ended = run(
        test,
        folder=folder,
        environment=bare_environment(scratch) | {"PYTHONDONTWRITEBYTECODE": "1"},
        timeout_s=TEST_TIMEOUT_S,
        output_max_bytes=TEST_OUTPUT_MAX_BYTES,
    )
    last_line = (ended.errors.decode(errors="replace").strip().splitlines() or ["no output"])[-1]
    say(output.one_line(f"Its own test, {shlex.join(['python', *test[1:]])}: {last_line}"))
    return ended.exit_code == 0


# What is said.


def _say_heading(text: str) -> None:
    click.secho(f"\n{text}", bold=True)


def _say_typed(*arguments: str) -> None:
    """What a person types, who has the servers' addresses in the environment."""
    click.secho(f"$ {local.program()} {shlex.join(arguments)}", bold=True)


def _say_ceiling(pipeline: "Pipeline", run_input: "Json", runs: int) -> None:
    from app.agents.pricing import ceiling_usd

    most = ceiling_usd(pipeline, run_input, settings.load())
    if most is None:
        raise NotReady("The price of a model of the example is unknown, so its cost has no ceiling.")
    say(f"At most {output.dollars(most * runs)} will be spent: every attempt used, every answer as long as it may be.")


def _say_figures(stage: _Stage, run: "Json", commits: int, before: int) -> None:
    """From the recorded attempts, beside the simulator's own count since it was at `before`."""
    calls = [
        [entry for entry in step["tries"] if _called(entry)]
        for step in run["steps"]
        if stage.pipeline.by_id[step["agent"]].model
    ]
    repeated = [entry for tries in calls for entry in tries[1:]]
    repeated_usd = sum(entry["cost_usd"] or 0.0 for entry in repeated)
    counted, cost = "", "Cost:"
    if stage.running.simulator:
        others = ", with those of the other runs'" if stage.beside else ""
        counted = f" (the simulator counted {_counted(stage) - before}{others})"
        cost = "Claude would have cost"
    cut_off = any(entry["state"] == "lost" for tries in calls for entry in tries)
    say(
        f"Calls: {sum(map(len, calls))}{counted}; repeated: {len(repeated)}, for {output.dollars(repeated_usd)}; "
        f"commits: {commits}. {cost} {output.dollars(run['totals']['cost_usd'])}"
        f"{', beside the call that was cut off: its price is unknown, for its answer never came' if cut_off else ''}."
    )


def _called(entry: "Json") -> bool:
    """Whether an attempt at an agent with a model called it: no person's does, and none that the gate refused."""
    return entry["worker_id"] is not None and (entry["error"] or {}).get("code") != "gate_refused"


def _look(home: Path) -> str:
    """The command that shows the run, also after the servers stopped.

    It exports what it needs, so that the commands that `show` names work after it; what names other servers is unset.
    """
    unset = "".join(f"{name}= " for name in map(variable, ("database_url", "broker_url")) if os.environ.get(name))
    exported = f"export {unset}{variable('home')}={shlex.quote(_from_here(home))}"
    return f"{exported} && {local.program()} show last --embedded"


def _from_here(path: Path) -> str:
    """A path as it is typed from the current folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
