"""The audit of a skill file: the loader's faults and the checklist's findings, in one list. It runs nothing.

A finding that the file's `suppress` accepts stays in the list, with the reason. An error cannot be accepted.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

from app.errors import Fault
from app.pipelines import handler_source, loader
from app.pipelines.audit_checks import Subject
from app.pipelines.audit_rules import CHECKLIST, RULES, SKILL_FILE, UNUSED, Severity
from app.pipelines.definition import Definition
from app.pipelines.model import Pipeline
from app.pipelines.report import Place
from app.pipelines.suppressions import Suppression

_RANK = {"error": 2, "warning": 1, "note": 0}


@dataclass(frozen=True, slots=True)
class Finding:
    """`line` and `column` count from 1, and are 0 where the whole file is meant. `suppressed` is the reason."""

    file: str
    line: int
    column: int
    rule: str
    severity: Severity
    agent: str | None
    message: str
    suppressed: str | None = None

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        accepted = f" (accepted: {self.suppressed})" if self.suppressed else ""
        return f"{place}: {self.severity}: {self.message} [{self.rule}]{accepted}"


@dataclass(frozen=True, slots=True)
class Audit:
    """`pipeline` is None where a finding is an error of the file."""

    file: Path
    pipeline: Pipeline | None
    findings: tuple[Finding, ...]

    def failing(self, least: Severity) -> int:
        """How many findings are at least so severe, and not accepted."""
        return sum(not found.suppressed and _RANK[found.severity] >= _RANK[least] for found in self.findings)

    @property
    def rules(self) -> tuple[str, ...]:
        """The rules that were broken and not accepted, in the checklist's order."""
        broken = {found.rule for found in self.findings if not found.suppressed}
        return tuple(rule for rule in RULES if rule in broken)


def audit(path: Path, *, aliases: Mapping[str, str], handler_modules: Collection[str]) -> Audit:
    """Everything that is to be said of a skill file and what lies beside it."""
    file = loader.find(path)
    checked = loader.check(file, aliases=aliases, handler_modules=handler_modules)
    findings = [_of_fault(fault, file, checked.definition) for fault in checked.faults]
    accepted: tuple[Suppression, ...] = ()
    if checked.definition:
        findings += _of_checklist(file, checked.definition, checked.pipeline)
        accepted = checked.definition.accepted
    findings = [_judged(finding, accepted) for finding in findings]
    findings += [_unused(entry, file) for entry in accepted if not _is_used(entry, findings)]
    order = attrgetter("file", "line", "column", "rule", "message")
    return Audit(file, checked.pipeline, tuple(sorted(set(findings), key=order)))


def _of_checklist(file: Path, definition: Definition, pipeline: Pipeline | None) -> Iterator[Finding]:
    agents = [draft.agent for draft in definition.drafts]
    read = handler_source.Reader(file.parent).read
    sources = {agent.id: read(agent.handler) for agent in agents if agent.handler}
    subject = Subject(definition, pipeline, sources)
    for rule in CHECKLIST.values():
        for found in rule.check(subject) if rule.check else ():
            yield Finding(str(found.file or file), *found.place, rule.id, rule.severity, found.agent, found.message)


def _of_fault(fault: Fault, file: Path, definition: Definition | None) -> Finding:
    agent = None
    if definition and fault.rule and Path(fault.file) == file:
        agent = _agent_at(definition, (fault.line, fault.column))
    rule = fault.rule or SKILL_FILE.id
    return Finding(fault.file, fault.line, fault.column, rule, fault.severity, agent, fault.message)


def _agent_at(definition: Definition, place: Place) -> str | None:
    """The agent in whose part of the file a place is."""
    before = [(draft.section.begins, draft.agent.id) for draft in definition.drafts if draft.section.begins <= place]
    return max(before)[1] if before else None


def _judged(finding: Finding, accepted: tuple[Suppression, ...]) -> Finding:
    reason = next((entry.reason for entry in accepted if _accepts(entry, finding)), None)
    return replace(finding, suppressed=reason)


def _accepts(entry: Suppression, finding: Finding) -> bool:
    return finding.severity != "error" and entry.rule == finding.rule and entry.agent in {None, finding.agent}


def _is_used(entry: Suppression, findings: Collection[Finding]) -> bool:
    return any(_accepts(entry, finding) for finding in findings)


def _unused(entry: Suppression, file: Path) -> Finding:
    of = f" of {entry.agent}" if entry.agent else ""
    message = f"no finding of {entry.rule}{of} is there to be accepted."
    return Finding(str(file), *entry.section.place("rule"), UNUSED.id, UNUSED.severity, entry.agent, message)
