"""docs/skill-files.md is the loader's: the same fields, defaults and limits, and examples that load."""

import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import pytest
from skills import check

from app.pipelines import definition, dependencies, limits, names, starter, suppressions
from app.pipelines.model import (
    Agent,
    Backoff,
    Checkpointing,
    Consistency,
    Dependency,
    FailureMode,
    OnRefused,
    OnStale,
    Pipeline,
    RetryPolicy,
    Tracing,
)
from app.settings import MODEL_ALIASES

TEXT = (Path(__file__).parent.parent / "docs/skill-files.md").read_text()
# Heading -> what the loader reads there, and what it becomes.
TABLES = {
    "## The file": (definition.TOP_FIELDS, Pipeline),
    "## An agent": (definition.AGENT_FIELDS, Agent),
    "### retry_policy": (definition.RETRY_FIELDS, RetryPolicy),
    "### depends_on": (dependencies.FIELDS, Dependency),
    "### on_refused": (definition.ON_REFUSED_FIELDS, OnRefused),
    "### tracing": (definition.TRACING_FIELDS, Tracing),
    "### checkpointing": (definition.CHECKPOINTING_FIELDS, Checkpointing),
    "### suppress": (suppressions.FIELDS, suppressions.Suppression),
}
RANGES = {
    "agents": (1, limits.AGENTS_MAX_COUNT),
    "deadline_ms": limits.DEADLINE_MS,
    "timeout_ms": limits.TIMEOUT_MS,
    "approval_timeout_ms": limits.APPROVAL_TIMEOUT_MS,
    "max_tokens": limits.OUTPUT_TOKENS,
    "max_attempts": limits.ATTEMPTS_COUNT,
    "initial_ms": limits.RETRY_DELAY_MS,
    "max_ms": limits.RETRY_DELAY_MS,
    "jitter": limits.JITTER_SHARE,
    "max_worker_losses": limits.WORKER_LOSSES_COUNT,
    "max_rounds": limits.ROUNDS_COUNT,
    "max_staleness_ms": limits.STALENESS_MS,
    "ttl_minutes": limits.TTL_MINUTES,
}
CHOICES = {
    "failure_mode": FailureMode,
    "backoff": Backoff,
    "consistency": Consistency,
    "on_stale": OnStale,
    "effort": names.EFFORTS,
    "provider": names.TRACING_PROVIDERS,
    "store": names.CHECKPOINT_STORES,
}


def rows(heading):
    """The table below a heading: field -> (type, default, meaning)."""
    section = re.split(r"\n##+ ", TEXT.partition(f"\n{heading}\n")[2])[0]
    found = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) ?\|$", section, re.MULTILINE)
    return {name: tuple(cells) for name, *cells in found}


def shown(field):
    """A default of the model, as the document writes it."""
    if field.default is MISSING and field.default_factory is MISSING:
        return "required"
    value = field.default_factory() if field.default is MISSING else field.default
    if is_dataclass(value):
        return "see below"
    if value is None or value == "":
        return "none"
    return "`[]`" if value == () else f"`{str(value).lower() if isinstance(value, bool) else value}`"


@pytest.mark.parametrize("heading", TABLES)
def test_each_field_stands_there_with_the_models_default(heading):
    """No field of the loader is missing, none is made up, and the defaults are those of model.py."""
    known, model = TABLES[heading]
    defaults = {field.name: shown(field) for field in fields(model) if field.name in known}
    if "suppress" in known:
        defaults["suppress"] = "`[]`"  # read by the audit, and no part of a pipeline
    assert {name: default for name, (_, default, _) in rows(heading).items()} == defaults
    assert defaults.keys() == set(known)


def test_limits_and_choices_are_the_loaders():
    """A range is written as `low to high`; a choice names every value."""
    documented = {name: cells for heading in TABLES for name, cells in rows(heading).items()}
    for name, (low, high) in RANGES.items():
        assert f"{low} to {high}" in " ".join(documented[name]), name
    for name, values in CHOICES.items():
        assert re.findall(r"`(\w+)`", documented[name][0]) == [str(value) for value in values], name


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", blocks("yaml"), ids=lambda text: text.split("\n")[0])
def test_each_example_loads(tmp_path, text):
    """With what `stepfast new --from` writes beside it, an example has not one fault."""
    path = tmp_path / "example.skill.yaml"
    path.write_text(text)
    starter.complete(path, aliases=MODEL_ALIASES, handler_modules=())
    assert check(path).faults == ()


def test_first_example_fits_what_is_shown_beside_it(tmp_path):
    """Its prompt, its schema and its handler are those of the document."""
    (tmp_path / "prompts").mkdir()
    (tmp_path / "schemas").mkdir()
    (tmp_path / "greeting.skill.yaml").write_text(blocks("yaml")[0])
    (tmp_path / "prompts/writer.md").write_text(blocks("markdown")[0])
    (tmp_path / "schemas/draft.json").write_text(blocks("json")[0])
    (tmp_path / "schemas/person.json").write_text(
        '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}'
    )
    (tmp_path / "handlers.py").write_text(blocks("python")[0])
    assert check(tmp_path).faults == ()
