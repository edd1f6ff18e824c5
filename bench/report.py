"""What a part of the soak found: figures, which are printed, and promises, which must hold."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from system import System

from app.runs.database import engine
from app.runs.invariants import check


@dataclass(slots=True)
class Found:
    """One part on one broker. A promise that is not held makes the soak fail."""

    part: str
    broker: str
    figures: dict[str, Any] = field(default_factory=dict)
    promises: dict[str, bool] = field(default_factory=dict)

    def count(self, name: str, found: int, *, at_most: int = 0) -> None:
        """A count, which is promised to be at most so much."""
        self.figures[name] = found
        self.promises[f"{name} <= {at_most}"] = found <= at_most

    def goal(self, name: str, found: float, unit: str, *, at_most: float) -> None:
        """A figure beside its goal. It is this machine's, so that nothing fails where it is missed."""
        missed = "" if found <= at_most else "  MISSED"
        self.figures[name] = f"{found:,.2f} {unit}".ljust(18) + f"goal {at_most:,g}{missed}"

    def spread(self, name: str, seconds: Sequence[float]) -> None:
        """Times, by their quantiles."""
        ordered = sorted(seconds)
        if ordered:
            self.figures[f"{name}, p50"] = f"{quantile(ordered, 0.5):.2f} s"
            self.figures[f"{name}, p99"] = f"{quantile(ordered, 0.99):.2f} s"
            self.figures[f"{name}, most"] = f"{ordered[-1]:.2f} s"


def quantile(ordered: Sequence[float], share: float) -> float:
    """The nearest rank."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def check_rules(found: Found, system: System) -> None:
    """All nine rules, over every run of the database."""
    reader = engine(system.environ["STEPFAST_DATABASE_URL"], pool_max=1)
    try:
        with reader.connect() as connection:
            violations = check(connection)
    finally:
        reader.dispose()
    for violation in violations[:10]:
        system.say(f"  rule {violation.rule}, run {violation.run}, {violation.agent}: {violation.sentence}")
    found.count("contradictions to the nine rules", len(violations))


def machine() -> dict[str, Any]:
    """Where this was measured."""
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "processors": os.cpu_count(),
        "processor": names[0] if names else platform.machine(),
        "load before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }


def print_all(results: Sequence[Found], where: dict[str, Any]) -> None:
    """What people read."""
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    width = max(len(name) for found in results for name in found.figures)
    for found in results:
        print(f"\n{found.part}, on {found.broker}")
        for name, value in found.figures.items():
            print(f"  {name:<{width}}  {value if isinstance(value, str) else f'{value:,}'}")
        for promise, held in found.promises.items():
            if not held:
                print(f"  NOT HELD: {promise}")
