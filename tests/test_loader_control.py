"""What a skill file says of failures, review loops, people, keys and order: what loads, and what is refused where."""

import json

import pytest
from skills import PROMPT, SCHEMA, check, lines, write

from app.pipelines.model import FailureMode, OnRefused, Pipeline

# A coder, a tester beside it, a reviewer that may send the coder back, and a deployer.
SKILL = """\
name: demo
version: 1.0
input_schema: given
concurrency_key: "{{input.repo}}/main"
deadline_ms: 3600000
agents:
  - {id: coder, model: claude-sonnet-5-5, output_schema: one}
  - {id: linter, depends_on: [coder], handler: 'shop:lint', idempotent: true, failure_mode: continue, output_schema: one}
  - id: reviewer
    model: claude-sonnet-5-5
    depends_on: [coder, linter]
    output_schema: one
    failure_mode: skip_dependents
    gate: "{{coder.score}} > 0.5"
    on_refused: {rerun: coder, max_rounds: 2}
  - id: deployer
    depends_on: [reviewer]
    handler: shop:deploy
    requires_human_approval: true
    approval_timeout_ms: 86400000
    idempotency_key: "{{input.repo}}"
    key_inputs: [input.branch.name, coder.score, linter.score]
"""
GIVEN = {
    "type": "object",
    "properties": {
        "repo": {"type": "string"},
        "branch": {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
        "ticket": {"type": "string"},
    },
    "required": ["repo", "branch"],
}


def skill(folder, text=SKILL, **prompts):
    path = write(folder, text, prompt=PROMPT)
    (folder / "schemas/given.json").write_text(json.dumps(GIVEN))
    (folder / "schemas/two.json").write_text(json.dumps(SCHEMA))
    for name in ("coder", "reviewer"):
        prompt = prompts.get(name, "Do your part.")
        (folder / f"prompts/{name}.md").write_text(f"# System\n\nYou are good.\n\n# User\n\n{prompt}\n")
    return path


def test_everything_that_a_file_can_say_is_read(tmp_path):
    """Failure modes, the review loop, the approval, the key's inputs, the concurrency key and the deadline."""
    checked = check(skill(tmp_path))
    assert checked.faults == ()
    pipeline = checked.pipeline
    coder, linter, reviewer, deployer = pipeline.agents
    assert pipeline.concurrency_parts == ({"path": ["input", "repo"]}, {"text": "/main"})
    assert (pipeline.concurrency_key, pipeline.deadline_ms) == ("{{input.repo}}/main", 3_600_000)
    assert [agent.failure_mode for agent in pipeline.agents] == [
        FailureMode.HALT_PIPELINE,
        FailureMode.CONTINUE,
        FailureMode.SKIP_DEPENDENTS,
        FailureMode.HALT_PIPELINE,
    ]
    assert (coder.on_refused, reviewer.on_refused) == (None, OnRefused("coder", 2))
    assert (deployer.requires_human_approval, deployer.approval_timeout_ms) == (True, 86_400_000)
    assert deployer.key_inputs == (("input", "branch", "name"), ("coder", "score"), ("linter", "score"))
    assert linter.key_inputs == ()
    assert Pipeline.from_json(pipeline.as_json(), pipeline.hash) == pipeline


def test_what_the_keys_inputs_name_is_read_with_the_claim(tmp_path):
    """An ancestor that only `key_inputs` names is among what the claim hands over: without it, its value would be null."""
    text = (
        SKILL
        + "  - {id: last, model: claude-sonnet-5-5, depends_on: [deployer], output_schema: one, key_inputs: [coder.score]}\n"
    )
    path = skill(tmp_path, text)
    (tmp_path / "prompts/last.md").write_text(PROMPT.replace(".text", ".repo"))
    assert check(path).pipeline.by_id["last"].reads == ("coder", "deployer")


FAULTS = [
    # Review loops.
    ('    gate: "{{coder.score}} > 0.5"\n', "", "14:17 error on_refused needs a gate that may refuse."),
    ("rerun: coder, ", "", "15:17 error the field 'rerun' is required."),
    ("{rerun: coder, max_rounds: 2}", "coder", "15:17 error on_refused must be a map of fields."),
    ("rerun: coder", "rerun: codr", "15:25 error 'codr' is not upstream of reviewer, so its work cannot be done again. Did you mean 'coder'?"),
    ("rerun: coder", "rerun: deployer", "15:25 error 'deployer' is not upstream of reviewer"),
    ("rerun: coder", "rerun: reviewer", "15:25 error 'reviewer' is not upstream of reviewer"),
    ("rerun: coder", "again: coder", "15:18 error 'again' is no known field."),
    ("max_rounds: 2", "max_rounds: 11", "15:44 error max_rounds is 11; it must be from 1 to 10."),
    ("max_rounds: 2", "max_rounds: 0", "15:44 error max_rounds is 0; it must be from 1 to 10."),
    ("idempotent: true, failure", "failure", "15:25 error linter would be done again, and is a handler that may not be: give it idempotent: true."),
    ("idempotent: true, failure_mode: continue, output_schema: one}\n  - id: reviewer\n    model: claude-sonnet-5-5\n    depends_on: [coder, linter]",
     "failure_mode: continue, output_schema: one}\n  - id: reviewer\n    model: claude-sonnet-5-5\n    depends_on: [coder]",
     "15:25 error linter would be done again, and is a handler that may not be: give it idempotent: true, or let it depend on reviewer."),
    ("failure_mode: skip_dependents", "failure_mode: continue", "15:25 warning deployer may have run without reviewer, whose failure_mode is continue, and may not be done again: the loop ends then."),
    ("{{coder.score}} > 0.5", "{{input.repo}} != 'x'", "15:25 error the gate reads nothing of coder or linter: doing that again changes nothing."),
    # Outputs that may be missing.
    ("{{coder.score}} > 0.5", "{{linter.score}} > 0.5", "14:12 error {{linter.score}}: linter may end without an output, since its failure_mode is continue: give it skip_dependents, or do not name it here."),
    ('"{{input.repo}}"\n', '"{{linter.score}}"\n', "21:23 error {{linter.score}}: linter may end without an output"),
    ("continue, output_schema: one", "continue, output_schema: two, state_input: one", None),
    ("continue, output_schema: one", "continue, output_schema: two}\n  - {id: x, handler: 'shop:x', idempotent: true, depends_on: [linter], state_input: two", "9:85 error linter may end without an output"),
    # People.
    ("    requires_human_approval: true\n", "", "19:26 error approval_timeout_ms needs requires_human_approval: true."),
    ("approval: true", "approval: false", "20:26 error approval_timeout_ms needs requires_human_approval: true."),
    ("_ms: 86400000", "_ms: 10", "20:26 error approval_timeout_ms is 10; it must be from 1000 to 2592000000."),
    # Keys.
    ("[input.branch.name, ", "[input.brnch.name, ", "22:18 error input.brnch.name: the schema given has no such field."),
    ("[input.branch.name, ", "[input.ticket, ", "22:18 error input.ticket: the schema given does not require it"),
    ("[input.branch.name, ", "[deployer.x, ", "22:18 error deployer.x: deployer is not upstream of deployer"),
    ("[input.branch.name, ", "[codr.score, ", "22:18 error codr.score: 'codr' is neither an agent upstream nor 'input'. Did you mean 'coder'?"),
    ("[input.branch.name, ", "[input, ", "22:18 error key_inputs is 'input', but is written as"),
    ("[input.branch.name, ", "['{{input.repo}}', ", "22:18 error key_inputs is '{{input.repo}}', but is written as"),
    ("[input.branch.name, coder.score, linter.score]", "input.repo", "22:17 error key_inputs is no list: write [a, b]."),
    ("[input.branch.name, coder.score, linter.score]", f"[{'input.repo, ' * 21}]", "22:17 error key_inputs holds more than 20 names."),
    # Order and time.
    ("{{input.repo}}/", "{{input.ticket}}/", "4:19 error {{input.ticket}}: the schema given does not require it"),
    ("{{input.repo}}/", "{{coder.score}}/", "4:19 error {{coder.score}}: only the input is known before a run starts"),
    ("{{input.repo}}/", "{{run_id}}/", "4:19 error {{run_id}}: only the input is known before a run starts"),
    ("{{input.repo}}/", "{{input}}/", "4:19 error {{input}}: name one of its fields, such as {{input.field}}."),
    ("{{input.repo}}/", "{{input.repo}/", "4:19 error concurrency_key: '{{' begins no variable"),
    ('"{{input.repo}}/main"', '" "', "4:18 error concurrency_key is empty."),
    ("{{input.repo}}/", "all", None),
    ("deadline_ms: 3600000", "deadline_ms: 999", "5:14 error deadline_ms is 999; it must be from 1000 to 2592000000."),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), FAULTS, ids=[f"{old[:30]} > {new[:30]}" for old, new, _ in FAULTS])
