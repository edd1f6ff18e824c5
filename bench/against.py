"""Stepfast and what a team would take instead, in turns, on one Postgres and one broker: `python bench/against.py`.

Each side runs the same workload (bench/peers/workload.py) in an environment of its own, with workers of its own, on a
fresh database, in the configuration that was fastest for it here. The order changes with each round, so that whatever
else the machine does hits all. Compare within one run only.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from chart import drawn

ROOT = Path(__file__).resolve().parent.parent
PEERS = ROOT / "bench" / "peers"
REQUIREMENTS = ROOT / "requirements"
HOME = ROOT / ".stepfast" / "bench"
ENVIRONMENTS = ROOT / ".venv-bench"
sys.path.insert(0, str(ROOT))

import psycopg  # noqa: E402  # after the path
import redis  # noqa: E402
from report import machine  # noqa: E402

from app.embedded import servers  # noqa: E402

# A turn that takes longer is ended, and counts as failed.
TURN_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Row:
    """What is measured. `goals` bound ours/theirs by side: at least where more is better, else at most."""

    title: str
    unit: str
    runs: int
    llm_ms: int
    goals: dict[str, float]
    ours_at_most: float | None = None

    @property
    def more_is_better(self) -> bool:
        return self.unit == "steps/s"

    def value(self, found: dict[str, Any]) -> float:
        return 4 * found["runs"] / found["wall_s"] if self.more_is_better else found["wall_s"]


@dataclass(frozen=True, slots=True)
class Setting:
    """How a side runs a row: so many worker processes, with so many threads (or its word for them) each."""

    processes: int
    concurrency: int

    def __str__(self) -> str:
        return f"{self.processes} x {self.concurrency}"


@dataclass(frozen=True, slots=True)
class Side:
    title: str
    script: str
    settings: dict[str, Setting]
    own_environment: bool = True


ROWS = {
    "steps": Row(
        "The engine alone: agents that take no time",
        "steps/s",
        500,
        0,
        {"celery": 0.95, "dbos": 1.4, "langgraph": 1.1, "absurd": 0.75},
    ),
    "waiting": Row(
        "250 runs at once of four agents that wait 2 s each (ideal 8.0 s)",
        "s",
        250,
        2_000,
        dict.fromkeys(("celery", "dbos", "langgraph", "absurd"), 1.0),
        ours_at_most=8.8,
    ),
}
# For CI: is the bench alive? Its figures mean nothing.
QUICK = {"steps": {"runs": 10, "goals": {}}, "waiting": {"runs": 10, "llm_ms": 20, "goals": {}, "ours_at_most": None}}
SIDES = {
    "stepfast": Side(
        "Stepfast",
        "stepfast_runs.py",
        {"steps": Setting(2, 3), "waiting": Setting(2, 125)},
        own_environment=False,
    ),
    "celery": Side(
        "plain Celery chain",
        "celery_chain.py",
        {"steps": Setting(2, 2), "waiting": Setting(2, 125)},
    ),
    "dbos": Side("DBOS queue", "dbos_queue.py", {"steps": Setting(2, 8), "waiting": Setting(2, 125)}),
    "langgraph": Side(
        "LangGraph + PostgresSaver", "langgraph_saver.py", {"steps": Setting(2, 4), "waiting": Setting(2, 125)}
    ),
    "absurd": Side("Absurd", "absurd_tasks.py", {"steps": Setting(2, 8), "waiting": Setting(2, 125)}),
}


class Failed(Exception):
    """A side could not be installed, or a turn of it gave no figure. Says why."""


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def main(given: Sequence[str] | None = None) -> int:
    chosen = options(given)
    rows = {name: replace(ROWS[name], **QUICK[name]) if chosen.quick else ROWS[name] for name in chosen.rows}
    found = Findings({name: {} for name in rows})
    HOME.mkdir(parents=True, exist_ok=True)
    # Not in /tmp, which may be memory, where fsync costs nothing.
    home = Path(tempfile.mkdtemp(prefix="run-", dir=HOME))
    try:
        with servers(home, on_progress=say) as running:
            place = Place(home, running.database_url.replace("+psycopg", ""), running.broker_url)
            found.machine = machine() | place.versions()
            sides = ("stepfast", *chosen.peers)
            for side in sides:
                prepare(side, place, found)
            for number in range(chosen.rounds):
                turns(number, rows, sides, place, found)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    document = found.document(rows, chosen.peers)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    chosen.json.write_text(json.dumps(document, indent=2) + "\n")
    chosen.json.with_suffix(".svg").write_text(drawn(document))
    print(table(document))
    print(f"\nWritten: {chosen.json} and {chosen.json.with_suffix('.svg').name}")
    return 1 if "stepfast" in found.failed else 0


def options(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="of each side (5; with --quick 1)")
    parser.add_argument("--peers", type=names_of(SIDES), default=list(SIDES)[1:], help=", ".join(list(SIDES)[1:]))
    parser.add_argument("--rows", type=names_of(ROWS), default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--quick", action="store_true", help="small, for CI: shows that it works, measures nothing")
    parser.add_argument("--json", type=Path, default=HOME / "against.json", help="the chart is written beside it")
    chosen = parser.parse_args(given)
    chosen.rounds = chosen.rounds or (1 if chosen.quick else 5)
    return chosen


def names_of(known: dict[str, Any]) -> Any:  # noqa: ANN401  # argparse's own shape
    def names(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(known)}")
        return found

    return names


# One side.


@dataclass(frozen=True, slots=True)
class Place:
    """The servers, and a folder for what a turn leaves."""

    home: Path
    postgres: str
    broker: str

    def database(self, name: str) -> str:
        return self.postgres.replace("@/stepfast?", f"@/{name}?")

    def rows(self, *statements: str) -> list[Any]:
        """What the last one gives."""
        with psycopg.connect(self.postgres, autocommit=True) as connection:
            for statement in statements:
                result = connection.execute(statement)
            return result.fetchall() if result.description else []

    def wiped_broker(self) -> redis.Redis:
        path, _, _options = self.broker.removeprefix("redis+socket://").partition("?")
        client = redis.Redis(unix_socket_path=path)
        client.flushall()
        return client

    def versions(self) -> dict[str, Any]:
        names = ("server_version", "fsync", "synchronous_commit", "shared_buffers", "max_connections")
        (values,) = self.rows(f"select {', '.join(f'current_setting({name!r})' for name in names)}")
        info = self.wiped_broker().info("server")
        return {"postgres": dict(zip(names, values, strict=True)), "broker": f"Valkey {info['valkey_version']}"}


def python_of(name: str) -> Path:
    """The interpreter of a side's own environment, which is made where its requirements changed. Raises Failed."""
    if not SIDES[name].own_environment:
        return Path(sys.executable)
    requirements = REQUIREMENTS / f"bench-{name}.txt"
    folder = ENVIRONMENTS / name
    stamp = folder / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != requirements.read_text():
        say(f"Installing {SIDES[name].title}; this happens once.")
        pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        for command in (
            [sys.executable, "-m", "venv", "--clear", folder],
            [*pip, "--require-hashes", "-r", requirements],
        ):
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if done.returncode:
                raise Failed(f"not installed: {error_of(done.stdout)}")
        shutil.copy(requirements, stamp)  # last, so that what was interrupted begins anew
    return folder / "bin" / "python"


