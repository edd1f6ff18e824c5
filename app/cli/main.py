"""`stepfast`: the table of commands, and the one place where an error becomes a sentence and an exit code.

Exit codes: 0 done; 1 the run failed; 2 misuse, or an invalid file; 3 not ready; 130 interrupted.

A command is a module of this folder that exports a click command as `command`; it is imported when it is asked for, so
that `stepfast --help` waits for no library. A command returns its exit code, or None for 0, and raises StepfastError.
"""

import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import FrameType

import click

from app.cli import failures


@dataclass(frozen=True, slots=True)
class Entry:
    module: str
    summary: str


# In the order in which a newcomer meets them.
COMMANDS = {
    "demo": Entry("app.cli.demo", "Run the bundled pipeline on a small repository, on servers of its own."),
    "up": Entry("app.cli.up", "Start embedded servers, workers and Flower, until Ctrl-C."),
    "new": Entry("app.cli.new", "Write a starter skill, or what is missing beside a skill file."),
    "audit": Entry("app.cli.audit", "Check a skill file by the checklist of a distributed system. No database."),
    "publish": Entry("app.cli.publish", "Store a skill's definition; new runs of its name take it."),
    "run": Entry("app.cli.run", "Start a run of a published pipeline or of a skill file."),
    "runs": Entry("app.cli.runs", "List runs, newest first."),
    "show": Entry("app.cli.show", "Show a run: its steps, what they cost, and what went wrong."),
    "explain": Entry("app.cli.explain", "Say in a paragraph what happened to a run, why, and what to type next."),
    "diff": Entry("app.cli.diff", "Say what differs between two runs, agent by agent."),
    "report": Entry("app.cli.report", "Say what happened in a while: recoveries, refusals, waste, costs, slow agents."),
    "approve": Entry("app.cli.approve", "Show what an agent is about to do, and let it."),
    "reject": Entry("app.cli.reject", "Refuse what an agent is about to do."),
    "resume": Entry("app.cli.resume", "Continue a failed run from its last checkpoint, or all failed runs."),
    "override": Entry("app.cli.override", "Give an agent's output by hand."),
    "cancel": Entry("app.cli.cancel", "End a run that has not ended."),
    "dead": Entry("app.cli.dead", "List dead letters by what went wrong, show or discard one."),
    "doctor": Entry("app.cli.doctor", "Check settings, servers, workers, queues and stuck runs."),
    "prune": Entry("app.cli.prune", "Delete runs that ended long ago, in batches."),
    "migrate": Entry("app.cli.migrate", "Bring the database to this version's schema."),
    "crashtest": Entry("app.cli.crashtest", "Kill a pipeline's workers at every point, and judge what comes of it."),
    "simulate": Entry("app.cli.simulate", "Serve the Claude simulator, until Ctrl-C."),
}


class Commands(click.Group):
    """Imports a command when it is called, and not for the list of all."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        found = import_module(COMMANDS[name].module).command
        assert isinstance(found, click.Command)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.NoSuchCommand(args[0], possibilities=COMMANDS, ctx=ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="stepfast-app", prog_name="stepfast", message="%(prog)s %(version)s")
def stepfast() -> None:
    """Run pipelines of AI agents on Celery: resumable, so that no finished step is done, or paid for, twice.

    A RUN is any unambiguous beginning of its id, or `last`. With --json a command prints one JSON document on standard
    output, and an error there too, as {"error": {"message", "next_step"}}; logs go to standard error.

    Exit codes: 0 done, 1 the run failed, 2 misuse or an invalid file, 3 not ready.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """The script `stepfast`. Returns the exit code; never raises, and never prints a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _endings():
            try:
                code = _call(arguments)
                sys.stdout.flush()
            finally:
                _stop_worker()
    except BaseException as error:  # noqa: BLE001  # whatever it is, it ends as a sentence
        return failures.report(error, as_json="--json" in arguments)
    return code


def _call(arguments: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter gets its code
    if not arguments:
        arguments = ["--help"]
    # Not click's own `main`, which prints errors and turns signals and closed pipes into exit codes of its own.
    with stepfast.make_context("stepfast", arguments) as context:
        code = stepfast.invoke(context)
    return code if isinstance(code, int) else 0


def _stop_worker() -> None:
    """Gives connections back, if a command made any."""
    if worker := sys.modules.get("app.execution.worker"):
        worker.stop()


@contextmanager
def _endings() -> Iterator[None]:
    """TERM and HUP unwind the stack as Ctrl-C does, so that embedded servers stop."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in _signals()}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup's wish is obeyed
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signals() -> Iterable[signal.Signals]:
    return (signal.SIGTERM, signal.SIGHUP) if os.name == "posix" else (signal.SIGTERM,)
