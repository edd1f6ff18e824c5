"""What the loader's tests share: a small skill, and what is said of it."""

import json
from pathlib import Path

from app.pipelines import loader
from app.settings import MODEL_ALIASES

ROOT = Path(__file__).parent.parent
TWIN = ROOT / "tests/data/article/multi-agent-orchestration.skill.yaml"
ARTICLE = ROOT.parent / "shared/seed/multi-agent-orchestration.skill.yaml"

SKILL = """\
name: demo
version: 1.0
agents:
  - id: first
    model: claude-sonnet-5-5
    output_schema: one
  - id: second
    depends_on: [first]
    gate: "{{first.score}} > 0.5"
"""
SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "number"}, "note": {"type": "string"}},
    "required": ["score"],
    "additionalProperties": False,
}
PROMPT = "# System\n\nYou score.\n\n# User\n\nScore {{input.text}}.\n"
HANDLERS = "def second(ctx):\n    return {}\n"


def write(folder, text=SKILL, *, schema=SCHEMA, prompt=PROMPT, handlers=HANDLERS):
    for name in ("prompts", "schemas"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "demo.skill.yaml").write_text(text)
    (folder / "schemas/one.json").write_text(json.dumps(schema))
    (folder / "prompts/first.md").write_text(prompt)
    (folder / "handlers.py").write_text(handlers)
    return folder / "demo.skill.yaml"


def check(path, *, aliases=MODEL_ALIASES, handler_modules=("shop",)):
    return loader.check(path, aliases=aliases, handler_modules=handler_modules)


def lines(path, **options):
    """Each fault as `line:column severity message`, with its file where it is another one."""
    found = []
    for fault in check(path, **options).faults:
        other = "" if Path(fault.file) == path else Path(fault.file).name + ":"
        found.append(f"{other}{fault.line}:{fault.column} {fault.severity} {fault.message}")
    return found