def prepare(name: str, place: Place, found: "Findings") -> None:
    """Installs a side and makes the database that each of its turns begins with."""
    try:
        python_of(name)
        place.rows(f"create database side_{name}")
        run_script(name, place, place.database(f"side_{name}"), ["setup"], {})
    except Failed as failed:
        found.failed[name] = str(failed)
        say(f"{SIDES[name].title}: {failed}")


def turns(number: int, rows: dict[str, Row], sides: Sequence[str], place: Place, found: "Findings") -> None:
    """A round: each side once in each row, in an order of this round's own."""
    for name, row in rows.items():
        order = [side for side in sides if side not in found.failed]
        random.Random(f"{name} {number}").shuffle(order)
        for side in order:
            try:
                result = turn(side, name, row, place)
            except Failed as failed:
                found.failed[side] = str(failed)
                say(f"{SIDES[side].title}: {failed}")
                continue
            found.add(name, side, row.value(result), result["versions"])
            say(f"round {number + 1}, {name}: {SIDES[side].title} {row.value(result):.1f} {row.unit}")


def turn(side: str, name: str, row: Row, place: Place) -> dict[str, Any]:
    """Fresh workers on a fresh database, nothing at the broker, and no dirty page of the turn before."""
    place.wiped_broker()
    place.rows(f"create database turn template side_{side}", "checkpoint")
    setting = SIDES[side].settings[name]
    try:
        arguments = [row.runs, setting.processes, setting.concurrency]
        return run_script(side, place, place.database("turn"), arguments, {"BENCH_LLM_MS": str(row.llm_ms)})
    finally:
        place.rows("drop database turn with (force)")


