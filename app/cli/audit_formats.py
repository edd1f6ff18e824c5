"""An audit as text, JSON, Markdown and SARIF 2.1.0."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.cli import output
from app.pipelines.audit_rules import RULES

if TYPE_CHECKING:
    from app.pipelines.audit import Audit, Finding

SARIF_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_MARKS = re.compile(r"([\\`*_{}\[\]<>|#])")


def text(audit: "Audit") -> str:
    """A line a finding, then what to do about each broken rule, once."""
    lines = [output.one_line(str(finding)) for finding in audit.findings]
    mended = [rule for rule in audit.rules if rule != "skill-file"]
    if mended:
        lines += ["", "What to do:", *(f"  {rule}: {RULES[rule].fix}" for rule in mended)]
    if audit.findings:
        lines += ["", f"{counted(audit)}."]
    return "\n".join(lines)


def counted(audit: "Audit") -> str:
    """`1 error, 2 warnings, 3 notes, 1 accepted`."""
    counts = []
    for severity in ("error", "warning", "note"):
        count = sum(found.severity == severity and not found.suppressed for found in audit.findings)
        if count:
            counts.append(f"{count} {severity}{'' if count == 1 else 's'}")
    accepted = sum(bool(found.suppressed) for found in audit.findings)
    return ", ".join([*counts, *([f"{accepted} accepted"] if accepted else [])]) or "nothing found"


def findings(audit: "Audit") -> list[dict[str, object]]:
    """Each finding with its rule's mending, as --json lists them."""
    return [
        {
            "rule": found.rule,
            "severity": found.severity,
            "agent": found.agent,
            "file": found.file,
            "line": found.line,
            "column": found.column,
            "message": found.message,
            "fix": RULES[found.rule].fix,
            "suppressed": found.suppressed,
        }
        for found in audit.findings
    ]


def markdown(audit: "Audit") -> str:
    """For a review's comment: a table of what was found, and of what each broken rule is about."""
    named = f"{audit.pipeline.name} {audit.pipeline.version}" if audit.pipeline else audit.file.name
    lines = [f"# Audit of {_plain(named)}", "", f"{counted(audit).capitalize()}.", ""]
    if audit.findings:
        lines += ["| severity | rule | agent | place | finding |", "| --- | --- | --- | --- | --- |"]
        lines += [_row(found) for found in audit.findings]
        lines += ["", "| rule | why | what to do |", "| --- | --- | --- |"]
        lines += [
            f"| `{rule}` | {RULES[rule].why} | {RULES[rule].fix.replace('|', '&#124;')} |" for rule in audit.rules
        ]
    return "\n".join(lines)


def _row(found: "Finding") -> str:
    place = f"{Path(found.file).name}:{found.line}" if found.line else Path(found.file).name
    accepted = f" Accepted: {_plain(found.suppressed)}" if found.suppressed else ""
    severity = "accepted" if found.suppressed else found.severity
    agent = f"`{found.agent}`" if found.agent else ""
    return f"| {severity} | `{found.rule}` | {agent} | {_plain(place)} | {_plain(found.message)}{accepted} |"


def _plain(value: str) -> str:
    """A text in which nothing is markup."""
    return _MARKS.sub(r"\\\1", output.one_line(value)).replace("\\<", "&lt;").replace("\\>", "&gt;")


def sarif(audit: "Audit") -> str:
    """One log of one run. What is accepted is suppressed `inSource`, with its reason."""
    rules = list(RULES.values())
    driver = {
        "name": "stepfast",
        "version": version("stepfast-app"),
        "rules": [
            {
                "id": rule.id,
                "shortDescription": {"text": rule.title},
                "fullDescription": {"text": rule.why},
                "help": {"text": rule.fix},
                "defaultConfiguration": {"level": rule.severity},
            }
            for rule in rules
        ],
    }
    numbers = {rule.id: number for number, rule in enumerate(rules)}
    results = [_result(found, numbers[found.rule]) for found in audit.findings]
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return json.dumps({"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _result(found: "Finding", number: int) -> dict[str, Any]:
    physical: dict[str, Any] = {"artifactLocation": {"uri": _uri(found.file)}}
    if found.line:
        physical["region"] = {"startLine": found.line, "startColumn": max(1, found.column)}
    location: dict[str, Any] = {"physicalLocation": physical}
    if found.agent:
        location["logicalLocations"] = [{"name": found.agent, "kind": "member"}]
    suppressions = [{"kind": "inSource", "justification": output.clean(found.suppressed)}] if found.suppressed else []
    return {
        "ruleId": found.rule,
        "ruleIndex": number,
        "level": found.severity,
        "message": {"text": output.clean(found.message)},
        "locations": [location],
        "suppressions": suppressions,
    }


def _uri(file: str) -> str:
    """Relative to the working folder where it lies in it, as code hosts want it."""
    from urllib.parse import quote

    path = Path(file).resolve()
    here = Path.cwd()
    return quote(path.relative_to(here).as_posix()) if path.is_relative_to(here) else path.as_uri()
