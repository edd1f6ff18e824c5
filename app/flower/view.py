"""What the page of a run shows: of its rows, the texts and places. Pure; each text is redacted, bounded and clean.

The templates escape what they are given, and compute nothing.
"""

from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING

from app.flower.graph import DIAMOND_PX, layout
from app.redaction import redact
from app.runs.explain import explain
from app.runs.given import gate_seen, tries_by_id
from app.runs.states import RUN_ENDED, AttemptState, RunState, StepState
from app.words import clean, cut, dollars, duration, lines, moment, one_line, seconds, short, took

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from app.pipelines.model import Agent, Json, Pipeline

VALUE_MAX_LINES = 400
LINE_MAX_CHARS = 2_000
TEXT_MAX_CHARS = 1_000
SHORT_TEXT_MAX_CHARS = 200
PREVIEW_MAX_CHARS = 90
GATE_MAX_CHARS = 32  # the width of a node and of the gap beside it
TIMELINE_MAX_ROWS = 300
BAR_MIN_PERCENT = 0.6


def run_page(run: "Json", events: "Sequence[Json]", pipeline: "Pipeline") -> "Json":
    """Of a run as `operations.document` gives it, and its events, what run.html shows."""
    told = explain(run, events)
    tries = tries_by_id(run)
    timeline = _timeline(run, events, pipeline, tries)
    return {
        "id": run["id"],
        "short": short(run["id"]),
        "pipeline": run["pipeline"],
        "state": run["state"],
        "partial": run["partial"],
        "seq": events[-1]["seq"] if events else 0,
        "ended": run["state"] in RUN_ENDED,
        "why": [sentence for part in told if (sentence := text(part))][:2],
        "facts": _facts(run),
        "cards": _cards(run),
        "graph": _graph(run, pipeline, tries),
        "waiting": [_request(entry) for entry in run["approvals"] if entry["state"] == "requested"],
        "steps": [_step(step, pipeline.by_id[step["agent"]]) for step in run["steps"]],
        "input": value(run["input"]),
        "timeline": timeline[-TIMELINE_MAX_ROWS:],
        "left_out": max(0, len(timeline) - TIMELINE_MAX_ROWS),
        "may_resume": run["state"] in {RunState.FAILED, RunState.CANCELLED} or run["partial"],
        "may_cancel": run["state"] not in RUN_ENDED,
    }


def value(shown: object, *, name: str = "") -> list[tuple[str, str]]:
    """A redacted value as lines with their styles, at most VALUE_MAX_LINES of them."""
    found = lines(name, shown)
    kept = [(cut(clean(line), LINE_MAX_CHARS), style) for line, style in islice(found, VALUE_MAX_LINES)]
    rest = sum(1 for _ in found)
    return [*kept, (f"... {rest:,} more lines: stepfast show has them", "dim")] if rest else kept


def text(given: object) -> str:
    """Foreign text in a sentence: redacted, on one line, and bounded."""
    return cut(one_line(str(given)), TEXT_MAX_CHARS)


def _facts(run: "Json") -> list[tuple[str, str]]:
    """What is known of a run beside its state, as a list of names and values."""
    labels = redact(run["labels"])
    assert isinstance(labels, dict)
    found = {
        "Pipeline": f"{run['pipeline']} {run['version']}",
        "Labels": ", ".join(f"{name}={entry}" for name, entry in labels.items()),
        "Key": run["key"] or "",
        "Tenant": run["tenant"],
        "Created": f"{moment(run['created_at'])} UTC",
        "Ended": f"{moment(run['ended_at'])} UTC" if run["ended_at"] else "",
        "Deadline": f"{moment(run['deadline_at'])} UTC" if run["deadline_at"] else "",
    }
    return [(name, text(entry)) for name, entry in found.items() if entry]


def _cards(run: "Json") -> list[tuple[str, str, str]]:
    """The figures at the top: label, value, and what it is made of."""
    steps, totals = run["steps"], run["totals"]
    done = sum(step["state"] == StepState.COMPLETED for step in steps)
    attempts = [entry for step in steps for entry in step["tries"]]
    lost = sum(entry["state"] == AttemptState.LOST for entry in attempts)
    failed = sum(entry["state"] == AttemptState.FAILED for entry in attempts)
    cost = dollars(totals["cost_usd"]) if totals["calls"] else "-"
    return [
        ("Steps completed", f"{done} of {len(steps)}", ""),
        ("Attempts", str(len(attempts)), f"{failed} failed, {lost} lost"),
        ("Tokens", f"{totals['input_tokens'] + totals['output_tokens']:,}", f"{totals['output_tokens']:,} of them out"),
        ("Cost", cost if totals["cost_usd"] is not None else "unknown", _calls(totals["calls"])),
        ("Time", took(run), ""),
    ]


def _calls(count: int) -> str:
    return "no paid call" if not count else "1 paid call" if count == 1 else f"{count} paid calls"


# The picture.


