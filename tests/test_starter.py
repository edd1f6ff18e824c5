"""Starter skills, and what is written beside a lone skill file."""

import ast
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import yaml

from app.errors import InvalidFile, Misuse, NotPossible
from app.pipelines import expressions, loader, plan, starter
from app.settings import MODEL_ALIASES

TWIN = Path(__file__).parent / "data/article/multi-agent-orchestration.skill.yaml"

SKILL = """\
name: demo
version: 1.0.0
agents:
  - {id: first, model: claude-opus-5-5, output_schema: one}
  - id: second
    depends_on: [first]
    handler: handlers:do_it
    output_schema: two
    gate: GATE
    idempotency_key: "{{input.day}}:{{first.ref.id}}"
"""


def check(path):
    return loader.check(path, aliases=MODEL_ALIASES, handler_modules=())


def complete(path):
    return starter.complete(path, aliases=MODEL_ALIASES, handler_modules=())


def replies(folder):
    """What the simulator's script answers, by the agent's position."""
    return [rule["reply"] for rule in yaml.safe_load((folder / "simulator.yaml").read_text())["rules"]]


def test_a_starter_skill_audits_clean(tmp_path):
    """`create` writes three agents with all that belongs to them, and not one fault."""
    written = starter.create(tmp_path / "new/folder", "my-skill")
    assert written[0] == tmp_path / "new/folder/my-skill.skill.yaml"
    checked = check(written[0])
    assert checked.faults == ()
    assert checked.pipeline.name == "my-skill"
    assert plan.render(checked.pipeline) == "chain(writer, checker, publisher)"


def test_a_starters_scripted_answers_fit_its_schemas_and_gates(tmp_path):
    """So it runs to its end against the simulator."""
    path = starter.create(tmp_path, "x")[0]
    agents = check(path).pipeline.agents
    outputs = dict(zip(("writer", "checker"), replies(tmp_path), strict=True))
    for agent in agents[:2]:
        jsonschema.validate(outputs[agent.id], agent.schema)
    assert all(expressions.parse(agent.gate).evaluate(outputs).held for agent in agents[1:])


