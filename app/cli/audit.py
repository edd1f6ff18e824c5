"""`stepfast audit`."""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import click

from app import settings
from app.cli import audit_run, embedding, output, system
from app.errors import InvalidFile, Misuse

if TYPE_CHECKING:
    from app.pipelines.audit import Audit


@click.command()
@click.argument("skill", type=click.Path(path_type=Path), required=False)
@click.option("--run", "run", metavar="RUN", help="Ask the checklist of what happened in a run, instead of a file.")
@embedding.option
@click.option(
    "--format",
    "shape",
    type=click.Choice(["text", "json", "markdown", "sarif"]),
    default="text",
    show_default=True,
    help="markdown is for a review's comment, sarif (2.1.0) for code scanning.",
)
@click.option(
    "--fail-on",
    type=click.Choice(["warning", "error"]),
    default="error",
    show_default=True,
    help="Exit with 2 from this severity on; what the file accepts does not count.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="As --format json: {skill, ok, name, version, hash, canvas, findings: "
    "[{rule, severity, agent, file, line, column, message, fix, suppressed}]}; "
    "with --run {run, ok, promises: [{rule, verdict, evidence}]}.",
)
def command(skill: Path | None, run: str | None, embedded: bool, shape: str, fail_on: str, as_json: bool) -> int:
    """Check a skill file and what lies beside it, by a distributed system's checklist. Needs no database and no key.

    Reports everything at once, each with its file, line, column and rule; then prints the canvas that the file compiles
    to. The rules, and how a file accepts a finding, are in docs/audit.md. Handlers are read, and never run.

    With --run (the beginning of a run's id, or `last`) each rule is kept, broken or not applicable, by what is recorded
    of the run; exit 1 where one is broken.
    """
    if run is not None:
        if skill is not None or shape not in {"text", "json"}:
            raise Misuse("--run goes without a SKILL, as text or JSON.", next_step="See: stepfast audit --help")
        return audit_run.show(run, embedded=embedded, as_json=as_json or shape == "json")
    if skill is None or embedded:
        raise Misuse("Name a SKILL, or --run RUN, to which --embedded belongs.", next_step="See: stepfast audit --help")
    from app.cli import audit_formats
    from app.pipelines.audit import audit

    configured = settings.load()
    found = audit(skill, aliases=configured.model_aliases, handler_modules=configured.handler_modules)
    match "json" if as_json else shape:
        case "json":
            output.print_json(_document(found))
        case "markdown":
            print(audit_formats.markdown(found))
        case "sarif":
            print(audit_formats.sarif(found))
        case _:
            _print_text(found)
    return InvalidFile.exit_code if found.failing("warning" if fail_on == "warning" else "error") else 0


def _document(audit: "Audit") -> dict[str, object]:
    from app.cli import audit_formats
    from app.pipelines import plan

    pipeline = audit.pipeline
    return {
        "skill": str(audit.file),
        "ok": pipeline is not None,
        "name": pipeline.name if pipeline else None,
        "version": pipeline.version if pipeline else None,
        "hash": pipeline.hash if pipeline else None,
        "canvas": plan.render(pipeline).splitlines() if pipeline else [],
        "findings": audit_formats.findings(audit),
    }


def _print_text(audit: "Audit") -> None:
    from app.cli import audit_formats
    from app.pipelines import plan

    if audit.findings:
        print(audit_formats.text(audit))
    if audit.pipeline:
        print(f"{audit.pipeline.name} {audit.pipeline.version} is valid. Its canvas:")
        print("\n".join(f"  {line}" for line in plan.render(audit.pipeline).splitlines()))
        output.print_next(system.run_command(audit.file, audit.pipeline))
    else:
        output.print_next(_next_command(audit))


def _next_command(audit: "Audit") -> str:
    """What is missing beside a sound file, `new` writes; anything else the author must mend first."""
    if all(found.message.endswith("is missing.") for found in audit.findings if found.severity == "error"):
        return f"stepfast new --from {quote(str(audit.file))}"
    return f"stepfast audit {quote(str(audit.file))}"
