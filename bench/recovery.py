"""Parts `rescue`, `outage`, `threads` and `wipe`: how soon, and whether anything is done twice that need not be."""

import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from report import Found, check_rules
from system import System, cpu_s, eventually, relay, spinning

from app.settings import Settings

PROCESSORS = os.cpu_count() or 1
REACHED_S = 60.0


def rescue(found: Found, system: System, *, kills: int, freezes: int, seed: int) -> None:
    """From SIGKILL of a worker to the step's begin elsewhere, with default settings."""
    chance = random.Random(seed)
    workers = [system.start_worker("threads", 2), system.start_worker("prefork", 2)]
    _after_truce(system)
    for load, spinners in (("idle", 0), ("busy", PROCESSORS)):
        with spinning(spinners):
            times, seen = [], []
            for number in range(kills):
                _warm_up(system, f"warm-{load}-{number}")
                step = _Step.begin(system, f"{load}-{number}")
                victim = next(worker for worker in workers if step.pid in worker.pids())
                times.append(step.moved(lambda w=victim: w.signal(signal.SIGKILL), chance))  # type: ignore[misc]
                seen.append(step.stages())
                system.say(f"  {load} machine, {victim.pool}, kill {number + 1} of {kills}: {times[-1]:.2f} s")
                system.end([victim])
                workers.remove(victim)
                workers.append(system.start_worker(victim.pool, 2))
        found.spread(f"{load} machine, killed, elsewhere after", times)
        for stage, name in enumerate(("in doubt until judged dead", "dead until claimed elsewhere")):
            found.spread(f"{load} machine, {name}", [stages[stage] for stages in seen])
        found.figures[f"{load} machine, load average"] = f"{os.getloadavg()[0]:.1f}"
    system.end(workers)
    frozen, cut = [], []
    with relay(system.home) as (address, process):
        for number in range(freezes):
            frozen.append(_alone_then_moved(system, f"frozen-{number}", chance))
            cut.append(_alone_then_moved(system, f"cut-{number}", chance, address, process))
            process.send_signal(signal.SIGCONT)
    found.spread("frozen, elsewhere after", frozen)
    found.spread("cut off from Postgres, elsewhere after", cut)
    lost = system.value("select count(*) from stepfast.attempts where state = 'lost'")
    found.count("steps taken from live workers", lost - 2 * kills - 2 * freezes)
    check_rules(found, system)


def _warm_up(system: System, name: str) -> None:
    """Has workers that were just started execute something: the first step of a process connects it."""
    runs = [system.start_run("held", {"hold_s": 0.2}, f"{name}-{number}") for number in range(8)]
    eventually(lambda: all(system.ended(run) for run in runs), within_s=REACHED_S, what="the first steps")


def _alone_then_moved(
    system: System,
    name: str,
    chance: random.Random,
    address: str = "",
    process: Popen[bytes] | None = None,
) -> float:
    """Freezes a worker, or cuts its way to Postgres; returns when its step began elsewhere."""
    victim = system.start_worker("threads", 2, **({"STEPFAST_DATABASE_URL": address} if address else {}))
    step = _Step.begin(system, name)
    bystander = system.start_worker("threads", 2)
    struck = process.send_signal if process else victim.signal
    moved_s = step.moved(lambda: struck(signal.SIGSTOP), chance)
    victim.signal(signal.SIGCONT)
    system.end([victim, bystander])
    return moved_s


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that executes, and says where."""

    system: System
    run_id: object
    began: Path
    go: Path
    pid: int

    @classmethod
    def begin(cls, system: System, name: str) -> "_Step":
        """Starts a run of one step, and waits until it executes."""
        began, go = system.home / f"{name}-began", system.home / f"{name}-go"
        run_id = system.start_run("held", {"began": str(began), "go": str(go), "hold_s": 120}, name)
        return cls(system, run_id, began, go, int(_lines(began, 1)[0].split()[1]))

    def moved(self, strike: Callable[[], None], chance: random.Random) -> float:
        """Strikes its worker, at no fixed point of the others' sweeps. Returns after how long it began elsewhere."""
        time.sleep(1 + chance.random())
        struck_s = time.time()
        strike()
        moved_s = float(_lines(self.began, 2)[1].split()[0])
        self.go.touch()
        eventually(lambda: self.system.ended(self.run_id), within_s=REACHED_S, what="the run's end")
        return moved_s - struck_s

    def stages(self) -> tuple[float, float]:
        """How long its first worker was suspect, and how long the step waited then for its second."""
        (row,) = self.system.rows(
            "select extract(epoch from w.ended_at - w.suspect_since)::float as suspect,"
            " extract(epoch from b.started_at - w.ended_at)::float as waiting"
            " from stepfast.attempts a join stepfast.workers w on w.id = a.worker_id"
            " join stepfast.attempts b on b.run_id = a.run_id and b.number = 2"
            " where a.run_id = :r and a.number = 1",
            r=self.run_id,
        )
        return row.suspect, row.waiting


