"""Findings of the audit that an author accepts, each with a reason: the list `suppress` of a skill file."""

from collections.abc import Collection
from dataclasses import dataclass

from app.pipelines import limits, names
from app.pipelines.report import nearest
from app.pipelines.sections import Section

FIELDS = ("rule", "agent", "reason")


@dataclass(frozen=True, slots=True)
class Suppression:
    """A rule of the audit whose findings are accepted, of one agent or of the whole file, and why. No part of a run."""

    rule: str
    reason: str
    section: Section
    agent: str | None = None


def read(top: Section, drafts: Collection[str]) -> tuple[Suppression, ...]:
    """What the list `suppress` says. One without a reason, or of no known rule or agent, is a fault."""
    found = []
    for section in top.sections("suppress", FIELDS, limits.SUPPRESSIONS_MAX_COUNT):
        section.require("rule")
        section.require("reason")
        rule = section.choice("rule", names.AUDIT_RULES)
        agent = section.name("agent", names.AGENT_ID)
        reason = section.text("reason", limits.REASON_MAX_CHARS)
        if agent is not None and agent not in drafts:
            section.error("agent", f"{agent!r} is no agent.{nearest(agent, drafts)}")
        if reason is not None and not reason.strip():
            section.error("reason", "the reason is empty: say why this finding is accepted.")
        elif rule and reason:
            found.append(Suppression(rule, reason.strip(), section, agent))
    return tuple(found)
