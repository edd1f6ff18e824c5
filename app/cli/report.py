"""`stepfast report`."""

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import click

from app.cli import embedding, inputs, output, system
from app.cli.timeline import lasting

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from app.pipelines.model import Json

MESSAGE_MAX_CHARS = 120


@click.command()
@click.option(
    *("--since", "since"),
    metavar="T",
    default="24h",
    show_default=True,
    callback=inputs.since,
    help="Since how long, such as 2h or 3d, or an ISO time.",
)
@click.option("--pipeline", metavar="NAME", help="Only runs of this pipeline.")
@embedding.option
@click.option("--json", "as_json", is_flag=True, help="Print the report as one object.")
def command(since: datetime | timedelta, pipeline: str | None, embedded: bool, as_json: bool) -> None:
    """Say what happened in a while.

    Runs by state; workers that were lost and how soon others went on; retries; late commits that the fence refused;
    costs, and what of them was wasted: paid for, and not used; dead letters by what went wrong; the slowest agents.
    """
    worker = system.database(embedded=embedded)
    from app.runs.report import report

    found = report(worker.store.engine, since=since, pipeline=pipeline)
    if as_json:
        output.print_json(found)
        return
    of = f" of {pipeline}" if pipeline else ""
    print(output.one_line(f"Since {output.moment(found['since'])} UTC{of}:"))
    print()
    output.print_fields(_summary(found))
    for title, part, columns, row in _TABLES:
        if found[part]:
            _table(title, columns, [row(entry) for entry in found[part]])


def _summary(found: "Json") -> dict[str, str]:
    runs = ", ".join(f"{count:,} {state}" for state, count in sorted(found["runs"].items()))
    unknown = [entry for entry in found["wasted"] if entry["how"] == "lost"]
    lost = sum(entry["calls"] for entry in unknown)
    guess = sum(entry["estimate_usd"] or 0.0 for entry in unknown)
    beside = f", and {lost:,} calls lost with their workers (perhaps {output.dollars(guess)})" if lost else ""
    unpriced = found["unpriced_total"]
    return {
        "runs begun": runs or "none",
        "workers lost": f"{found['workers_lost_total']:,} with work in hand",
        "rescued steps": f"{found['rescued_total']:,}",
        "resumed by people": f"{found['resumed']:,}",
        "retries": f"{found['retries_total']:,}, and {found['reruns']:,} review rounds",
        "fence refusals": f"{found['fence_refusals']:,} late commits",
        "cost": output.dollars(found["cost_usd"]) + (f", and {unpriced:,} calls without a price" if unpriced else ""),
        "wasted": output.dollars(found["wasted_usd"]) + beside,
    }


def _table(title: str, columns: "Sequence[str]", rows: "Sequence[Sequence[str]]") -> None:
    print(f"\n{title}")
    numbers = ("count", "open", "calls", "steps", "attempts", "tokens in", "out", "cost", "p50", "p95", "max")
    output.console().print(output.table(columns, rows, right=[name for name in columns if name in numbers]))


def _s(value: float | None) -> str:
    return "-" if value is None else lasting(value)


def _worker(entry: "Json") -> tuple[str, ...]:
    place = f"{entry['host']}:{entry['pid']}" if entry["host"] else "-"
    return (
        str(entry["worker"]),
        place,
        output.moment(entry["ended_at"]),
        str(entry["steps"]),
        ", ".join(entry["agents"]),
    )


def _wasted(entry: "Json") -> tuple[str, ...]:
    how = {
        "failed": "answer refused",
        "fenced": "commit refused by the fence",
        "lost": "lost with its worker",
    }[entry["how"]]
    cost = output.dollars(entry["cost_usd"])
    if entry["how"] == "lost":
        cost = f"perhaps {output.dollars(entry['estimate_usd'])}"
    return how, entry["code"] or "-", f"{entry['calls']:,}", cost


def _letter(entry: "Json") -> tuple[str, ...]:
    message = output.cut(str(entry["message"] or ""), MESSAGE_MAX_CHARS)
    agent = f"{entry['pipeline']}.{entry['agent']}"
    figures = (f"{entry['count']:,}", f"{entry['open']:,}")
    return entry["error_fingerprint"][:8], agent, entry["code"], *figures, output.short(entry["run_id"]), message


_TABLES: "tuple[tuple[str, str, tuple[str, ...], Callable[[Json], tuple[str, ...]]], ...]" = (
    (
        "Workers that died with work in hand",
        "workers_lost",
        ("worker", "host:pid", "seen dead", "steps", "agents"),
        _worker,
    ),
    (
        "Rescued steps: from the first doubt to the next attempt",
        "recoveries",
        ("because its worker", "count", "p50", "p95", "max"),
        lambda e: (e["reason"], f"{e['count']:,}", _s(e["p50_s"]), _s(e["p95_s"]), _s(e["max_s"])),
    ),
    (
        "Retries",
        "retries",
        ("agent", "code", "count"),
        lambda e: (f"{e['pipeline']}.{e['agent']}", e["code"], f"{e['count']:,}"),
    ),
    (
        "Costs",
        "costs",
        ("pipeline", "model", "calls", "tokens in", "out", "cost"),
        lambda e: (
            e["pipeline"],
            e["model"],
            f"{e['calls']:,}",
            f"{e['input_tokens'] or 0:,}",
            f"{e['output_tokens'] or 0:,}",
            output.dollars(e["cost_usd"]),
        ),
    ),
    ("Wasted: paid for, and not used", "wasted", ("how", "code", "calls", "cost"), _wasted),
    (
        "Dead letters, by what went wrong",
        "dead_letters",
        ("cause", "agent", "code", "count", "open", "newest run", "message"),
        _letter,
    ),
    (
        "Slowest agents",
        "slowest",
        ("agent", "attempts", "p50", "p95", "max"),
        lambda e: (
            f"{e['pipeline']}.{e['agent']}",
            f"{e['attempts']:,}",
            _s(e["p50_s"]),
            _s(e["p95_s"]),
            _s(e["max_s"]),
        ),
    ),
)