def _after_truce(system: System) -> None:
    """For one lease after Postgres started nobody is dead: that is no part of what is measured."""
    lease_s = float(system.environ.get("STEPFAST_LEASE_S", Settings().lease_s))
    age_s = system.value("select extract(epoch from clock_timestamp() - pg_postmaster_start_time())")
    time.sleep(max(0.0, lease_s - float(age_s)) + 0.5)


def _lines(file: Path, count: int) -> list[str]:
    def read() -> list[str]:
        lines = file.read_text().splitlines() if file.exists() else []
        return lines if len(lines) >= count else []

    return eventually(read, within_s=REACHED_S, what=f"begin number {count} of {file.name}")


def outage(found: Found, system: System, *, calls: int, away_s: float) -> None:
    """Postgres is away while so many calls are in flight, and their answers come meanwhile."""
    system.script(delay_ms=200, research=round(away_s * 500))
    system.start_worker("threads", calls)
    effects = system.home / "effects"
    for number in range(calls):
        system.start_run("soak", {"effects": str(effects)}, f"outage-{number}")
    eventually(lambda: system.calls_in_flight() == calls, within_s=away_s / 2, what=f"{calls} calls in flight")
    system.say(f"  Postgres is away for {away_s:.0f} s")
    system.stop_postgres(signal.SIGINT)
    time.sleep(away_s)
    system.start_postgres()
    back_s = time.monotonic()
    eventually(lambda: system.ended_runs("outage-") == calls, within_s=180, what="the end of all runs")
    found.figures |= {"calls in flight": calls, "Postgres was away for": f"{away_s:.0f} s"}
    found.figures["all runs ended after it was back"] = f"{time.monotonic() - back_s:.1f} s"
    _nothing_twice(found, system, calls)


def _nothing_twice(found: Found, system: System, runs: int) -> None:
    """Each call was made once, and each answer is committed."""
    answers = system.value("select count(*) from stepfast.attempts where state = 'completed' and agent <> 'deploy'")
    found.figures["calls"] = system.calls()
    found.count("calls repeated", system.calls() - 3 * runs)
    found.count("answers dropped", 3 * runs - answers)
    found.count("steps taken from live workers", system.logged("step.rescued"))
    check_rules(found, system)