def _graph(run: "Json", pipeline: "Pipeline", tries: "dict[str, Json]") -> "Json":
    steps = {step["agent"]: step for step in run["steps"]}
    gates = {agent.id: agent.gate for agent in pipeline.agents if agent.gate}
    last = {name: steps[name]["tries"][-1] for name in gates if steps[name]["tries"]}
    seen = {name: gate_seen(attempt, pipeline.by_id[name], run, tries) for name, attempt in last.items()}
    drawn = layout({name: step["depends_on"] for name, step in steps.items()})
    nodes = [
        {
            "agent": node.agent,
            "x": node.x,
            "y": node.y,
            "state": steps[node.agent]["state"],
            "caption": _caption(steps[node.agent]),
        }
        for node in drawn.nodes
    ]
    return {
        "width": drawn.width,
        "height": drawn.height,
        "nodes": nodes,
        "edges": [
            {"path": edge.path, "passed": steps[edge.source]["state"] == StepState.COMPLETED} for edge in drawn.edges
        ],
        "gates": [
            {
                "x": node.x - DIAMOND_PX,
                "y": node.middle,
                "top": node.y - 9,
                "text": cut(_plain(gates[node.agent]), GATE_MAX_CHARS),
                "whole": text(_plain(gates[node.agent])),
                "verdict": (seen.get(node.agent) or {}).get("verdict", ""),
            }
            for node in drawn.nodes
            if node.agent in gates
        ],
    }


def _caption(step: "Json") -> str:
    parts = [step["state"]]
    if len(step["tries"]) > 1:
        parts.append(f"{len(step['tries'])} attempts")
    return " · ".join(parts)


def _plain(gate: str) -> str:
    """A gate without the braces of its variables."""
    return gate.replace("{{", "").replace("}}", "")


# Steps and attempts.


def _step(step: "Json", agent: "Agent") -> "Json":
    tries = step["tries"]
    spent = [took_s for entry in tries if (took_s := duration(entry)) is not None]
    used = [entry["usage"] for entry in tries if entry["usage"]]
    costs = [entry["cost_usd"] for entry in tries if entry["cost_usd"] is not None]
    current = next((entry for entry in tries if entry["id"] == step["attempt_id"]), None)
    output = value(current["output"]) if current and current["output"] is not None else []
    return {
        "agent": step["agent"],
        "state": step["state"],
        "does": agent.model or agent.handler or "",
        "attempts": len(tries),
        "took": seconds(sum(spent)) if spent else "-",
        "tokens_in": f"{sum(entry.get('input_tokens', 0) for entry in used):,}" if used else "-",
        "tokens_out": f"{sum(entry.get('output_tokens', 0) for entry in used):,}" if used else "-",
        "cost": dollars(sum(costs) if costs else None),
        "output": output,
        "preview": cut(" · ".join(line.strip() for line, _ in output[:3]), PREVIEW_MAX_CHARS),
        "feedback": value(redact(step["feedback"])) if step["feedback"] else [],
        "until": f"{moment(step['scheduled_at'])} UTC" if step["scheduled_at"] else "",
    }


def _request(approval: "Json") -> "Json":
    expires = approval["expires_at"]
    return {
        "agent": approval["agent"],
        "since": f"{moment(approval['requested_at'])} UTC",
        "expires": f"{moment(expires)} UTC" if expires else "",
    }


def _timeline(run: "Json", events: "Sequence[Json]", pipeline: "Pipeline", tries: "dict[str, Json]") -> "list[Json]":
    """A row an event, in their order; that of a claim, or of a person's output, shows the attempt."""
    # Up to now only while something executes: a day of waiting would make everything else a line.
    executes = any(entry["ended_at"] is None for entry in tries.values())
    start = datetime.fromisoformat(run["created_at"])
    end = datetime.now(UTC) if executes else datetime.fromisoformat(events[-1]["at"]) if events else start
    whole_s = max((end - start).total_seconds(), 0.001)
    rows = []
    for event in events:
        at = datetime.fromisoformat(event["at"])
        left = min(99.0, max(0.0, (at - start).total_seconds() / whole_s * 100))
        row = {"at": event["at"][11:23], "date": event["at"][:10], "left": round(left, 2)}
        attempt = tries.get(event["attempt_id"] or "")
        if attempt and event["name"] in {"step.claimed", "step.overridden"}:
            width = (duration(attempt) or 0.0) / whole_s * 100
            bar = round(max(BAR_MIN_PERCENT, min(width, 100 - left)), 2)
            rows.append(
                row | {"width": bar, "attempt": _attempt(attempt, pipeline.by_id[attempt["agent"]], run, tries)}
            )
        elif sentence := _sentence(event):
            letter = event["data"].get("dead_letter") if event["name"] == "step.discarded" else None
            rows.append(row | {"attempt": None, "said": sentence, "dead_letter": letter})
    return rows


