"""What a refused gate sent back to an earlier agent, as it may be shown."""

from typing import TYPE_CHECKING

from app.redaction import redact

if TYPE_CHECKING:
    from app.pipelines.model import Json, Pipeline


def redacted_feedback(feedback: "Json | None", pipeline: "Pipeline") -> "Json | None":
    """What a refused gate sent back, without what the schemas of the outputs that it read call sensitive."""
    if feedback is None:
        return None
    read = {name: redact(output, pipeline.by_id[name].schema) for name, output in feedback["read"].items()}
    return {**feedback, "read": read}
