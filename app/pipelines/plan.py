"""Pure planning: from what depends on what to what is sent.

A linear stretch becomes a chain, several at once a group of chains; a join begins a stretch of its own, sent when its
last dependency completes.
"""

from collections.abc import Collection, Mapping, Sequence

from app.pipelines.model import FailureMode, Pipeline

Dependencies = Mapping[str, Sequence[str]]  # agent id -> ids of the agents that it depends on


def order(depends_on: Dependencies) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """The ids, dependencies first and otherwise as they stand, and the cycles that prevent it.

    A cycle is given as its ids, each depending on the next and the last on the first; the order lacks them.
    Dependencies that are no ids are ignored.
    """
    waiting = {name: {other for other in others if other in depends_on} for name, others in depends_on.items()}
    ordered: list[str] = []
    cycles: list[tuple[str, ...]] = []
    while waiting:
        free = next((name for name, others in waiting.items() if not others), None)
        gone = _cycle(waiting) if free is None else (free,)
        if free is None:
            cycles.append(gone)
        else:
            ordered.append(free)
        for name in gone:
            del waiting[name]
        for others in waiting.values():
            others.difference_update(gone)
    return tuple(ordered), tuple(cycles)


def ancestors(depends_on: Dependencies, agent_id: str) -> frozenset[str]:
    """Everything that an agent depends on, directly or not."""
    found: set[str] = set()
    waiting = [agent_id]
    while waiting:
        new = {other for other in depends_on.get(waiting.pop(), ()) if other in depends_on} - found
        found |= new
        waiting += new
    return frozenset(found)


def dependencies(pipeline: Pipeline) -> Dependencies:
    return {agent.id: agent.depends_on for agent in pipeline.agents}


def stretches(pipeline: Pipeline, ready: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """For each ready agent, in the pipeline's order, the linear stretch that begins with it.

    A stretch goes on while an agent has exactly one dependent, and that dependent exactly one dependency.
    """
    dependents: dict[str, list[str]] = {agent.id: [] for agent in pipeline.agents}
    for agent in pipeline.agents:
        for other in agent.depends_on:
            dependents[other].append(agent.id)
    found = []
    for agent in pipeline.agents:
        if agent.id in ready:
            stretch = [agent.id]
            while len(after := dependents[stretch[-1]]) == 1 and len(pipeline.by_id[after[0]].depends_on) == 1:
                stretch.append(after[0])
            found.append(tuple(stretch))
    return tuple(found)


def render(pipeline: Pipeline) -> str:
    """The canvas as text, a line for each dispatch.

    ```
    chain(plan, fetch)
    group(chain(a, b), c) dispatched when fetch is completed
    docs dispatched when b and c are completed
    ```

    What depends on an agent whose failure mode is `continue` is dispatched when that has ended, however it did.
    """
    starts: dict[tuple[str, ...], list[str]] = {}  # what must be completed -> the agents that then begin a stretch
    covered: set[str] = set()
    for agent in pipeline.agents:
        if agent.id not in covered:
            starts.setdefault(tuple(sorted(agent.depends_on)), []).append(agent.id)
            covered.update(stretches(pipeline, [agent.id])[0])
    lines = []
    for triggers, begun in starts.items():
        canvas = _canvas(stretches(pipeline, begun))
        continued = [name for name in triggers if pipeline.by_id[name].failure_mode == FailureMode.CONTINUE]
        completed = [name for name in triggers if name not in continued]
        conditions = [
            _condition(completed, "is completed", "are completed"),
            _condition(continued, "has ended", "have ended"),
        ]
        when = " and ".join(condition for condition in conditions if condition)
        lines.append(f"{canvas} dispatched when {when}" if when else canvas)
    return "\n".join(lines)


def _canvas(found: Sequence[tuple[str, ...]]) -> str:
    texts = [stretch[0] if len(stretch) == 1 else f"chain({', '.join(stretch)})" for stretch in found]
    return texts[0] if len(texts) == 1 else f"group({', '.join(texts)})"


def _condition(names: Sequence[str], one: str, several: str) -> str:
    if len(names) <= 1:
        return f"{names[0]} {one}" if names else ""
    return f"{', '.join(names[:-1])} and {names[-1]} {several}"


def _cycle(waiting: Mapping[str, Collection[str]]) -> tuple[str, ...]:
    """A cycle among agents that all wait for another one, begun at the earliest of its agents."""
    names = list(waiting)
    path = names[:1]
    while (following := min(waiting[path[-1]], key=names.index)) not in path:
        path.append(following)
    cycle = path[path.index(following) :]
    start = cycle.index(min(cycle, key=names.index))
    return tuple(cycle[start:] + cycle[:start])
