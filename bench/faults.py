"""Part `faults`: many runs while workers are killed, the broker is wiped and Postgres is restarted, seeded."""

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from report import Found, check_rules
from system import System, Worker

WIPE, KILL = "broker wiped", "a worker is killed"
IN_ORDER, CRASH = "Postgres restarted in order", "Postgres restarted by a crash"
WORKERS, PROCESSES = "workers killed", "processes of a pool killed"
MODELS = ("research", "code", "review")
# Runs under way at one time: more would only wait.
WINDOW_RUNS = 150
STARTS_A_TURN = 10
TURN_S = 0.1
# Nothing ended for so long: what is left is stuck. A lease, a beat and a truce after Postgres's start are shorter.
STUCK_S = 90.0
SAY_S = 5.0


@dataclass(slots=True)
class Faults:
    """What is done to the system, and when: kills by the clock, the rest by how far the runs have come."""

    system: System
    chance: random.Random
    kill_every_s: float
    events: list[tuple[float, str]]  # share of the runs that have ended, what happens then
    next_kill_s: float = 0.0
    # Both kinds of kills are told, also the one that chance left out.
    done: Counter[str] = field(default_factory=lambda: Counter({WORKERS: 0, PROCESSES: 0}))
    in_flight: Counter[str] = field(default_factory=Counter)

    def turn(self, share: float) -> None:
        """Does what is due."""
        if self.events and share >= self.events[0][0]:
            self._happen(self.events.pop(0)[1])
        if time.monotonic() >= self.next_kill_s:
            if self.next_kill_s:
                self._kill()
            self.next_kill_s = time.monotonic() + self.chance.expovariate(1 / self.kill_every_s)

    def _happen(self, event: str) -> None:
        self.system.say(f"  {event}")
        if event == KILL:
            self._kill()
            return
        self.done[event] += 1
        if event == WIPE:
            self.system.wipe_broker()
        else:
            self.system.stop_postgres(signal.SIGINT if event == IN_ORDER else signal.SIGQUIT)
            self.system.start_postgres()

    def _kill(self) -> None:
        """SIGKILL of a whole worker, which is replaced, or of one process of a pool."""
        ready = [worker for worker in self.system.workers if worker.ready]
        if not ready:
            return
        worker = self.chance.choice(ready)
        pids = worker.pids()
        child = self.chance.choice([pid for pid in pids if pid != worker.process.pid] or [0])
        if worker.pool == "prefork" and child and self.chance.random() < 0.5:
            pids = [child]
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            self.done[PROCESSES] += 1
        else:
            worker.signal(signal.SIGKILL)
            self.done[WORKERS] += 1
            self.system.workers.remove(worker)
            start(self.system, worker.pool, ready=False)
        # What its last statement was about to commit, the server has committed by now.
        time.sleep(0.05)
        self.in_flight.update("calls" if row.agent in MODELS else "handlers" for row in self.system.executing(pids))


def start(system: System, pool: str, *, ready: bool = True) -> Worker:
    return system.start_worker(pool, 8 if pool == "threads" else 4, ready=ready)


def faults(
    found: Found, system: System, *, runs: int, kill_every_s: float, events: list[tuple[float, str]], seed: int
) -> None:
    """2,000 runs (or fewer) of four agents. Every promise is a count."""
    effects = system.home / "effects"
    system.script(delay_ms=300, research=150, review=500)
    system.await_ready([start(system, pool, ready=False) for pool in ("threads", "threads", "prefork")])
    plan = Faults(system, random.Random(seed), kill_every_s, sorted(events))
    began_s = time.monotonic()
    stuck = _run_all(system, plan, runs, effects)
    took_s = time.monotonic() - began_s
    found.figures |= {"runs": runs, "seed": seed, "time": f"{took_s:.0f} s", "runs a second": round(runs / took_s, 1)}
    found.figures |= dict(sorted(plan.done.items()))
    _count(found, system, plan, effects, runs, stuck)
    check_rules(found, system)


def _run_all(system: System, plan: Faults, runs: int, effects: Path) -> int:
    """Starts the runs and waits for their ends. Returns how many are stuck."""
    started, ended, said_s, moved_s = 0, 0, 0.0, time.monotonic()
    while ended < runs:
        for _ in range(min(STARTS_A_TURN, runs - started, WINDOW_RUNS - (started - ended))):
            system.start_run("soak", {"effects": str(effects), "n": started}, f"faults-{started}")
            started += 1
        plan.turn(ended / runs)
        before, ended = ended, system.ended_runs("faults-")
        now_s = time.monotonic()
        if ended > before:
            moved_s = now_s
        elif now_s - moved_s > STUCK_S:
            return runs - ended
        if now_s - said_s > SAY_S:
            said_s = now_s
            system.say(f"  {ended:,} of {runs:,} runs ended; {plan.done[WORKERS]} workers killed")
        time.sleep(TURN_S)
    return 0


def _count(found: Found, system: System, plan: Faults, effects: Path, runs: int, stuck: int) -> None:
    states = Counter(row.state for row in system.rows("select state from stepfast.runs where key like 'faults-%'"))
    lines = Counter(effects.read_text().split())
    (row,) = system.rows("""
        select count(*) filter (where state = 'completed' and agent <> 'deploy') as answers,
            count(*) filter (where state = 'lost') as lost, count(*) filter (where state = 'failed') as failed
        from stepfast.attempts""")
    twice = system.value("""
        select count(*) from (select from stepfast.attempts where state = 'completed'
            group by run_id, agent, generation having count(*) > 1) doubled""")
    found.count("runs lost", runs - states.total())
    found.count("runs stuck", stuck)
    found.count("runs that ended otherwise than completed", states.total() - states["completed"] - stuck)
    found.count("effects missing", states["completed"] - len(lines))
    found.count("effects doubled", lines.total() - len(lines))
    found.count("outputs committed twice", twice)
    found.figures["calls in flight at kills"] = plan.in_flight["calls"]
    found.count("calls repeated", system.calls() - row.answers, at_most=plan.in_flight["calls"])
    found.figures["handlers in flight at kills"] = plan.in_flight["handlers"]
    found.figures["attempts that failed"] = row.failed
    found.figures["attempts lost"] = row.lost
    sends = system.value("select sum(sends) from stepfast.steps")
    found.figures["messages sent, for each step"] = round(sends / (4 * runs), 3)
