"""All cells of a pipeline, on several lanes; what came of each, as rows, JSON and JUnit."""

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from app.crashpoints import CrashPoint
from app.crashtest import cells as cells_of
from app.crashtest.cells import UNDISTURBED, Cell
from app.crashtest.judge import Judged, Seen, Undisturbed, Verdict, judge, undisturbed
from app.crashtest.lane import Lane, Order, Stopped
from app.errors import Misuse, StepfastError
from app.pipelines.model import Json

if TYPE_CHECKING:
    from app.crashtest.servers import Servers

LANES_MAX = 4
POLL_S = 0.2


class NotSound(StepfastError):
    """The undisturbed run does not complete, so there is nothing to compare with."""


@dataclass(slots=True)
class Report:
    """`rows` in the order of the cells. `whole`: what contradicts the rules in a whole database, after all cells."""

    cells: list[Cell] = field(default_factory=list)
    rows: list[Judged] = field(default_factory=list)
    not_reached: list[CrashPoint] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)

    @property
    def kept(self) -> bool:
        return not self.whole and bool(self.rows) and all(row.verdict != Verdict.BROKEN for row in self.rows)

    def as_json(self) -> Json:
        """{kept, cells: [{cell, verdict, died, recovered_s, calls_repeated, …}], not_reached, not_compared, whole}."""
        return {
            "kept": self.kept,
            "cells": [
                {
                    "cell": row.cell.name,
                    "verdict": row.verdict.value,
                    "died": row.died,
                    "recovered_s": None if row.recovered_s is None else round(row.recovered_s, 3),
                    "calls_repeated": row.calls_repeated,
                    "effects_repeated": row.effects_repeated,
                    "same_outputs": row.same_outputs,
                    "rules_hold": row.rules_hold,
                    "why": row.why,
                }
                for row in self.rows
            ],
            "not_reached": {point.label: point.where for point in self.not_reached},
            "not_compared": self.not_compared,
            "whole": self.whole,
        }

    def as_junit(self, name: str) -> bytes:
        """One test case a cell, as CI servers read it."""
        failed = [row for row in self.rows if row.verdict == Verdict.BROKEN]
        count = len(self.rows) + bool(self.whole)
        failures = len(failed) + bool(self.whole)
        suite = ET.Element("testsuite", name=name, tests=str(count), failures=str(failures))
        for row in self.rows:
            case = ET.SubElement(suite, "testcase", classname=name, name=row.cell.name)
            if row.recovered_s is not None:
                case.set("time", f"{row.recovered_s:.3f}")
            if row.verdict == Verdict.BROKEN:
                ET.SubElement(case, "failure", message="; ".join(row.why))
            elif row.verdict == Verdict.UNKNOWN:
                ET.SubElement(case, "system-out").text = "outcome_unknown, as promised"
        if self.whole:
            case = ET.SubElement(suite, "testcase", classname=name, name="whole database")
            ET.SubElement(case, "failure", message="; ".join(self.whole))
        document: bytes = ET.tostring(suite, encoding="utf-8", xml_declaration=True)
        return document


class Matrix:
    """`say` gets a sentence for each thing that takes time, `tell` each row as it comes, and how many there will be."""

    def __init__(
        self, order: Order, patterns: Sequence[str], say: Callable[[str], None], tell: Callable[[Judged, int], None]
    ) -> None:
        self._order = order
        self._patterns = patterns
        self._say = say
        self._tell = tell
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._waiting: deque[Cell] = deque()
        self._last: deque[Cell] = deque()
        self.report = Report()

    def run(self, servers: "Servers", home: Path) -> None:
        """Plays all cells, into `report`. Raises NotSound; NotReady where something does not start."""
        lanes = min(LANES_MAX, os.cpu_count() or 1, len(self._patterns) or LANES_MAX)
        self._say("Making the database.")
        servers.make_lanes(lanes)
        self._planned = threading.Barrier(lanes)
        self._calm_over = threading.Barrier(lanes)
        self._say(f"Starting workers, and two undisturbed runs, on each of {lanes} lanes.")
        with ThreadPoolExecutor(lanes, thread_name_prefix="lane") as pool:
            working = [pool.submit(self._work, lane, servers, home) for lane in range(lanes)]
            try:
                while not all(future.done() for future in working):
                    wait(working, timeout=POLL_S, return_when=FIRST_EXCEPTION)
                    if any(future.done() and future.exception() for future in working):
                        break
            finally:
                self._stopping.set()
                for barrier in (self._planned, self._calm_over):
                    barrier.abort()
        failures = [error for future in working if (error := future.exception())]
        for error in failures:
            if not isinstance(error, Stopped | threading.BrokenBarrierError):
                raise error
        order = {cell.name: number for number, cell in enumerate(self.report.cells)}
        self.report.rows.sort(key=lambda row: order[row.cell.name])

    def _work(self, number: int, servers: "Servers", home: Path) -> None:
        with ExitStack() as stack:
            lane = stack.enter_context(Lane(number, self._order, servers, home, self._stopping))
            seen = [self._sound(lane), self._sound(lane)]
            normal = undisturbed(self._order.pipeline, *seen)
            if number == 0:
                self._plan(seen[0], normal)
            self._planned.wait()
            self._play_all(lane, normal, self._waiting)
            self._calm_over.wait()
            if number == 0:
                self._play_all(lane, normal, self._last)
            whole = lane.whole_database()
            with self._lock:
                self.report.whole += whole

    def _sound(self, lane: Lane) -> Seen:
        seen = lane.play(UNDISTURBED)
        if seen.run["state"] != "completed" or seen.problems or seen.violations:
            why = "; ".join([*seen.problems, *seen.violations]) or f"it {seen.run['state']}{_error(seen.run)}"
            raise NotSound(
                f"The undisturbed run does not complete: {why}.",
                next_step="Give answers that let it: a simulator.yaml beside the skill file, or --answers RUN.",
            )
        return seen

    def _plan(self, seen: Seen, normal: Undisturbed) -> None:
        reached = {(note.point, note.agent) for note in seen.notes}
        repeatable = frozenset(
            step["agent"] for step in seen.run["steps"] if all(entry["repeatable"] for entry in step["tries"])
        )
        planned = cells_of.every(self._order.pipeline, reached, repeatable, self._order.seed)
        self.report.not_reached = cells_of.not_reached(planned)
        self.report.not_compared = normal.not_compared
        self.report.cells = cells_of.chosen(planned, self._patterns)
        if not self.report.cells:
            named = ", ".join(cell.name for cell in planned)
            raise Misuse("No cell is named as --only says.", next_step=f"There are {named}.")
        self._waiting.extend(cell for cell in self.report.cells if not cell.alone)
        self._last.extend(cell for cell in self.report.cells if cell.alone)

    def _play_all(self, lane: Lane, normal: Undisturbed, cells: deque[Cell]) -> None:
        while True:
            with self._lock:
                if not cells:
                    return
                cell = cells.popleft()
            row = judge(self._order.pipeline, cell, lane.play(cell), normal)
            with self._lock:
                self.report.rows.append(row)
                self._tell(row, len(self.report.cells))


def _error(run: Json) -> str:
    """The first step that failed, and why."""
    for step in run["steps"]:
        for entry in step["tries"]:
            if entry["error"]:
                return f", since {step['agent']} ended with {entry['error']['code']}: {entry['error']['message']}"
    return ""
