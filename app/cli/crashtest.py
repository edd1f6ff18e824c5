"""`stepfast crashtest`."""

import os
import re
import shutil
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from app import settings
from app.cli import inputs, local, output, system
from app.cli.processes import OrderlyExit
from app.errors import Misuse, NotReady
from app.pipelines.run_input import check_input
from app.settings import ROOT, variable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from app.crashtest.judge import Judged
    from app.crashtest.lane import Order
    from app.crashtest.matrix import Report
    from app.pipelines.model import Json, Pipeline
    from app.simulator.script import Script

EXAMPLE = ROOT / "examples" / "bugfix"
RUN_FAILED = 1
MARKS = {"ok": "ok", "outcome_unknown": "outcome_unknown, as promised", "BROKEN": "BROKEN"}


@dataclass(frozen=True, slots=True)
class _Earlier:
    """A run whose outputs are the answers, and whose input is the input where no other is given."""

    outputs: "dict[str, Json]"
    run_input: "Json"


@dataclass(frozen=True, slots=True)
class _Asked:
    """The command's arguments."""

    skill: Path
    answers: str | None
    broker: Literal["valkey", "rabbitmq"]
    given: tuple[str, ...]
    scratch: Path | None
    only: tuple[str, ...]
    seed: int
    junit: Path | None
    as_json: bool


