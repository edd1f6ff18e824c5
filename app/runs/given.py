"""What an attempt was given: its input, the outputs that it pinned, its gate's values, and what was sent back. Pure.

All of it of a run as `operations.document` gives it, in which nothing is shown that a schema calls sensitive. Outputs
are rows of their attempts and never change, so that this is what the attempt saw, whatever was done again since.
"""

from typing import TYPE_CHECKING

from app.pipelines import expressions
from app.pipelines.templates import lookup_shown
from app.runs.states import AttemptState

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from app.pipelines.model import Agent, Json, Pipeline


def tries_by_id(run: "Json") -> "dict[str, Json]":
    """Every attempt of a run."""
    return {entry["id"]: entry for step in run["steps"] for entry in step["tries"]}


def outputs_read(attempt: "Json", tries: "Mapping[str, Json]") -> "dict[str, Json | None]":
    """The outputs that an attempt was given, by agent."""
    return {name: (tries.get(read["attempt"]) or {}).get("output") for name, read in attempt["reads"].items()}


def gate_seen(attempt: "Json", agent: "Agent", run: "Json", tries: "Mapping[str, Json]") -> "Json | None":
    """The gate of an attempt: `expression`, `values` by name (None where there was none), and `verdict`.

    That is held, refused or error; empty where nobody asked, or where the attempt's end does not tell. None without
    a gate.
    """
    if agent.gate is None or attempt["decided_by"] or attempt["reused_from"]:
        return None
    known = {**outputs_read(attempt, tries), "input": run["input"]}
    values = {".".join(path): lookup_shown(path, known) for path in expressions.parse(agent.gate).references}
    return {"expression": agent.gate, "values": values, "verdict": _verdict(attempt)}


def _verdict(attempt: "Json") -> str:
    error = attempt["error"] or {}
    details = error.get("details")
    asked = isinstance(details, dict) and "gate" in details
    if attempt["state"] in {AttemptState.EXECUTING, AttemptState.LOST}:
        return ""
    if error.get("code") == "gate_refused":
        return "refused"
    if error.get("code") == "author_mistake":
        return "error" if asked else ""
    return "" if error.get("code") == "invalid_input" else "held"


def feedback_given(
    attempt: "Json", pipeline: "Pipeline", events: "Sequence[Json]", tries: "Mapping[str, Json]"
) -> "Json | None":
    """What a refused gate had sent back to the agent of an attempt; None where this is not such a round.

    Made again from the refusal that opened the attempt's generation: what that gate read is still there.
    """
    refusal = None
    for event in events:
        if event["name"] == "step.rerun" and event["data"]["rerun"] == attempt["agent"]:
            refusal = event
        elif event["name"] == "step.reopened" and event["agent"] == attempt["agent"]:
            opened_by_gate = refusal is not None and event["data"]["reason"].startswith("the gate of ")
            if event["generation"] == attempt["generation"]:
                return _feedback(refusal, pipeline, tries) if refusal and opened_by_gate else None
            refusal = None
    return None


def _feedback(refusal: "Json", pipeline: "Pipeline", tries: "Mapping[str, Json]") -> "Json | None":
    asking = tries.get(refusal["attempt_id"])
    gate = pipeline.by_id[refusal["agent"]].gate
    if asking is None or gate is None:
        return None
    read = {path[0] for path in expressions.parse(gate).references} - {"input"}
    outputs = outputs_read(asking, tries)
    return {"gate_of": refusal["agent"], "gate": gate, "read": {name: outputs.get(name) for name in sorted(read)}}
