"""`stepfast show RUN --agent AGENT`: what an agent was given, what it gave, and what was approved of it."""

from typing import TYPE_CHECKING

from app.cli import output, readable
from app.cli.timeline import gate_values

if TYPE_CHECKING:
    from app.pipelines.model import Json

DIGEST_SHOWN_CHARS = 12


def show(found: "Json") -> None:
    """Prints what `operations.saw` found."""
    entry, gate = found["attempt"], found["gate"]
    error = entry["error"] or {}
    who = f"{entry['decided_by']}, by hand" if entry["decided_by"] else f"worker {entry['worker_id']}"
    fields = {
        "agent": f"{found['agent']} of {found['pipeline']} {found['version']}, run {output.short(found['run_id'])}",
        "attempt": f"{entry['number']} of {found['attempts']}, generation {entry['generation']}: {entry['state']}",
        "by": who,
        "model": entry["model"] or "",
        "code": (entry["code_hash"] or "")[:DIGEST_SHOWN_CHARS],
        "began": f"{output.moment(entry['started_at'])} UTC",
        "ended": f"{output.moment(entry['ended_at'])} UTC" if entry["ended_at"] else "not yet",
        "gate": f"{gate['expression']} {gate['verdict']}: {gate_values(gate['values'])}" if gate else "",
        "error": f"{error['code']}: {error['message']}" if error else "",
    }
    output.print_fields({name: value for name, value in fields.items() if value})
    readable.print_value("input", found["input"])
    for name, value in found["outputs"].items():
        readable.print_value(f"output of {name}", value or {})
    if found["feedback"]:
        readable.print_value("sent back with", found["feedback"])
    if found["asked"]:
        readable.print_value("what the model was sent, redacted", found["asked"])
    if entry["output"] is not None:
        readable.print_value("its own output", entry["output"])
    for approval in found["approvals"]:
        readable.print_value(_approval(approval), approval["shown"])


def _approval(approval: "Json") -> str:
    by = f" by {approval['decided_by']}" if approval["decided_by"] else ""
    at = f" at {output.moment(approval['decided_at'])} UTC" if approval["decided_at"] else ""
    why = f" ({approval['reason']})" if approval["reason"] else ""
    void = f", void: {approval['void_reason']}" if approval["void_reason"] else ""
    digest = approval["digest"][:DIGEST_SHOWN_CHARS]
    return f"{approval['state']}{by}{at}{why}{void}: digest {digest}, of what was shown"