def _attempt(attempt: "Json", agent: "Agent", run: "Json", tries: "dict[str, Json]") -> "Json":
    error, usage = attempt["error"] or {}, attempt["usage"] or {}
    paid = [f"{usage['input_tokens']:,} tokens in, {usage['output_tokens']:,} out"] if usage else []
    paid += [dollars(attempt["cost_usd"])] if attempt["cost_usd"] is not None else []
    by = f"{text(attempt['decided_by'])} gave its output by hand" if attempt["decided_by"] else ""
    return {
        "id": attempt["id"],
        "agent": attempt["agent"],
        "number": attempt["number"],
        "generation": attempt["generation"],
        "state": attempt["state"],
        "word": _word(attempt),
        "took": "" if by else took(attempt),
        "who": by or f"worker {attempt['worker_id']}",
        "model": attempt["model"] or "",
        "paid": ", ".join(paid),
        "reads": ", ".join(["the input", *(_named(name, read, tries) for name, read in attempt["reads"].items())]),
        "gate": _gate(attempt, agent, run, tries),
        "message": text(error.get("message", "")),
        "details": value(redact(error["details"])) if error.get("details") else [],
        "output": value(attempt["output"]) if attempt["output"] is not None else [],
    }


def _word(attempt: "Json") -> str:
    match attempt["state"]:
        case AttemptState.COMPLETED if attempt["reused_from"]:
            return "completed: reused what its key had given"
        case AttemptState.FAILED | AttemptState.LOST:
            return f"{attempt['state']}: {text(attempt['error']['code'])}"
        case AttemptState.SUSPENDED:
            return "asked for an approval"
    return str(attempt["state"])


def _named(agent: str, read: "Json", tries: "dict[str, Json]") -> str:
    known = tries.get(read["attempt"])
    return f"{agent} (attempt {known['number']})" if known else agent


def _gate(attempt: "Json", agent: "Agent", run: "Json", tries: "dict[str, Json]") -> "Json | None":
    """The gate with the values that it saw."""
    seen = gate_seen(attempt, agent, run, tries)
    if seen is None:
        return None
    saw = [f"{name} = {cut(one_line(repr(found)), SHORT_TEXT_MAX_CHARS)}" for name, found in seen["values"].items()]
    return {"text": text(_plain(seen["expression"])), "saw": ", ".join(saw), "verdict": seen["verdict"]}


def _sentence(event: "Json") -> str:
    """An event in words; empty where an attempt's row says it."""
    data, agent = event["data"], event["agent"]
    by = f" by {data['by']}" if data.get("by") else ""
    why = f": {data['reason']}" if data.get("reason") else ""
    again = f", to do {', '.join(data.get('agents') or [])} again" if data.get("agents") else ""
    told = {
        "run.enqueued": "The run was enqueued.",
        "run.resumed": f"Resumed{by}{again}.",
        "run.suspended": "Suspended: a person is waited for.",
        "run.continued": "The run goes on.",
        "run.completed": f"The run completed{' in part' if data.get('partial') else ''}.",
        "run.failed": "The run failed.",
        "run.cancelled": f"Cancelled{by}{why}",
        "step.retry_scheduled": f"{agent} is tried again in {_ms(data.get('retry_ms'))} ({data.get('code')}).",
        "step.deferred": f"{agent} was put off{why}",
        "step.discarded": f"{agent} was given up ({data.get('code')}).",
        "step.rescued": f"{agent} was rescued from worker {data.get('worker')}, which {data.get('reason')}.",
        "step.rerun": f"{data.get('message')} So {data.get('rerun')} runs again."
        if data.get("code") == "stale_input"
        else f"The gate of {agent} refused, so {data.get('rerun')} runs again.",
        "step.stale_read": f"{agent} works with a stale output of {', '.join(data.get('reads') or [])}{why}",
        "step.stale_input": f"{agent} found what it reads too old, or not made yet, and waits for it.",
        "step.reopened": f"{agent} is done again{why}",
        "step.approved": f"{agent} was approved{by}{why}",
        "step.rejected": f"{agent} was rejected{by}{why}",
        "step.expired": f"{agent} was not approved in time.",
        "step.settled": f"{agent}: the worker that was taken for dead confirmed its output after all.",
        "step.cancelled": f"{agent} was cancelled.",
    }
    return text(told.get(event["name"], ""))


def _ms(given: object) -> str:
    return seconds(given / 1_000) if isinstance(given, int | float) else "a while"


def run_rows(found: "Iterable[Json]") -> "list[Json]":
    """The rows of the list of runs."""
    return [
        {
            "id": run["id"],
            "short": short(run["id"]),
            "pipeline": run["pipeline"],
            "state": run["state"],
            "partial": run["partial"],
            "steps": f"{run['completed']} of {run['steps']}",
            "labels": cut(", ".join(f"{one_line(name)}={text(entry)}" for name, entry in _labels(run)), 100),
            "created": moment(run["created_at"]),
            "took": took(run),
            "cost": dollars(run["cost_usd"]),
        }
        for run in found
    ]


def _labels(run: "Json") -> "list[tuple[str, object]]":
    labels = redact(run["labels"])
    assert isinstance(labels, dict)
    return list(labels.items())