def test_each_fault_stands_at_its_place(tmp_path, old, new, expected):
    """A wrong field is told with line, column, and what to do about it; None marks what is right."""
    assert SKILL.count(old) == 1
    found = lines(skill(tmp_path, SKILL.replace(old, new)))
    assert (found == []) if expected is None else any(expected in line for line in found), found


@pytest.mark.parametrize("text", ["{{linter}}", "{{linter.score}}"])
def test_prompt_may_not_name_what_may_be_missing(tmp_path, text):
    """A prompt with a hole could not be sent; what an agent depends on is added to it anyway."""
    found = lines(skill(tmp_path, reviewer=text))
    said = "linter may end without an output, since its failure_mode is continue: give it skip_dependents"
    assert found == [f"reviewer.md:7:1 error {text}: {said}, or do not name it here."]


def test_what_depends_on_a_skipped_agent_is_not_called_incomplete(tmp_path):
    """Whoever depends on a skipped agent is skipped too, so its gate may name what stands upstream of that."""
    text = SKILL.replace(
        "handler: shop:deploy", 'handler: shop:deploy\n    gate: "{{reviewer.score}} > {{coder.score}}"'
    )
    assert check(skill(tmp_path, text)).faults == ()


def test_loop_may_span_what_a_model_does(tmp_path):
    """A model in between may be asked again: it costs, and harms nothing."""
    linter = "handler: 'shop:lint', idempotent: true, failure_mode: continue"
    text = SKILL.replace(linter, "model: claude-sonnet-5-5")
    path = skill(tmp_path, text.replace("{{coder.score}} > 0.5", "{{linter.score}} > 0.5"))
    (tmp_path / "prompts/linter.md").write_text(PROMPT.replace(".text", ".repo"))
    assert check(path).faults == ()