@click.command()
@click.argument("skill", type=click.Path(path_type=Path))
@click.option("--answers", metavar="RUN", help="The models answer what they answered in this run of your database.")
@click.option("--broker", type=click.Choice(["valkey", "rabbitmq"]), default="valkey", show_default=True)
@click.option(
    "--input", "given", multiple=True, metavar="K=V", help=f"{inputs.HELP} {{scratch}} is each run's own folder."
)
@click.option(
    "--scratch",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A folder of which each run gets a copy; else an empty one.",
)
@click.option(
    "--only", multiple=True, metavar="GLOB", help="Cells by their names, such as 'effect.*:deployer'. Repeatable."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Draws sampled answers, and where servers fail.")
@click.option("--junit", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write JUnit XML, too.")
@click.option("--json", "as_json", is_flag=True, help="Print {kept, cells: [{cell, verdict, recovered_s, …}], …}.")
def command(**options: Any) -> int:  # noqa: ANN401  # click names and types them
    """Kill the workers of SKILL's pipeline at every named point, and compare each run with an undisturbed one.

    Servers and workers are its own, in a temporary folder; Claude is simulated, and approvals are given by themselves.
    HANDLERS ARE REALLY CALLED, many times: give them a world in which that does no harm, in {scratch} for instance,
    whose files and commits are compared too. Exits 1 where a promise is broken (docs/guarantees.md).
    """
    asked = _Asked(**options)
    if asked.junit and not asked.junit.resolve().parent.is_dir():
        raise Misuse(f"The folder of {asked.junit} is not there.", next_step="Make it, or name another file.")
    pipeline = system.load_skill(asked.skill)
    earlier = _earlier(asked.answers, pipeline) if asked.answers else None
    make_world = _world(asked, pipeline, earlier)
    good = _good_answers(asked.skill, pipeline, earlier)
    from app.crashtest.lane import Order

    report = _play(Order(pipeline, good, make_world, _environ(asked.skill), asked.seed), asked)
    if asked.junit:
        asked.junit.write_bytes(report.as_junit(f"crashtest {pipeline.name} on {asked.broker}"))
    if asked.as_json:
        head = {"pipeline": pipeline.name, "broker": asked.broker, "seed": asked.seed}
        output.print_json(head | report.as_json())
    else:
        _print(report)
    return 0 if report.kept else RUN_FAILED


def _play(order: "Order", asked: _Asked) -> "Report":
    from app.crashtest.matrix import Matrix
    from app.crashtest.servers import Servers

    done = 0

    def tell(row: "Judged", count: int) -> None:
        nonlocal done
        done += 1
        recovered = "" if row.recovered_s is None else f", {output.seconds(row.recovered_s)}"
        why = f": {'; '.join(row.why)}" if row.why else ""
        _say(output.one_line(f"{done}/{count} {row.cell.name}: {MARKS[row.verdict]}{recovered}{why}"))

    matrix = Matrix(order, asked.only, _say, tell)
    _say("Claude is simulated: nothing is paid for. Handlers are really called.")
    if asking := [agent.id for agent in order.pipeline.agents if agent.requires_human_approval]:
        _say(f"Approvals are given by themselves, of {', '.join(asking)}.")
    with OrderlyExit() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stepfast-crashtest-")))
        servers = Servers(stack, home, asked.broker, _say)
        matrix.run(servers, home)
    return matrix.report


def _earlier(name: str, pipeline: "Pipeline") -> _Earlier:
    """A run of the database that the settings name. Raises UnknownName, Misuse."""
    from app.runs.reads import Reads

    reads = Reads(system.database().store.engine)
    run = reads.run(reads.run_id(name))
    outputs = {
        step["agent"]: entry["output"]
        for step in run["steps"]
        for entry in step["tries"]
        if entry["id"] == step["attempt_id"] and entry["state"] == "completed"
    }
    missing = [agent.id for agent in pipeline.agents if agent.model and agent.id not in outputs]
    if missing:
        raise Misuse(f"Run {name} has no output of {', '.join(missing)}.", next_step="Name a run that completed.")
    return _Earlier(outputs, run["input"])


def _good_answers(skill: Path, pipeline: "Pipeline", earlier: _Earlier | None) -> "Script":
    """Raises NotReady where the simulator is not installed."""
    try:
        from app.crashtest import answers
        from app.simulator import script
    except ModuleNotFoundError as error:
        raise NotReady(
            f"The simulator needs the package {error.name}.", next_step="Run: pip install 'stepfast-app[demo]'"
        ) from error
    if earlier:
        return answers.recorded(pipeline, earlier.outputs)
    file = local.script_of([skill])
    return script.load(file) if file else script.Script()


def _world(asked: _Asked, pipeline: "Pipeline", earlier: _Earlier | None) -> "Callable[[Path], Json]":
    """What fills a run's own folder, and gives its input. The bundled example brings its repository along."""
    configured = settings.load()
    if not (asked.given or asked.scratch or earlier) and local.folder_of(asked.skill) == EXAMPLE:
        return _example_world
    typed = inputs.parse(asked.given, configured.input_max_bytes)
    run_input = earlier.run_input if earlier and not asked.given else typed
    check_input(run_input, configured.input_max_bytes, pipeline.input_schema)

    def make(folder: Path) -> "Json":
        from app.crashtest import world

        world.renew(folder, asked.scratch)
        placed: Json = world.placed(run_input, folder)  # type: ignore[assignment]  # an object stays one
        return placed

    return make


def _example_world(folder: Path) -> "Json":
    from app.cli.sample_repository import make_repository, run_input

    if folder.exists():
        shutil.rmtree(folder)
    make_repository(EXAMPLE / "repository", folder / "repository")
    return run_input(folder / "repository")


def _environ(skill: Path) -> "Mapping[str, str]":
    """What the workers see: ours, but for what would lead them to servers, to Claude or to another Celery."""
    own = re.compile(r"ANTHROPIC_.*|STEPFAST_(DATABASE_URL|BROKER_URL|LEASE_S|CRASH_POINTS)")
    folders = dict.fromkeys([local.folder_of(skill), *settings.load().skills])
    environ = {name: value for name, value in local.bare_environ().items() if not own.fullmatch(name)}
    return environ | {variable("skills"): os.pathsep.join(map(str, folders))}


def _print(report: "Report") -> None:
    console = output.console()
    rows = [
        [
            row.cell.name,
            row.died or "-",
            "-" if row.recovered_s is None else output.seconds(row.recovered_s),
            str(row.calls_repeated),
            str(row.effects_repeated),
            {True: "same", False: "differ", None: "-"}[row.same_outputs],
            "hold" if row.rules_hold else "broken",
            MARKS[row.verdict],
        ]
        for row in report.rows
    ]
    columns = ["cell", "died", "recovered in", "calls repeated", "effects repeated", "outputs", "rules", "promise"]
    console.print(output.table(columns, rows, right=["recovered in", "calls repeated", "effects repeated"]))
    if report.not_compared:
        print(output.one_line(f"Not compared, since undisturbed runs differ in it: {', '.join(report.not_compared)}."))
    if report.not_reached:
        print(f"Not reached by this pipeline: {', '.join(point.label for point in report.not_reached)}.")
    for row in report.rows:
        if row.why:
            print(output.one_line(f"{row.cell.name} is BROKEN: {'; '.join(row.why)}."))
    for sentence in report.whole:
        print(output.one_line(f"BROKEN in the whole database: rule {sentence}"))
    count = len(report.rows)
    if unknown := sum(row.verdict == "outcome_unknown" for row in report.rows):
        print(
            f"{unknown} of {count} cells ended as outcome_unknown. This is the promise, no failure: a worker died "
            "under a handler that does not say how it is repeated, so a person is asked. `ctx.once` with a check "
            "mends it."
        )
    broken = sum(row.verdict == "BROKEN" for row in report.rows)
    print(f"{broken} of {count} cells broke a promise." if broken else f"All {count} cells kept what is promised.")


_saying = threading.Lock()


def _say(sentence: str) -> None:
    """Progress, from any lane."""
    with _saying:
        print(sentence, file=sys.stderr, flush=True)
