"""What an open request for an approval asks for: what is about to be done, with what, bound to its digest. Pure."""

from typing import TYPE_CHECKING

from app.errors import AuthorMistake
from app.pipelines import templates
from app.pipelines.feedback import redacted_feedback
from app.redaction import redact
from app.runs.explain import given_before
from app.words import moment, short

if TYPE_CHECKING:
    from app.pipelines.model import Json, Pipeline

DIGEST_SHOWN_CHARS = 12


def asked(
    run: "Json", pipeline: "Pipeline", agent_id: str, approval: "Json"
) -> "tuple[dict[str, str], dict[str, Json]]":
    """Of a run as `Reads.run` gives it: facts by name, and the values that are read, redacted, by title."""
    agent = pipeline.by_id[agent_id]
    step = next(step for step in run["steps"] if step["agent"] == agent_id)
    asking = next(entry for entry in step["tries"] if entry["id"] == approval["attempt_id"])
    expires = approval["expires_at"]
    fields = {
        "agent": f"{agent_id} of {pipeline.name} {pipeline.version}, run {short(run['id'])}",
        "does": f"asks {agent.model}" if agent.model else f"calls {agent.handler}",
        "code": (asking["code_hash"] or "")[:DIGEST_SHOWN_CHARS],
        "gate": f"{agent.gate}, which held" if agent.gate else "",
        "reads": ", ".join(["input", *asking["reads"]]),
        "digest": approval["digest"][:DIGEST_SHOWN_CHARS],
        "before": given_before(run, agent_id).strip(),
        "requested": f"{moment(approval['requested_at'])} UTC",
        "expires": f"{moment(expires)} UTC" if expires else "never",
    }
    values = {"input": _redacted(run["input"], pipeline.input_schema)}
    by_id = {entry["id"]: entry for other in run["steps"] for entry in other["tries"]}
    for name, read in asking["reads"].items():
        values[f"output of {name}"] = _redacted(by_id[read["attempt"]]["output"], pipeline.by_id[name].schema)
    if step["feedback"]:
        values["sent back with"] = redacted_feedback(step["feedback"], pipeline) or {}
    if agent.prompt:
        names = {"run_id": run["id"], "agent": agent_id, "pipeline": pipeline.name, "input": values["input"]}
        names |= {name: values[f"output of {name}"] for name in asking["reads"]}
        values["prompt"] = {"system": agent.prompt.system, "user": _rendered(agent.prompt.user, names)}
    return {name: value for name, value in fields.items() if value}, values


def _rendered(text: str, names: "Json") -> str:
    """A prompt with its values; where it cannot have them, as it is written."""
    try:
        return templates.render(templates.parse(text), names)
    except (AuthorMistake, templates.BadText):
        return text


def _redacted(value: "Json", schema: "Json | None") -> "Json":
    shown = redact(value, schema)
    assert isinstance(shown, dict)
    return shown
