"""The bundled example: the article's pipeline in our own words, and what the simulator answers to it."""

import re
from pathlib import Path

import jsonschema
import yaml

from app.agents import handlers
from app.cli.sample_repository import make_repository, run_input
from app.pipelines import loader
from app.settings import MODEL_ALIASES, Settings
from app.simulator import script

EXAMPLE = Path(__file__).parent.parent / "examples" / "bugfix"


def test_the_repository_is_the_same_everywhere(tmp_path):
    """One commit with a fixed id, so that a recorded run names what anybody can make again; its input fits the schema."""
    make_repository(EXAMPLE / "repository", tmp_path / "repo")
    given = run_input(tmp_path / "repo")

    jsonschema.validate(given, loader.load(EXAMPLE, aliases=MODEL_ALIASES, handler_modules=()).input_schema)
    assert given["base_commit"] == "9cfbcd7d216fc776f14f012ec20badc934065a90"
    assert given["files"].keys() == {"README.md", "paging.py", "test_paging.py"}


def test_it_has_the_articles_agents_fields_and_values():
    """The bundled twin differs from the article's in its name, description, input schema, and what it accepts of the audit."""
    twin = yaml.safe_load((EXAMPLE / "bugfix.skill.yaml").read_text())

    assert (twin["name"], twin["version"]) == ("bugfix", "1.0.0")
    assert set(twin) == {
        "name",
        "version",
        "description",
        "input_schema",
        "agents",
        "tracing",
        "checkpointing",
        "suppress",
    }
    assert twin["agents"] == [
        {
            "id": "researcher",
            "model": "claude-3-5-sonnet",
            "timeout_ms": 30000,
            "retry_policy": {"max_attempts": 3, "backoff": "exponential"},
            "failure_mode": "halt_pipeline",
            "output_schema": "research_result",
        },
        {
            "id": "coder",
            "model": "claude-3-5-sonnet",
            "depends_on": ["researcher"],
            "timeout_ms": 60000,
            "idempotent": True,
            "idempotency_key": "{{task_id}}:coder",
            "state_input": "research_result",
            "failure_mode": "halt_pipeline",
            "output_schema": "code_diff",
        },
        {
            "id": "reviewer",
            "model": "claude-3-opus",
            "depends_on": ["coder"],
            "timeout_ms": 45000,
            "gate": "{{coder.confidence}} >= 0.85",
            "failure_mode": "halt_pipeline",
            "output_schema": "review_result",
        },
        {
            "id": "deployer",
            "depends_on": ["reviewer"],
            "gate": "{{reviewer.approved}} == true",
            "requires_human_approval": False,
            "failure_mode": "halt_pipeline",
        },
    ]
    assert twin["tracing"] == {"enabled": True, "provider": "langfuse", "log_inputs": True, "log_outputs": True}
    assert twin["checkpointing"] == {"enabled": True, "store": "redis", "ttl_minutes": 60}


def test_it_loads_and_warns_only_of_retired_models():
    """The article's own values are accepted, each with one sentence where something else runs in its place."""
    checked = loader.check(EXAMPLE, aliases=MODEL_ALIASES, handler_modules=())

    assert checked.pipeline is not None
    assert {fault.severity for fault in checked.faults} == {"warning"}
    assert sum("retired" in fault.message for fault in checked.faults) == 3
    assert len(checked.faults) == 3


def test_the_simulator_answers_each_model_with_what_its_schema_wants():
    """One rule of the script fits each agent's system prompt, and no other agent's."""
    pipeline = loader.load(EXAMPLE, aliases=MODEL_ALIASES, handler_modules=())
    rules = script.load(EXAMPLE / "simulator.yaml").rules
    agents = [agent for agent in pipeline.agents if agent.model]

    assert len(rules) == len(agents)
    for rule, agent in zip(rules, agents, strict=True):
        assert [other.id for other in agents if re.search(rule.match.system, other.prompt.system)] == [agent.id]
        jsonschema.validate(rule.reply, agent.schema)


def test_its_handler_is_found_beside_the_skill_file_and_may_be_repeated():
    """The bundled deployer declares that its effects stand in ctx.once, so a dead worker leaves no riddle."""
    agent = loader.load(EXAMPLE, aliases=MODEL_ALIASES, handler_modules=()).by_id["deployer"]

    handler = handlers.find("bugfix", agent, Settings(skills=(EXAMPLE.parent,)))

    assert handler is not None
    assert handler.repeatable
