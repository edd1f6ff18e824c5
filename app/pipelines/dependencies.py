"""Reads `depends_on`: what an agent depends on, and with which consistency."""

from collections.abc import Iterable, Mapping

from app.pipelines import limits, names, plan
from app.pipelines.model import Agent, Consistency, Dependency, OnStale
from app.pipelines.sections import Section
from app.pipelines.yaml_source import Scalar

FIELDS = ("agent", "consistency", "max_staleness_ms", "on_stale")


def entries(agent: Section) -> tuple[tuple[Scalar, Section | None], ...]:
    """Each dependency's name with its place, and the map that declares its consistency, if one does."""
    return agent.names_or_sections("depends_on", names.AGENT_ID, "agent", FIELDS, limits.AGENTS_MAX_COUNT)


def read(agent: Section) -> tuple[tuple[str, ...], tuple[Dependency, ...]]:
    """The fields `depends_on` and `declared` of an agent; faults for what does not go together."""
    found = entries(agent)
    declared = {name.text: _declared(name.text, section) for name, section in found if section}
    return tuple(dict.fromkeys(name.text for name, _ in found)), tuple(declared.values())


def _declared(name: str, section: Section) -> Dependency:
    chosen = section.choice("consistency", tuple(Consistency))
    max_ms = section.integer("max_staleness_ms", limits.STALENESS_MS)
    on_stale = section.choice("on_stale", tuple(OnStale))
    if chosen == Consistency.SNAPSHOT:
        section.require("max_staleness_ms")
        return Dependency(name, Consistency.SNAPSHOT, max_ms, OnStale(on_stale or OnStale.RERUN))
    for key in ("max_staleness_ms", "on_stale"):
        if key in section and ("consistency" not in section or chosen):
            section.error(key, f"{key} belongs to consistency: snapshot; a strong dependency is never stale.")
    return Dependency(name)


def check(agents: Mapping[str, tuple[Agent, Section]]) -> None:
    """Reports what a stale snapshot would have done again, and may not be."""
    depends_on = {name: agent.depends_on for name, (agent, _) in agents.items()}
    strong = strong_only(agent for agent, _ in agents.values())
    for name, (agent, section) in agents.items():
        for item, given in entries(section):
            entry = agent.snapshots.get(item.text)
            if given is None or entry is None or entry.on_stale != OnStale.RERUN or item.text not in agents:
                continue
            # What depends on this agent has not begun when it is claimed.
            again = [other for other in agents if item.text in (other, *plan.ancestors(strong, other))]
            begun = [other for other in again if name not in (other, *plan.ancestors(depends_on, other))]
            kept = [other for other in begun if not agents[other][0].repeatable]
            if kept:
                given.error(
                    "on_stale",
                    f"{' and '.join(kept)} would be done again with {item.text}, and is a handler that may not be: "
                    "give it idempotent: true, or say on_stale: fail or accept.",
                )


def strong_only(agents: Iterable[Agent]) -> dict[str, tuple[str, ...]]:
    """What each agent depends on strongly: whatever is done again, it is done again with it."""
    return {agent.id: agent.strong for agent in agents}
