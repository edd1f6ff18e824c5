"""What lies beside a skill file: prompts, schemas and handlers, and bytes at random."""

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from skills import HANDLERS, SKILL, check, lines, write

from app.errors import InvalidFile
from app.pipelines import loader
from app.settings import MODEL_ALIASES


@pytest.fixture
def skill(tmp_path):
    """A folder with a skill that has no fault."""
    return write(tmp_path)


PROMPT_FAULTS = [
    ("# User\n\nhi\n", "1:1 error the file needs the headings"),
    ("# System\n\na\n# User\n\nb\n# User\n", "1:1 error the file needs the headings"),
    ("hello\n# System\n\na\n# User\n\nb\n", "1:1 error the file has text above '# System'"),
    ("# System\n\n# User\n\nb\n", "1:1 error the file has nothing below '# System'."),
    ("# System\n\na {{input.x}}\n# User\n\nb\n", "3:3 error the file has a variable in its system part"),
    ("# System\n\na\n# User\n\nb {{input.x} c\n", "6:3 error '{{' begins no variable"),
    ("# System\n\na\n# User\n\nb {{inptu.x}} c\n", "6:3 error {{inptu.x}}: 'inptu' is neither an agent upstream nor 'input'. Did you mean 'input'?"),
    ("# System\n\na\n# User\n\nb \0\n", "6:3 error the file holds a NUL"),
    ("# System\n\na\n# User\n\n{{run_id.x}}\n", "6:1 error {{run_id.x}}: run_id has no fields."),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "expected"), PROMPT_FAULTS, ids=[case[1][:40] for case in PROMPT_FAULTS])
def test_a_prompts_faults_are_told_with_their_place_in_the_prompt(tmp_path, prompt, expected):
    """Line and column count in the prompt's own file."""
    found = lines(write(tmp_path, prompt=prompt))
    assert [line for line in found if line.startswith(f"first.md:{expected}")], found


def test_a_prompt_may_hold_a_whole_object_and_run_names(tmp_path):
    """`{{input}}`, `{{first}}`, `{{run_id}}` stand for whole values; a prompt's agents are read."""
    text = SKILL.replace("    gate", "    model: claude-opus-5-5\n    output_schema: one\n    gate")
    text += "  - {id: third, depends_on: [second], model: claude-opus-5-5, output_schema: one}\n"
    path = write(tmp_path, text)
    (tmp_path / "prompts/second.md").write_text("# System\n\nx\n\n# User\n\n{{input}} {{first}} {{run_id}}\n")
    (tmp_path / "prompts/third.md").write_text("# System\n\nx\n\n# User\n\n{{first.score}}\n")
    pipeline = check(path).pipeline
    assert pipeline.by_id["third"].inputs == ("second",)
    assert pipeline.by_id["third"].reads == ("first", "second")


def schema(**properties):
    return {"type": "object", "properties": {"score": {"type": "number"}, **properties}, "required": ["score"]}


