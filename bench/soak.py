"""`make soak`: what breaks, and what it costs, on private servers with real workers. `--help` lists the parts.

Figures are printed: they are this machine's. Promises are counts, and must hold: exit 1 where one does not.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import system as systems  # first: it makes our own packages importable
from faults import CRASH, IN_ORDER, KILL, WIPE, faults
from recovery import outage, rescue, threads, wipe
from report import Found, machine, print_all
from standing import backlog, idle

from app.errors import NotReady

BROKERS = ("valkey", "rabbitmq")
Part = Callable[[Found, systems.System, int, bool], None]


def _faults(found: Found, system: systems.System, seed: int, short: bool) -> None:
    """2,000 runs: workers killed, broker wiped, Postgres restarted."""
    events = [(0.2, IN_ORDER), (0.35, WIPE), (0.6, CRASH), (0.75, WIPE)]
    if short:
        faults(found, system, runs=40, kill_every_s=8, events=[(0.2, WIPE), (0.4, KILL), (0.6, CRASH)], seed=seed)
    else:
        faults(found, system, runs=2_000, kill_every_s=10, events=events, seed=seed)


def _rescue(found: Found, system: systems.System, seed: int, short: bool) -> None:
    """SIGKILL, SIGSTOP and a cut network: when the step goes on elsewhere."""
    rescue(found, system, kills=2 if short else 30, freezes=1 if short else 3, seed=seed)


def _outage(found: Found, system: systems.System, _seed: int, short: bool) -> None:
    """Postgres away for 60 s with 200 calls in flight."""
    outage(found, system, calls=20 if short else 200, away_s=15 if short else 60)


def _threads(found: Found, system: systems.System, _seed: int, short: bool) -> None:
    """1,000 threads on a busy machine, sessions cut: no false rescue."""
    threads(found, system, calls=100 if short else 1_000, delay_s=5 if short else 20, cut_every_s=2)


def _wipe(found: Found, system: systems.System, _seed: int, short: bool) -> None:
    """The broker wiped with 200 runs under way."""
    wipe(found, system, runs=50 if short else 200)


def _backlog(found: Found, system: systems.System, _seed: int, short: bool) -> None:
    """10,000 available steps behind busy workers."""
    backlog(found, system, steps=500 if short else 10_000, workers=2)


def _idle(found: Found, system: systems.System, _seed: int, short: bool) -> None:
    """An idle worker beside 100,000 finished runs."""
    idle(found, system, runs=2_000 if short else 100_000, seconds=10 if short else 60)


PARTS: Mapping[str, Part] = {
    "faults": _faults,
    "rescue": _rescue,
    "outage": _outage,
    "threads": _threads,
    "wipe": _wipe,
    "backlog": _backlog,
    "idle": _idle,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listed = "; ".join(f"{name}: {part.__doc__}" for name, part in PARTS.items())
    parser.add_argument("--part", action="append", choices=PARTS, help=f"these parts only; {listed}")
    parser.add_argument(
        "--broker", choices=BROKERS, default="valkey", help="rabbitmq: Debian's package must be installed"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="decides what is killed, and when (default: from the clock)"
    )
    parser.add_argument("--short", action="store_true", help="a small form of each part")
    parser.add_argument(
        "--json", action="store_true", help="print {ok, machine, parts: [{part, broker, figures, promises}]}"
    )
    given = parser.parse_args(argv)
    seed = given.seed or int(time.time())
    results = []
    where = machine()
    for name in given.part or PARTS:
        say(f"{name}, on {given.broker}: {PARTS[name].__doc__}")
        found = Found(name, given.broker)
        results.append(found)
        began_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="stepfast-soak-") as folder:
            try:
                with systems.system(Path(folder), given.broker, say) as system:
                    PARTS[name](found, system, seed, given.short)
            except systems.TookTooLong as error:
                say(f"  {error}")
                found.promises[f"it came to its end: {error}"] = False
            except NotReady as error:
                say(str(error))
                return NotReady.exit_code
        found.figures["the part took"] = f"{time.monotonic() - began_s:.0f} s"
    ok = all(all(found.promises.values()) for found in results)
    if given.json:
        print(json.dumps({"ok": ok, "machine": where, "parts": [asdict(found) for found in results]}, indent=2))
    else:
        print_all(results, where)
    return 0 if ok else 1


def say(sentence: str) -> None:
    """Progress is no answer, so it goes to standard error."""
    print(sentence, file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
