"""Small definitions for tests that need no skill file."""

from app.pipelines.model import Agent, Pipeline, RetryPolicy

KEY = ({"path": ["run_id"]}, {"text": ":"}, {"path": ["agent"]})


def agent(name: str, *depends_on: str, reads: tuple[str, ...] | None = None, **fields) -> Agent:
    """An agent of a model, that reads its direct dependencies."""
    values = {"model": "claude-sonnet-5-5", "key_parts": KEY} | fields
    if "handler" in fields:
        values["model"] = None
    return Agent(name, depends_on=depends_on, inputs=depends_on, reads=depends_on if reads is None else reads, **values)


def pipeline(*agents: Agent, name: str = "tested", version: str = "1", **fields) -> Pipeline:
    return Pipeline(name, version, agents, **fields)


def line(*names: str, **fields) -> Pipeline:
    """Agents one after another."""
    previous = (None, *names)
    return pipeline(
        *(agent(name, *([before] if before else []), **fields) for before, name in zip(previous, names, strict=False))
    )


def diamond(**fields) -> Pipeline:
    """a, then b and c, then d."""
    return pipeline(
        agent("a", **fields),
        agent("b", "a", **fields),
        agent("c", "a", **fields),
        agent("d", "b", "c", reads=("a", "b", "c"), **fields),
    )


ONE_TRY = RetryPolicy(max_attempts=1)
