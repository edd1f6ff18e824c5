"""Parts `backlog` and `idle`: what waiting costs."""

import time
from collections.abc import Sequence

import psycopg
from filling import Template, fill
from report import Found
from system import System, children, cpu_s, eventually

from app import embedded


def backlog(found: Found, system: System, *, steps: int, workers: int) -> None:
    """Steps that are available and sent, behind workers that are busy: none of them is lost."""
    system.start_runs("held", {"hold_s": 0.01}, "backlog-", steps)
    for number in range(workers):
        system.start_worker("threads", 4, ready=number == workers - 1)
    began_s = said_s = time.monotonic()
    while (ended := system.ended_runs("backlog-")) < steps and time.monotonic() - began_s < 900:
        if time.monotonic() - said_s > 10:
            said_s = time.monotonic()
            system.say(f"  {ended:,} of {steps:,} steps ended")
        time.sleep(0.5)
    took_s = time.monotonic() - began_s
    found.figures |= {"steps": steps, "time": f"{took_s:.0f} s", "steps a second": round(steps / took_s)}
    found.count("steps not ended", steps - ended)
    again = system.value("select sum(sends) from stepfast.steps") - steps
    found.figures["duplicate messages"] = f"{100 * again / steps:.2f} %"
    found.count("messages sent again", again, at_most=steps // 100)


def idle(found: Found, system: System, *, runs: int, seconds: float) -> None:
    """What one idle worker costs, in its own process and in Postgres, with so many finished runs in the tables."""
    _fill(system, runs)
    steps = system.value("select count(*) from stepfast.steps")
    found.figures |= {"finished runs": system.value("select count(*) from stepfast.runs"), "their steps": steps}
    _idles(found, system, "without sweeps", seconds, STEPFAST_SWEEP_S="100000", STEPFAST_LEASE_S="300000")
    _idles(found, system, "with default settings", seconds)


def _idles(found: Found, system: System, name: str, seconds: float, **env: str) -> None:
    worker = system.start_worker("threads", 8, **env)
    run_id = system.start_run("held", {"hold_s": 0.0}, f"idle {name}")  # so that it is present, and beats
    eventually(lambda: system.ended(run_id), within_s=30, what="the first run")
    time.sleep(12)  # a session that idles reports what it did after ten seconds
    own, postgres, statements = _spent(system, worker.pids(), seconds)
    found.figures[f"{name}: the worker"] = f"{100 * own:.2f} % of a core"
    found.figures[f"{name}: Postgres"] = f"{100 * postgres:.2f} % of a core"
    found.figures[f"{name}: statements a second"] = round(statements, 2)
    system.end([worker])


def _spent(system: System, pids: Sequence[int], seconds: float) -> tuple[float, float, float]:
    """Shares of a core, and statements a second, of the workers and of Postgres."""
    before = (cpu_s(pids), _postgres_s(system), _transactions(system), time.monotonic())
    time.sleep(seconds)
    after = (cpu_s(pids), _postgres_s(system), _transactions(system), time.monotonic())
    took_s = after[3] - before[3]
    # Our own statement, before the second count, is one.
    return (after[0] - before[0]) / took_s, (after[1] - before[1]) / took_s, (after[2] - before[2] - 1) / took_s


def _postgres_s(system: System) -> float:
    """Of the server and its sessions; those that ended meanwhile are counted with the server."""
    server = embedded.running(system.home)["postgres"]
    return cpu_s([server, *children(server)])


def _transactions(system: System) -> int:
    # Sessions report what they did at the latest a second after it.
    return int(system.value("select xact_commit from pg_stat_database where datname = current_database()"))


def _fill(system: System, runs: int) -> None:
    """Finished runs as the soak leaves them: one is done, and copied."""
    system.say(f"  filling {runs:,} finished runs of 4 steps")
    system.script(delay_ms=0)
    worker = system.start_worker("threads", 4)
    done = system.start_run("soak", {"effects": str(system.home / "effects")}, "template")
    eventually(lambda: system.ended(done), within_s=60, what="the run to copy")
    system.end([worker])
    # A session of its own: ours end a statement after ten seconds.
    url = system.environ["STEPFAST_DATABASE_URL"].replace("+psycopg", "")
    with psycopg.connect(url, autocommit=True) as connection:
        fill(connection, [Template(done, 100)], runs, newest_h=0, oldest_h=24, say=system.say)