def run_script(
    side: str, place: Place, postgres: str, arguments: Sequence[object], environ: dict[str, str]
) -> dict[str, Any]:
    """Runs a side's script to its end, and returns its result; whatever it started is ended too. Raises Failed."""
    folder = place.home / "turn"
    folder.mkdir()
    log = folder / "script.log"
    given = {"BENCH_POSTGRES": postgres, "BENCH_BROKER": place.broker, "BENCH_HOME": str(folder)}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("STEPFAST_")}
    command = [python_of(side), PEERS / SIDES[side].script, *map(str, arguments)]
    try:
        with log.open("wb") as stream, group(command, env=inherited | given | environ, log=stream) as process:
            deadline = time.monotonic() + TURN_TIMEOUT_S
            # It is not reaped before its group is ended: until then nobody else can have its number.
            while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                if time.monotonic() > deadline:
                    raise Failed(f"no end within {TURN_TIMEOUT_S:.0f} s")
                time.sleep(0.05)
        if process.returncode:
            raise Failed(f"failed: {error_of(log.read_text(errors='replace'))}")
        result = folder / "result.json"
        return json.loads(result.read_text()) if result.exists() else {}
    except Failed as failed:
        kept = HOME / f"failed-{side}"
        shutil.copytree(folder, kept, dirs_exist_ok=True)
        raise Failed(f"{failed} ({kept})") from None
    finally:
        shutil.rmtree(folder)


@contextmanager
def group(command: Sequence[object], *, env: dict[str, str], log: Any) -> Iterator[subprocess.Popen[bytes]]:  # noqa: ANN401
    """A process that leads a group of its own, all of which is killed at the end: also at Ctrl-C."""
    process = subprocess.Popen(
        [str(word) for word in command],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def error_of(text: str) -> str:
    """Pip names the error first, whatever else it says then; everybody else names it last."""
    lines = text.strip().splitlines() or ["it said nothing"]
    return next((line for line in lines if line.startswith("ERROR: ")), lines[-1])[:200]


# What was found.


@dataclass(slots=True)
class Findings:
    """The values of each side's turns, by row."""

    values: dict[str, dict[str, list[float]]]
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, row: str, side: str, value: float, versions: dict[str, str]) -> None:
        self.values[row].setdefault(side, []).append(value)
        self.versions[side] = versions

    def document(self, rows: dict[str, Row], peers: Sequence[str]) -> dict[str, Any]:
        """Everything, for --json, the table and the chart."""
        return {
            "machine": self.machine,
            "versions": self.versions,
            "rows": [
                {
                    **{key: value for key, value in asdict(row).items() if key != "goals"},
                    "name": name,
                    "sides": [self._side(name, row, side) for side in ("stepfast", *peers)],
                }
                for name, row in rows.items()
            ],
        }

    def _side(self, name: str, row: Row, side: str) -> dict[str, Any]:
        about = {"side": side, "title": SIDES[side].title, "setting": str(SIDES[side].settings[name])}
        if side in self.failed:
            return about | {"failed": self.failed[side]}
        values = self.values[name][side]
        median = statistics.median(values)
        about |= {"values": [round(value, 2) for value in values], "median": round(median, 2)}
        if side == "stepfast":
            held = None if row.ours_at_most is None else median <= row.ours_at_most
            return about | {"goal": row.ours_at_most, "held": held}
        if "stepfast" in self.failed:
            return about
        ratio = statistics.median(self.values[name]["stepfast"]) / median
        goal = row.goals.get(side)
        held = None if goal is None else ratio >= goal if row.more_is_better else ratio <= goal
        return about | {"ratio": round(ratio, 2), "goal": goal, "held": held}


def table(document: dict[str, Any]) -> str:
    lines = []
    for row in document["rows"]:
        lines += ["", f"{row['title']}: {row['unit']}, {row['runs']} runs at once, LLM_MS={row['llm_ms']}"]
        lines.append(f"{'':<27}{'min':>7}{'median':>8}{'max':>7}  {'Stepfast/it':<13}{'goal':<18}processes x threads")
        at = ">=" if row["unit"] == "steps/s" else "<="
        for side in row["sides"]:
            if "failed" in side:
                lines.append(f"{side['title']:<27}{side['failed']}")
                continue
            figures = (min(side["values"]), side["median"], max(side["values"]))
            spread = "".join(f"{figure:>{width}.1f}" for figure, width in zip(figures, (7, 8, 7), strict=True))
            ratio = f"{side['ratio']:.2f}" if "ratio" in side else ""
            goal = ""
            if side.get("goal") is not None:
                goal = f"{at} {side['goal']:g}, {'held' if side['held'] else 'NOT held'}"
            lines.append(f"{side['title']:<27}{spread}  {ratio:<13}{goal:<18}{side['setting']}")
    lines += ["", *(f"{name}: {_plain(value)}" for name, value in document["machine"].items())]
    lines += [f"{side}: {_plain(versions)}" for side, versions in document["versions"].items()]
    return "\n".join(lines[1:])


def _plain(value: object) -> str:
    return ", ".join(f"{name} {each}" for name, each in value.items()) if isinstance(value, dict) else str(value)


def _end(_number: int, _frame: object) -> None:
    sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