@pytest.mark.parametrize("name", ["", "a b", "../x", "é", "x" * 200])
def test_a_bad_name_is_refused(tmp_path, name):
    """A name that could be a path or break the file is misuse."""
    with pytest.raises(Misuse):
        starter.create(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    """`create` refuses a folder that holds one of its files, before it writes any."""
    (tmp_path / "handlers.py").write_text("mine")
    with pytest.raises(NotPossible, match=r"handlers\.py exists already"):
        starter.create(tmp_path, "x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["handlers.py"]


def test_what_cannot_be_written_is_one_sentence(tmp_path):
    """A file where a folder must be is told, not raised."""
    (tmp_path / "prompts").write_text("")
    with pytest.raises(NotPossible, match="cannot be written"):
        starter.create(tmp_path, "x")


def test_the_articles_lone_file_is_completed(tmp_path):
    """Afterwards only warnings are left, each gate holds of the scripted answers, and the deployer does nothing."""
    path = Path(shutil.copy(TWIN, tmp_path))
    written = {file.relative_to(tmp_path).as_posix() for file in complete(path)}
    assert written == {
        *(f"prompts/{agent}.md" for agent in ("researcher", "coder", "reviewer")),
        *(f"schemas/{name}.json" for name in ("research_result", "code_diff", "review_result")),
        "handlers.py",
        "simulator.yaml",
    }
    checked = check(path)
    assert {fault.severity for fault in checked.faults} == {"warning"}
    outputs = dict(zip(("researcher", "coder", "reviewer"), replies(tmp_path), strict=True))
    for agent in checked.pipeline.agents[:3]:
        jsonschema.validate(outputs[agent.id], agent.schema)
    for agent in checked.pipeline.agents[2:]:
        assert expressions.parse(agent.gate).evaluate(outputs).held
    confidence = json.loads((tmp_path / "schemas/code_diff.json").read_text())["properties"]["confidence"]
    assert (confidence["type"], confidence["minimum"], confidence["maximum"]) == ("number", 0, 1)
    stub = next(
        node for node in ast.parse((tmp_path / "handlers.py").read_text()).body if isinstance(node, ast.FunctionDef)
    )
    assert ast.unparse(stub.body[-1]) == "return {}"
    assert complete(path) == ()


def test_each_scripted_answer_is_found_by_its_own_prompt(tmp_path):
    """A rule's pattern matches the system part of its agent, and of no other."""
    from app.simulator import script

    path = Path(shutil.copy(TWIN, tmp_path))
    complete(path)
    rules = script.load(tmp_path / "simulator.yaml").rules
    for index, agent in enumerate(check(path).pipeline.agents[:3]):
        found = [bool(rule.match.system.search(agent.prompt.system)) for rule in rules]
        assert found == [position == index for position in range(3)]


GATES = [
    ("'{{first.score}} > 10'", 11),
    ("'{{first.score}} <= 0.2'", 0.2),
    ("'{{first.score}} == false'", False),
    ("'not {{first.score}}'", False),
    ("\"{{first.score}} in ['low', 'high']\"", "low"),
    ("\"'urgent' in {{first.score}}\"", "urgent"),
    ("'{{first.score}} >= 0.85 and {{first.other}} == true'", 1),
]


@pytest.mark.parametrize(("gate", "value"), GATES, ids=[case[0] for case in GATES])
def test_a_schema_that_is_made_up_lets_the_gates_hold(tmp_path, gate, value):
    """The type of a field, and its example, follow from the gates that read it; keys and nested fields are there too."""
    path = tmp_path / "demo.skill.yaml"
    path.write_text(SKILL.replace("GATE", gate))
    complete(path)
    checked = check(path)
    assert checked.faults == ()
    first, second = checked.pipeline.agents
    assert first.schema["properties"]["score"]["examples"] == [value]
    assert first.schema["properties"]["ref"]["properties"]["id"] == {"type": "string"}
    reply = replies(tmp_path)[0]
    jsonschema.validate(reply, first.schema)
    assert expressions.parse(second.gate).evaluate({"first": reply}).held
    namespace = {}
    exec((tmp_path / "handlers.py").read_text(), namespace)
    ctx = SimpleNamespace(log=SimpleNamespace(info=lambda message: None))
    jsonschema.validate(namespace["do_it"](ctx), second.schema)


def test_what_exists_is_left_alone(tmp_path):
    """A prompt, a schema or handlers that the author wrote stay, and what their prompt reads enters a new schema."""
    path = tmp_path / "demo.skill.yaml"
    path.write_text(
        SKILL.replace("GATE", "'{{first.score}} > 0.5'").replace(
            "version: 1.0.0", "version: 1.0.0\ninput_schema: given"
        )
    )
    (tmp_path / "prompts").mkdir()
    prompt = tmp_path / "prompts/first.md"
    prompt.write_text("# System\n\nI am (mine).\n\n# User\n\n{{input.topic}}\n")
    (tmp_path / "handlers.py").write_text("from os import getcwd as do_it\n")
    before = prompt.read_text()
    written = {file.relative_to(tmp_path).as_posix() for file in complete(path)}
    assert written == {"schemas/one.json", "schemas/two.json", "schemas/given.json", "simulator.yaml"}
    assert prompt.read_text() == before
    assert check(path).faults == ()
    assert check(path).pipeline.input_schema["required"] == ["topic", "day"]
    assert (
        yaml.safe_load((tmp_path / "simulator.yaml").read_text())["rules"][0]["match"]["system"] == r"I am \(mine\)\."
    )


def test_a_faulty_file_is_not_completed(tmp_path):
    """Nothing is written beside a file that has faults of its own."""
    path = tmp_path / "demo.skill.yaml"
    path.write_text(SKILL.replace("GATE", "'{{first.score}} >'"))
    with pytest.raises(InvalidFile):
        complete(path)
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_written_outside_the_folder(tmp_path):
    """A prompts folder that is a link out of the skill's folder is refused; a broken link is not followed."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    path = Path(shutil.copy(TWIN, inside))
    (inside / "handlers.py").symlink_to(outside / "handlers.py")
    (inside / "prompts").symlink_to(outside)
    with pytest.raises(NotPossible, match="leads out of the skill's folder"):
        complete(path)
    assert list(outside.iterdir()) == []


def test_a_gate_with_many_references_does_not_search_for_ever(tmp_path):
    """Where no values are found soon, the schema has plain fields."""
    names = [f"f{n}" for n in range(10)]
    gate = " and ".join(f"{{{{first.{name}}}}} == {random.randrange(100)}" for name in names)
    path = tmp_path / "demo.skill.yaml"
    path.write_text(SKILL.replace("GATE", json.dumps(gate)))
    complete(path)
    assert check(path).faults == ()