SCHEMA_FAULTS = [
    ({"type": "array"}, "1:1 error the schema must say type: object"),
    ({"type": "objekt"}, "error type is no JSON Schema: "),
    (schema(x={"type": "string", "pattern": "("}), "error properties.x.pattern is no JSON Schema: "),
    (schema(x={"$ref": "https://example.com/x.json"}), "error $ref 'https://example.com/x.json' leads out of this file"),
    (schema(x={"$ref": "other.json#/a"}), "error $ref 'other.json#/a' leads out of this file"),
    ({**schema(x={"$ref": "#/$defs/nmae"}), "$defs": {"name": {"type": "string"}}}, "Did you mean '#/$defs/name'?"),
    ({**schema(x={"$ref": "#/$defs/a"}), "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}}, "may not be recursive, as 'a' is."),
    (schema(x={"description": "anything"}), "error a model's answer needs a type here."),
    (schema(x=True), "error a model's answer needs a type here."),
    (schema(x={"type": "array", "items": True}), "error a model's answer needs a type here."),
    (schema(x={"enum": [[1]]}), "error a model's answer needs a type here."),
    ({**schema(x={"allOf": [{"$ref": "#/$defs/a"}]}), "$defs": {"a": {"type": "string"}}}, "has no $ref in allOf"),
    (schema(x={"type": ["string", "null"]}), "error a model's answer has one type: write anyOf for several."),
    ({**schema(), "additionalProperties": True}, "error a model's answer has no further fields: write false."),
    ({**schema(), "$schema": "http://json-schema.org/draft-07/schema#"}, "draft-07/schema#' is not read"),
    (schema(x={"$dynamicRef": "#a"}), "error $dynamicRef is not supported"),
    (schema(x={"enum": ["\ud800"]}), "holds a NUL or half of a surrogate pair"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "expected"), SCHEMA_FAULTS, ids=[case[1][:50] for case in SCHEMA_FAULTS])
def test_a_schemas_faults_are_told(tmp_path, value, expected):
    """A schema must be one, stay in its file, and be what structured outputs can do."""
    found = lines(write(tmp_path, schema=value))
    assert any(line.startswith("one.json:") and expected in line for line in found), found


def test_a_schemas_places_are_lines_of_its_file(skill):
    """Faults of JSON and of JSON Schema have the line and column of what is wrong."""
    path = skill.parent / "schemas/one.json"
    path.write_text('{\n  "type": "object",\n  "properties": {\n    "score": {"type": "numbr"}\n  }\n}\n')
    assert lines(skill)[0].startswith("one.json:4:15 error properties.score.type is no JSON Schema:")
    path.write_text('{\n  "type": "object",\n  "type": "object"\n}\n')
    assert lines(skill)[0] == "one.json:3:3 error the file has the key 'type' twice in one object."
    path.write_text('{\n  "type": object\n}\n')
    assert lines(skill)[0] == "one.json:2:11 error the file is not JSON: Expecting value."
    path.write_text("[" * 60_000)
    assert "is not JSON" in lines(skill)[0]
    path.write_text(json.dumps({"type": "object", "anyOf": [{}] * 6_000}))
    assert "is larger than 24 levels and 5000 values" in lines(skill)[0]
    path.write_text('{"type": "object", "default": NaN}')
    assert "NaN is no number" in lines(skill)[0]


def test_objects_in_a_models_schema_are_closed(tmp_path):
    """A schema that leaves `additionalProperties` open gets false, as structured outputs need; a handler's stays."""
    value = schema(x={"type": "object", "properties": {"y": {"$ref": "#/$defs/z"}}})
    value["$defs"] = {"z": {"type": "object", "properties": {}}}
    text = SKILL + "    output_schema: one\n"
    first, second = check(write(tmp_path, text, schema=value)).pipeline.agents
    assert first.schema["additionalProperties"] is False
    assert first.schema["properties"]["x"]["additionalProperties"] is False
    assert first.schema["$defs"]["z"]["additionalProperties"] is False
    assert second.schema == value


def test_a_gate_may_read_inside_references_and_alternatives(tmp_path):
    """A field is found through $ref and allOf; through anyOf it may be missing."""
    value = {
        **schema(x={"$ref": "#/$defs/x"}),
        "$defs": {"x": {"type": "object", "properties": {"deep": {"type": "number"}}, "required": ["deep"]}},
        "required": ["score", "x"],
    }
    text = SKILL.replace("{{first.score}}", "{{first.x.deep}}")
    assert check(write(tmp_path, text, schema=value)).faults == ()
    text = SKILL.replace("{{first.score}}", "{{first.x.dep}}")
    assert "Did you mean 'deep'?" in lines(write(tmp_path, text, schema=value))[0]
    value["properties"]["x"] = {"anyOf": [{"$ref": "#/$defs/x"}, {"type": "null"}]}
    text = SKILL.replace("{{first.score}}", "{{first.x.deep}}")
    assert "does not require it" in lines(write(tmp_path, text, schema=value))[0]


HANDLER_FAULTS = [
    ("def second():\n    return {}\n", "handlers.py:1:1 error second must take one argument, its context."),
    ("def second(a, b):\n    return {}\n", "handlers.py:1:1 error second must take one argument, its context."),
    ("def second(ctx, *, x):\n    return {}\n", "handlers.py:1:1 error second must take one argument, its context."),
    ("async def second(ctx):\n    return {}\n", "handlers.py:1:1 error second is async: write a plain def."),
    ("def second(ctx:\n", "handlers.py:1:11 error the file is not Python: '(' was never closed."),
    ("x = 1\n", "7:9 error handlers.py has no function 'second'. Known: x."),
    ("x = " + "-" * 100_000 + "1\n", "handlers.py:1:1 error the file is not Python: "),
]


@pytest.mark.parametrize(("text", "expected"), HANDLER_FAULTS, ids=[case[0][:30] for case in HANDLER_FAULTS])
def test_handlers_are_checked_without_running_them(tmp_path, text, expected):
    """A function named after the agent must exist and take its context."""
    assert lines(write(tmp_path, handlers=text))[0].startswith(expected)


@pytest.mark.parametrize(
    "text",
    [
        "from app.agents.deployer import deploy as second\n",
        "second = print\n",
        "raise SystemExit\ndef second(ctx, extra=1): pass\n",
        "def second(*args): '\\d'\n",
    ],
)
def test_a_handler_may_be_imported_or_assigned(tmp_path, text):
    """What cannot be known without running it is let pass, and nothing is run."""
    assert check(write(tmp_path, handlers=text)).faults == ()


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SNIPPETS = [
    *SKILL.split(),
    *SKILL.splitlines(keepends=True),
    "{{",
    "}}",
    "&a",
    "*a",
    "!!",
    "[",
    "{",
    ": ",
    "\n",
    "'",
    '"',
    "|",
    "\0",
    "é",
]


@FUZZ
@given(
    data=st.one_of(
        st.binary(max_size=300), st.lists(st.sampled_from(SNIPPETS), max_size=60).map(lambda p: "".join(p).encode())
    )
)
def test_no_bytes_raise_anything_but_invalid_file(tmp_path, data):
    """Whatever stands in a skill file, the check gives faults, soon."""
    path = tmp_path / "x.skill.yaml"
    path.write_bytes(data)
    started = time.process_time()
    with pytest.raises(InvalidFile):
        loader.load(path, aliases=MODEL_ALIASES, handler_modules=())
    assert time.process_time() - started < 2


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "properties", "$ref", "$defs", "items", "anyOf", "enum", "required", "x"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@FUZZ
@given(value=JSON_VALUES, prompt=st.text(max_size=60), handlers=st.text(max_size=60))
def test_nothing_beside_the_file_raises_anything_either(tmp_path, value, prompt, handlers):
    """Whatever stands in schemas, prompts and handlers, the check gives faults."""
    path = write(tmp_path)
    (tmp_path / "schemas/one.json").write_text(json.dumps(value))
    for name, text in (
        ("prompts/first.md", "# System\n\nx\n\n# User\n\n" + prompt),
        ("handlers.py", HANDLERS + handlers),
    ):
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    check(path)
