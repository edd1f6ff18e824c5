"""Skill files: what loads, what is refused, and where each fault stands."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from skills import ARTICLE, PROMPT, ROOT, SCHEMA, SKILL, TWIN, check, lines, write

from app.errors import InvalidFile
from app.pipelines import limits, loader, names, starter
from app.pipelines.model import DEFAULT_KEY, Backoff, Pipeline, Queue
from app.settings import MODEL_ALIASES


@pytest.fixture
def skill(tmp_path):
    """A folder with a skill that has no fault."""
    return write(tmp_path)


def test_a_skill_without_faults_gives_its_pipeline(skill):
    """What the file leaves out has the model's defaults, and what is derived is filled in."""
    checked = check(skill)
    assert checked.faults == ()
    first, second = checked.pipeline.agents
    assert (checked.pipeline.name, checked.pipeline.version) == ("demo", "1.0")
    assert (first.queue, first.inputs, first.reads, first.handler) == (Queue.AGENTS, (), (), None)
    assert first.prompt.system == "You score."
    assert first.schema == SCHEMA
    assert first.idempotency_key == DEFAULT_KEY
    assert first.key_parts == ({"path": ["run_id"]}, {"text": ":"}, {"path": ["agent"]})
    assert (second.queue, second.handler, second.inputs, second.reads) == (
        Queue.HANDLERS,
        "handlers:second",
        ("first",),
        ("first",),
    )
    assert Pipeline.from_json(checked.pipeline.as_json(), checked.pipeline.hash) == checked.pipeline
    assert check(skill.parent).pipeline == checked.pipeline


@pytest.mark.parametrize("source", [TWIN, ARTICLE], ids=["twin", "article"])
def test_the_articles_file_loads_as_it_stands(source, tmp_path):
    """Every field of the article's file is read; with the files beside it that `complete` writes, only warnings stay."""
    if not source.exists():
        pytest.skip(f"{source} is not on this machine")
    path = Path(shutil.copy(source, tmp_path))
    starter.complete(path, aliases=MODEL_ALIASES, handler_modules=())
    checked = check(path)
    assert [fault for fault in checked.faults if fault.severity == "error"] == []
    researcher, coder, reviewer, deployer = checked.pipeline.agents
    assert researcher.retry_policy.max_attempts == 3
    assert researcher.retry_policy.backoff == Backoff.EXPONENTIAL
    assert (researcher.timeout_ms, researcher.model) == (30_000, "claude-3-5-sonnet")
    assert coder.idempotent
    assert coder.key_parts == ({"path": ["run_id"]}, {"text": ":coder"})
    assert coder.inputs == ("researcher",)
    assert (reviewer.gate, reviewer.reads) == ("{{coder.confidence}} >= 0.85", ("coder",))
    assert (deployer.handler, deployer.reads) == ("handlers:deployer", ("researcher", "coder", "reviewer"))
    assert not deployer.requires_human_approval
    assert checked.pipeline.tracing.log_outputs
    assert checked.pipeline.checkpointing.ttl_minutes == 60


def test_retired_models_get_one_warning_each(tmp_path):
    """With a place, and what runs instead."""
    path = Path(shutil.copy(TWIN, tmp_path))
    starter.complete(path, aliases=MODEL_ALIASES, handler_modules=())
    found = lines(path)
    assert found[0] == "9:12 warning claude-3-5-sonnet is retired; its alias claude-sonnet-5-5 runs in its place."
    assert [line.split()[0] for line in found] == ["9:12", "19:12", "30:12"]


def test_all_faults_are_reported_at_once(tmp_path):
    """One check names every fault of the file and of what lies beside it."""
    text = SKILL.replace("version: 1.0\n", "").replace("depends_on: [first]", "depends_on: [frist]\n    timeout_ms: 1")
    path = write(tmp_path, text, handlers="def secnd(ctx): pass\n", prompt="hello")
    assert lines(path) == [
        "1:1 error the field 'version' is required.",
        "6:9 error handlers.py has no function 'second'. Did you mean 'secnd'?",
        "7:18 error depends_on names 'frist', which is no agent. Did you mean 'first'?",
        "8:17 error timeout_ms is 1; it must be from 100 to 3600000.",
        "9:12 error {{first.score}}: first is not upstream of second: add it to depends_on.",
        "first.md:1:1 error the file needs the headings '# System' and '# User', each once and in this order.",
    ]
    with pytest.raises(InvalidFile) as raised:
        loader.load(path, aliases=MODEL_ALIASES, handler_modules=())
    assert len(raised.value.faults) == 6
    assert raised.value.exit_code == 2
    assert str(path) in raised.value.next_step