def threads(found: Found, system: System, *, calls: int, delay_s: float, cut_every_s: float) -> None:
    """One process of so many threads on a busy machine, whose sessions are cut again and again."""
    system.script(delay_ms=round(delay_s * 1000))
    busy = system.start_worker("threads", calls)
    # Who judges is not as busy itself: it would be lenient.
    system.start_worker("threads", 1, queues="nothing")
    _after_truce(system)
    effects = system.home / "effects"
    cuts: list[tuple[float, float]] = []
    with spinning(PROCESSORS), ThreadPoolExecutor(1) as starter:
        starting = starter.submit(
            lambda: [system.start_run("soak", {"effects": str(effects)}, f"threads-{n}") for n in range(calls)]
        )
        began_s = time.monotonic()
        said_s = 0.0
        while (ended := system.ended_runs("threads-")) < calls and time.monotonic() - began_s < 600:
            cuts.append(_cut(system))
            if time.monotonic() - said_s > 5:
                said_s = time.monotonic()
                system.say(f"  {ended:,} of {calls:,} runs ended; {system.calls_in_flight():,} calls in flight")
            time.sleep(cut_every_s)
        starting.result()
    found.figures |= {"threads": calls, "time": f"{time.monotonic() - began_s:.0f} s", "sessions cut": len(cuts)}
    found.figures["runs that ended"] = ended
    found.figures["processor time of the worker"] = f"{cpu_s(busy.pids()):.0f} s"
    found.spread("a cut session is back after", [back_s for back_s, _ in cuts])
    found.spread("a live worker was in doubt for", [doubt_s for _, doubt_s in cuts])
    found.figures["load average"] = f"{os.getloadavg()[0]:.1f}"
    _nothing_twice(found, system, calls)


def _cut(system: System) -> tuple[float, float]:
    """Cuts each process's session, and waits until its lock is held again.

    Returns how long the last one took, and for how long at most one of them was in doubt.
    """
    ids = system.cut_sessions()
    cut_s = time.monotonic()
    doubts = [0.0]

    def back() -> bool:
        (row,) = system.rows(
            """
            select count(*) filter (where w.ended_at is null and not exists (
                    select from pg_locks l join pg_stat_activity s using (pid)
                    where l.locktype = 'advisory' and l.classid = 7083 and l.objid::bigint = w.id and l.granted
                        and s.application_name = 'stepfast-presence')) as away,
                max(extract(epoch from coalesce(w.ended_at, stepfast.now()) - w.suspect_since))::float as doubt
            from stepfast.workers w where w.id = any(:ids)""",
            ids=ids,
        )
        doubts.append(row.doubt or 0.0)
        return not row.away

    eventually(back, within_s=30, what="the sessions' return")
    return time.monotonic() - cut_s, max(doubts)


def wipe(found: Found, system: System, *, runs: int) -> None:
    """The same runs twice: undisturbed, and with a broker that forgets everything on the way."""
    system.script(delay_ms=500)
    system.start_worker("threads", 32, queues="agents")
    system.start_worker("prefork", 2, queues="handlers")
    _all(system, "warm-up-", 32, wiped_at=2.0)
    undisturbed_s = _all(system, "undisturbed-", runs, wiped_at=2.0)
    wiped_s = _all(system, "wiped-", runs, wiped_at=0.3)
    found.figures["runs under way"] = runs
    found.figures["undisturbed, the last ended after"] = f"{undisturbed_s:.1f} s"
    found.figures["broker wiped, the last ended after"] = f"{wiped_s:.1f} s"
    found.figures["later by"] = f"{wiped_s - undisturbed_s:.1f} s"
    sends = system.value(
        "select sum(sends) from stepfast.steps s join stepfast.runs r on r.id = s.run_id where r.key like 'wiped-%'"
    )
    found.figures["messages sent again"] = sends - 4 * runs
    total = 32 + 2 * runs
    found.count(
        "runs that are not completed",
        total - system.value("select count(*) from stepfast.runs where state = 'completed'"),
    )
    _nothing_twice(found, system, total)


def _all(system: System, prefix: str, runs: int, *, wiped_at: float) -> float:
    """Starts the runs, wipes the broker when this share has ended, and returns how long all took."""
    effects = system.home / "effects"
    began_s = time.monotonic()
    for number in range(runs):
        system.start_run("soak", {"effects": str(effects)}, f"{prefix}{number}")
    while (ended := system.ended_runs(prefix)) < runs:
        if ended >= wiped_at * runs:
            system.say(f"  broker wiped; {ended} of {runs} runs have ended")
            system.wipe_broker()
            wiped_at = 2.0
        if time.monotonic() - began_s > 300:
            break
        time.sleep(0.05)
    return time.monotonic() - began_s
