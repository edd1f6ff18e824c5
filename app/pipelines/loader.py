"""From a skill file and what lies beside it to a checked definition.

`check` reports every fault at once; `load` refuses the file if it has any.

    <name>.skill.yaml
    prompts/<agent>.md         for each agent with a model; `prompts.py` says how it is written
    schemas/<name>.json        for each output_schema, and the input_schema
    handlers.py                a function named after each agent without a model

What would fail, or do harm, only in a bad night is refused here, as an error and never a warning:

- An agent whose failure mode is `continue` may end without an output. No gate, idempotency key, prompt or `state_input`
  downstream may name that output. `key_inputs` may: there it counts as null. A model that depends on the agent is given
  null in its place, and a handler finds no entry in `ctx.inputs`. A skipped agent leaves no such gap, since everything
  that depends on it, at any distance, is skipped too.
- A review loop (`on_refused`) does `rerun`, an ancestor, and everything that depends on it again. Whatever of that may
  have begun when the gate refuses, before the gate or on a branch beside it, has a model or is a handler with
  `idempotent: true`. The gate reads the output of one of them: otherwise it would only refuse again.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from app.errors import Fault, InvalidFile
from app.pipelines import assembly, definition, files, limits, yaml_source
from app.pipelines.definition import Allowed, Definition
from app.pipelines.model import Pipeline
from app.pipelines.report import WHOLE_FILE, Report, Unreadable

SUFFIXES = (".skill.yaml", ".skill.yml")


@dataclass(frozen=True, slots=True)
class Checked:
    """`pipeline` is None where a fault is an error; `definition` is what the file alone says, as far as it is read."""

    pipeline: Pipeline | None
    faults: tuple[Fault, ...]
    definition: Definition | None


def load(path: Path, *, aliases: Mapping[str, str], handler_modules: Collection[str]) -> Pipeline:
    """The pipeline of a skill file, or of the folder that holds it. Raises InvalidFile with every fault."""
    checked = check(path, aliases=aliases, handler_modules=handler_modules)
    if checked.pipeline is None:
        raise invalid(path, checked.faults)
    return checked.pipeline


def check(path: Path, *, aliases: Mapping[str, str], handler_modules: Collection[str]) -> Checked:
    """Everything that is wrong with a skill file and what lies beside it."""
    report = Report()
    file = find(path)
    read = read_definition(report, file, Allowed(aliases, handler_modules))
    pipeline = assembly.assemble(report, file, read) if read else None
    return Checked(None if report.has_errors else pipeline, report.faults, read)


def invalid(path: Path, faults: tuple[Fault, ...]) -> InvalidFile:
    """The error that carries the faults of a file."""
    errors = [fault for fault in faults if fault.severity == "error"]
    count = "a fault" if len(errors) == 1 else f"{len(errors)} faults"
    return InvalidFile(f"{path} has {count}: {errors[0]}", next_step=f"stepfast audit {path} shows all.", faults=faults)


def find(path: Path) -> Path:
    """The skill file itself: a folder stands for the only one in it."""
    try:
        found = [entry for entry in path.iterdir() if entry.name.endswith(SUFFIXES)] if path.is_dir() else []
    except OSError:  # reading it says why
        return path
    return found[0] if len(found) == 1 else path


def read_definition(report: Report, file: Path, allowed: Allowed) -> Definition | None:
    """What the skill file alone says; None, with a fault, where it cannot be read."""
    try:
        if file.is_dir():
            raise Unreadable(WHOLE_FILE, f"is a folder without exactly one file named *{SUFFIXES[0]}.")
        if not file.exists():
            raise Unreadable(WHOLE_FILE, "does not exist.")
        node = yaml_source.parse(files.read(file, limits.FILE_MAX_BYTES))
    except Unreadable as error:
        report.error(file, error.place, f"the file {error}")
        return None
    except OSError as error:
        report.error(file, WHOLE_FILE, f"the file cannot be read: {error.strerror}.")
        return None
    return definition.read(report, file, node, allowed)