FIELD_FAULTS = [
    ("version: 1.0", "version: 1.0\nnmae: x", "3:1 error 'nmae' is no known field. Did you mean 'name'?"),
    ("version: 1.0", "version: 1.0\nname: other", "3:1 error 'name' stands here twice."),
    ("name: demo", "name:", "1:6 error name has no value: give one, or remove the line."),
    ("name: demo", "name: [demo]", "1:7 error name must be a single value."),
    ("name: demo", "name: a b", "1:7 error name is 'a b', but is written as"),
    ("id: second", "id: first", "7:9 error the agent 'first' stands here twice."),
    ("id: second", "id: input", "7:9 error the id 'input' is reserved."),
    ("id: second", "id: Second", "7:9 error id is 'Second', but is written as"),
    ("  - id: second\n    depends_on", "  - depends_on", "7:5 error the field 'id' is required."),
    ("depends_on: [first]", "depends_on: first", "8:17 error depends_on is no list: write [a, b]."),
    ("depends_on: [first]", "depends_on: [first, first]", "8:25 error depends_on names 'first' twice."),
    ("depends_on: [first]", "depends_on: [second]", "8:17 error the dependencies form a cycle: second -> second."),
    ("model: claude-sonnet-5-5", "model: claude-sonet-5-5", "5:12 error 'claude-sonet-5-5' is no known model. Did you mean 'claude-sonnet-5-5'?"),
    ("model: claude-sonnet-5-5", "model: claude-3-5-sonet", "5:12 error 'claude-3-5-sonet' is no known model. Did you mean 'claude-3-5-sonnet'?"),
    ("    output_schema: one\n", "", "5:12 error an agent with a model needs an output_schema"),
    ("output_schema: one", "output_schema: ../one", "6:20 error output_schema is '../one', but is written as"),
    ("output_schema: one", "output_schema: on", "6:20 error schemas/on.json is missing. Did you mean 'one.json'?"),
    ("output_schema: one", "output_schema: one\n    handler: shop:run", "7:14 error an agent has a model or a handler, not both."),
    ("output_schema: one", "output_schema: one\n    effort: hihg", "7:13 error effort is 'hihg'. Did you mean 'high'?"),
    ("output_schema: one", "output_schema: one\n    max_tokens: 0", "7:17 error max_tokens is 0; it must be from 1 to 128000."),
    ("output_schema: one", "output_schema: one\n    timeout_ms: '500'", "7:17 error timeout_ms is '500' in quotes, which is not a whole number."),
    ("output_schema: one", "output_schema: one\n    timeout_ms: 1:30", "7:17 error timeout_ms is '1:30', which is not a whole number."),
    ("output_schema: one", "output_schema: one\n    idempotent: yes", "7:17 error idempotent is 'yes'; write true or false"),
    ("output_schema: one", "output_schema: one\n    failure_mode: halt", "7:19 error failure_mode is 'halt'."),
    ("output_schema: one", "output_schema: one\n    state_input: one", "7:18 error no agent upstream has the output_schema 'one'."),
    ("output_schema: one", "output_schema: one\n    retry_policy: 3", "7:19 error retry_policy must be a map of fields."),
    ("output_schema: one", "output_schema: one\n    retry_policy: {max_attempts: 0}", "7:34 error max_attempts is 0; it must be from 1 to 100."),
    ("output_schema: one", "output_schema: one\n    retry_policy: {backoff: exponentail}", "7:29 error backoff is 'exponentail'. Did you mean 'exponential'?"),
    ("output_schema: one", "output_schema: one\n    retry_policy: {jitter: 1.5}", "7:28 error jitter is 1.5; it must be from 0.0 to 1.0."),
    ("output_schema: one", "output_schema: one\n    retry_policy: {initial_ms: 9, max_ms: 5}", "7:32 error initial_ms is 9, above max_ms, which is 5."),
    ("output_schema: one", 'output_schema: one\n    idempotency_key: "{{run_id}"', "7:23 error idempotency_key: '{{' begins no variable"),
    ("output_schema: one", 'output_schema: one\n    idempotency_key: "k:{{second.x}}"', "7:25 error {{second.x}}: second is not upstream of first"),
    ("output_schema: one", 'output_schema: one\n    idempotency_key: "k:{{input}}"', "7:25 error {{input}}: name one of its fields"),
    ("output_schema: one", "output_schema: one\n    idempotency_key: {{task_id}}:x", "Put the value in quotes"),
    ("output_schema: one", "output_schema: one\n    idempotency_key: fixed", "7:22 warning the key is the same for every run"),
    ("depends_on: [first]", "depends_on: [first]\n    effort: high", "9:13 error effort belongs to an agent with a model."),
    ("depends_on: [first]", "depends_on: [first]\n    handler: shop.deploy", "9:14 error handler is 'shop.deploy', but is written as"),
    ("depends_on: [first]", "depends_on: [first]\n    handler: shopp:run", "9:14 error the module 'shopp' is not among STEPFAST_HANDLER_MODULES. Did you mean 'shop'?"),
    ("{{first.score}} > 0.5", "{{first.scroe}} > 0.5", "9:12 error {{first.scroe}}: the schema one has no such field. Did you mean 'score'?"),
    ("{{first.score}} > 0.5", "true and {{first.note}} == 'x'", "9:21 error {{first.note}}: the schema one does not require it"),
    ("{{first.score}} > 0.5", "{{frist.score}} > 0.5", "9:12 error {{frist.score}}: 'frist' is neither an agent upstream nor 'input'. Did you mean 'first'?"),
    ("{{first.score}} > 0.5", "{{run_id}} == 'x'", "9:12 error {{run_id}}: 'run_id' is neither an agent upstream nor 'input'."),
    ("{{first.score}} > 0.5", "{{first.score}} > > 0.5", "9:30 error gate: is no expression (invalid syntax)."),
    ("{{first.score}} > 0.5", "true", "9:11 error the gate reads nothing"),
    ("version: 1.0", "version: 1.0\ntracing: {provider: langfues}", "3:21 error provider is 'langfues'. Did you mean 'langfuse'?"),
    ("version: 1.0", "version: 1.0\ncheckpointing: {enabled: false}", "3:26 error checkpointing cannot be switched off"),
    ("version: 1.0", "version: 1.0\ninput_schema: two", "3:15 error schemas/two.json is missing."),
    ("version: 1.0", "version: 1.0\ninput_schema: one", "first.md:7:7 error {{input.text}}: the schema one has no such field."),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), FIELD_FAULTS, ids=[case[1][:60] for case in FIELD_FAULTS])
def test_each_fault_of_a_field_has_its_place_and_the_nearest_valid_name(tmp_path, old, new, expected):
    """A wrong field is told with line, column, and what was probably meant."""
    assert old in SKILL
    found = lines(write(tmp_path, SKILL.replace(old, new, 1)))
    assert any(expected in line for line in found), found


def test_a_handler_may_come_from_an_allowed_module(tmp_path):
    """A package admits its submodules; such a module is never imported by the check, and handlers.py is not needed."""
    path = write(tmp_path, SKILL.replace("depends_on", "handler: shop.deploy:run\n    depends_on"))
    (tmp_path / "handlers.py").unlink()
    assert check(path).pipeline.by_id["second"].handler == "shop.deploy:run"
    assert check(path, handler_modules=["shop.deploy"]).pipeline
    assert check(path, handler_modules=["shop.deploying", "sho"]).pipeline is None


YAML_FAULTS = [
    (b"", "1:1 error the file is empty."),
    (b"name: demo\nversion: \xff\n", "2:10 error the file is not UTF-8: byte 0xff at offset 20."),
    (b"name: a\x00b\n", "1:8 error the file holds the control character '\\x00'"),
    (b'name: "a\\0b"\n', "1:7 error the file holds a NUL or half of a surrogate pair"),
    (b'name: "a\\ud800"\n', "the file"),
    (b"a: &a [x]\nb: &b [*a,*a,*a]\n", "'a' is no known field"),
    (b"a: &a [*a]\n", "1:8 error the file uses the alias *a before or inside what it names."),
    (b"a: *nobody\n", "1:4 error the file uses the alias *nobody"),
    (b"a: !!python/object/apply:os.system [id]\n", "1:4 error the file has the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
    (b"a: 1\n---\nb: 2\n", "2:1 error the file holds a second document"),
    (b"? [a]\n: b\n", "1:3 error the file has a key that is no text."),
    (b"a: [" + b"[" * 60 + b"]" * 60 + b"]\n", "the file is nested deeper than 24 levels."),
    (b"[" * 200_000, "the file is nested deeper than 24 levels."),
    (b"a: [" + b"x," * 20_000 + b"]\n", "the file holds more than 10000 values, aliases unfolded."),
    (b"a: " + b"x" * limits.FILE_MAX_BYTES, "0:0 error the file is larger than 262144 bytes."),
    (b"a: [1\nb: 2\n", "the file is not YAML: while parsing a flow sequence"),
    (b"- just\n- a list\n", "1:1 error a skill file must be a map of fields."),
    (b"agents: []\n", "1:9 error agents is no list with at least one entry."),
    (b"agents: [" + b"{}," * 101 + b"]\n", "1:9 error agents has 101 entries; the most is 100."),
]  # fmt: skip


@pytest.mark.parametrize(("data", "expected"), YAML_FAULTS, ids=[case[1][:50] for case in YAML_FAULTS])
def test_a_file_that_cannot_be_read_is_told_why(tmp_path, data, expected):
    """Bad bytes, bad YAML, bombs and foreign tags are faults with a place, not exceptions."""
    path = tmp_path / "x.skill.yaml"
    path.write_bytes(data)
    found = lines(path)
    assert any(expected in line for line in found), found


def test_an_alias_bomb_is_refused_at_once(tmp_path):
    """Aliases count as often as they unfold; an honest one is allowed."""
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10))
    path = tmp_path / "x.skill.yaml"
    path.write_text(bomb)
    started = time.process_time()
    assert "holds more than 10000 values" in lines(path)[0]
    assert time.process_time() - started < 1
    honest = SKILL.replace("output_schema: one", "output_schema: one\n    retry_policy: &retry {max_attempts: 5}")
    path = write(tmp_path, honest + "    retry_policy: *retry\n")
    assert check(path).pipeline.by_id["second"].retry_policy.max_attempts == 5


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(skill, tmp_path):
    """Who saved the file with which editor does not enter the pipeline's hash."""
    before = check(skill).pipeline.hash
    for path in (skill, tmp_path / "prompts/first.md"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert check(skill).pipeline.hash == before


def test_files_outside_the_folder_are_not_read(skill, tmp_path_factory):
    """A link that leads out of the skill's folder is refused, and so is what is no regular file."""
    outside = tmp_path_factory.mktemp("outside") / "secret.md"
    outside.write_text(PROMPT)
    prompt = skill.parent / "prompts/first.md"
    prompt.unlink()
    prompt.symlink_to(outside)
    assert lines(skill) == ["5:12 error prompts/first.md is a link that leads out of the skill's folder."]
    prompt.unlink()
    os.mkfifo(prompt)
    assert lines(skill) == ["5:12 error prompts/first.md is not a regular file."]
    prompt.unlink()
    prompt.symlink_to(prompt.name)
    assert "5:12 error prompts/first.md" in lines(skill)[0]


def test_a_missing_file_or_an_ambiguous_folder_is_a_fault(tmp_path):
    """No path raises anything else than InvalidFile."""
    assert lines(tmp_path / "no.skill.yaml") == ["0:0 error the file does not exist."]
    assert "folder without exactly one file" in lines(tmp_path)[0]
    assert "the file cannot be read" in lines(tmp_path / ("x" * 300))[0]
    assert "the file does not exist" in lines(tmp_path / "a\0b")[0]


def test_state_input_names_exactly_one_ancestor(tmp_path):
    """The agent upstream whose output_schema it is becomes the input; two of them are a fault."""
    text = SKILL.replace("    gate", "    output_schema: one\n    gate")
    text += "  - {id: third, depends_on: [second], state_input: one, handler: 'shop:run'}\n"
    path = write(tmp_path, text)
    assert lines(path) == ["11:52 error first and second have the output_schema 'one': one must."]
    path.write_text(text.replace("    output_schema: one\n    gate", "    gate"))
    assert check(path).pipeline.by_id["third"].inputs == ("first",)


def test_agents_stand_dependencies_first_and_otherwise_in_the_files_order(tmp_path):
    """The order of the file is kept among agents that are free to go."""
    text = "name: x\nversion: 1\nagents:\n"
    for name, depends_on in (("d", "[b, c]"), ("c", "[a]"), ("b", "[a]"), ("z", "[]"), ("a", "[]")):
        text += f"  - {{id: {name}, depends_on: {depends_on}, handler: 'shop:run'}}\n"
    assert [agent.id for agent in check(write(tmp_path, text)).pipeline.agents] == ["z", "a", "c", "b", "d"]


def test_a_definition_has_a_limit_as_a_whole(tmp_path, monkeypatch):
    """Many large prompts and schemas cannot add up without end."""
    monkeypatch.setattr(limits, "DEFINITION_MAX_BYTES", 500)
    assert "the most is 500." in lines(write(tmp_path))[0]


def test_the_number_of_faults_has_a_limit(tmp_path):
    """A hopeless file gets a readable number of faults."""
    text = SKILL + "".join(f"key{n}: 1\n" for n in range(1_000))
    assert len(check(write(tmp_path, text)).faults) == limits.FAULTS_MAX_COUNT


def test_an_alias_admits_a_model_that_is_not_known(tmp_path):
    """Onto another model it warns; onto itself it is silent."""
    path = write(tmp_path, SKILL.replace("claude-sonnet-5-5", "claude-next"))
    assert lines(path, aliases={"claude-next": "claude-next"}) == []
    assert "claude-next is retired" in lines(path, aliases={"claude-next": "claude-opus-5-5"})[0]


def test_the_known_models_are_the_sdks():
    """An upgrade of the SDK that brings a model shows here."""
    from typing import get_args

    from anthropic.types.model_param import ModelParam

    literal = next(part for part in get_args(ModelParam) if part is not str)
    assert set(names.MODELS) == set(get_args(literal))


def test_importing_the_loader_is_cheap():
    """Neither jsonschema nor anything larger is imported before a file is checked."""
    code = "import app.pipelines.loader, sys; print({'jsonschema', 'anthropic', 'sqlalchemy', 'celery'} & set(sys.modules))"
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environ, cwd=ROOT
    )
    if "celery" not in done.stdout:  # `app` itself may build the Celery application
        assert done.stdout.strip() == "set()"


def test_an_agent_whose_id_stands_twice_is_checked_like_the_others(skill):
    """Its dependencies, gate, input, prompt, schema and handler are looked at, too."""
    again = '  - id: second\n    depends_on: [frist]\n    state_input: two\n    gate: "{{first.scor}} > 1"\n    output_schema: three\n'
    skill.write_text(
        SKILL
        + again
        + "  - {id: first, model: claude-opus-5-5, depends_on: [second], output_schema: one, gate: '{{second.x}} > 1'}\n"
    )
    found = lines(skill)
    for part in (
        "10:9 error the agent 'second' stands here twice.",
        "11:18 error depends_on names 'frist', which is no agent.",
        "12:18 error no agent upstream has the output_schema 'two'.",
        "14:20 error schemas/three.json is missing.",
        "15:10 error the agent 'first' stands here twice.",
        "second has no output_schema, so its fields are unknown.",
    ):
        assert any(part in line for line in found), part
