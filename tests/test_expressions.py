"""Gates and templates: what they say, and what they refuse to guess."""

import json
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import AgentError, AuthorMistake
from app.pipelines import expressions, templates
from app.pipelines.templates import BadText

VALUES = {
    "coder": {
        "confidence": 0.9,
        "count": 3,
        "name": "fix",
        "tags": ["a", "b"],
        "ok": True,
        "none": None,
        "deep": {"x": 1},
    },
    "input": {"limit": 2},
}

HELD = [
    ("{{coder.confidence}} >= 0.85", True),
    ("{{coder.confidence}} >= 1", False),
    ("{{ coder.count }} > 2.5", True),
    ("{{coder.ok}} == true", True),
    ("{{coder.ok}}", True),
    ("not {{coder.ok}} or {{coder.count}} == 3", True),
    ("{{coder.name}} == 'fix' and {{coder.name}} != \"fox\"", True),
    ("{{coder.name}} in ['fix', 'feature']", True),
    ("{{coder.name}} not in ['fix', 'feature']", False),
    ("'b' in {{coder.tags}}", True),
    ("1 in {{coder.tags}}", False),
    ("'ix' in {{coder.name}}", True),
    ("{{coder.none}} == null", True),
    ("{{coder.count}} != null", True),
    ("0.5 < {{coder.confidence}} <= 0.9", True),
    ("({{coder.count}} + {{input.limit}}) * 2 / 10 - 1 == 0", True),
    ("-{{coder.count}} < -{{input.limit}}", True),
    ("{{coder.deep.x}} == 1", True),
    ("{{coder.ok}} == True\n  and {{coder.none}} == None", True),
    ("{{coder.name}} == '{coder.ok}'", False),
    ("{{coder.name}} == '# no comment'", False),
]


@pytest.mark.parametrize(("text", "held"), HELD, ids=[case[0] for case in HELD])
def test_a_gate_is_true_or_false_of_its_values(text, held):
    """Comparisons, logic, membership and arithmetic, in YAML's and Python's spellings."""
    assert expressions.parse(text).evaluate(VALUES).held is held


def test_a_verdict_shows_what_it_saw():
    """Each reference is read once and shown with its value."""
    gate = expressions.parse("{{coder.count}} > 1 and {{coder.count}} < {{input.limit}}")
    assert gate.references == (("coder", "count"), ("input", "limit"))
    assert gate.evaluate(VALUES).values == {"coder.count": 3, "input.limit": 2}


MISTAKES = [
    ("{{coder.confidnece}} > 0", {}, "coder has no field 'confidnece'. Did you mean 'confidence'?"),
    ("{{coder.ok}} or {{coder.gone}} > 0", {}, "coder has no field 'gone'."),
    ("{{coder.name.x}} == 1", {}, "coder.name is no object"),
    ("{{coder.confidence}} >= 0.85", {"confidence": "0.9"}, "compares a text and a number"),
    ("{{coder.ok}} == true", {"ok": "true"}, "compares a text and a boolean"),
    ("{{coder.count}} == 1", {"count": True}, "compares a boolean and a number"),
    ("{{coder.ok}} > 0", {}, "compares a boolean and a number"),
    ("{{coder.none}} > 0", {}, "compares null and a number"),
    ("{{coder.confidence}}", {}, "a number stands where true or false must"),
    ("{{coder.count}} and true", {}, "a number stands where true or false must"),
    ("not {{coder.name}}", {}, "a text stands where true or false must"),
    ("{{coder.name}} + 'x' == 'fixx'", {}, "computes with a text and a text"),
    ("{{coder.name}} in 3", {}, "looks for one in the other: a text and a number"),
    ("{{coder.count}} / 0 == 1", {}, "division by zero"),
    ("{{coder.count}} * 1e308 > 1", {"count": 1e9}, "too large"),
    ("{{coder.count}} > 1", {"count": float("nan")}, "compares infinity or no number and a number"),
    ("{{coder.count}} * {{coder.count}} > 1", {"count": 10**4000}, "too large"),
]


@pytest.mark.parametrize(("text", "changed", "expected"), MISTAKES, ids=[case[2] for case in MISTAKES])
def test_what_is_unclear_is_the_authors_mistake_and_never_false(text, changed, expected):
    """Missing fields, unlike kinds and results that are no boolean raise, with the values that were seen."""
    with pytest.raises(AuthorMistake, match="cannot be evaluated") as raised:
        expressions.parse(text).evaluate({**VALUES, "coder": {**VALUES["coder"], **changed}})
    assert expected in raised.value.message
    assert isinstance(raised.value, AgentError)
    assert raised.value.code == "author_mistake"
    assert raised.value.details["gate"] == text
    assert "values" in raised.value.details


SYNTAX = [
    ("", 0, "is no expression"),
    ("{{coder.ok}} = true", 13, "write '=='"),
    ("{{coder.ok}} && true", 14, "write 'and'"),
    ("{{coder.ok}} == ", 16, "is no expression"),
    ("{{coder.ok} == true", 0, "'{{' begins no variable"),
    ("coder.ok == true", 0, "a reference stands in braces: write {{agent.field}}"),
    ("{{coder.ok}} == yes", 16, "'yes' is no reference"),
    ("v0 == 1 or {{coder.ok}}", 0, "'v0' is no reference"),
    ("'{{coder.name}}' == 'fix'", 1, "stands in quotes"),
    ("{{coder.ok}} # {{coder.name}}", 15, "in a comment"),
    ("'é' == {{coder.name}} == len('x')", 25, "Call is not part"),
    ("{{coder.ok}} ** 2 > 1", 0, "the operator Pow is not part"),
    ("{{coder.ok}} is true", 0, "the operator Is is not part"),
    ("[x for x in {{coder.tags}}]", 0, "ListComp is not part"),
    ("(lambda: {{coder.ok}})()", 0, "Call is not part"),
    ("{{coder.tags}}[0]", 0, "Subscript is not part"),
    ("{{coder.ok}} if true else false", 0, "IfExp is not part"),
    ("(x := {{coder.ok}})", 1, "NamedExpr is not part"),
    ("f'{1}' == {{coder.name}}", 0, "JoinedStr is not part"),
    ("{{coder.count}} > 1j", 18, "is no number"),
    ("{{coder.count}} > 1e999", 18, "is no number"),
    ("{{coder.name}} == '\\d'", 19, "no backslash"),
    ("(" * 300, 199, "is no expression"),
    ("not " * 40 + "{{coder.ok}}", 96, "nested deeper than 24 levels"),
    ("{{coder.ok}} or " * 60 + "true", 0, "at most 500 characters"),
    (") or (true", 0, "is no expression"),
    ("{{coder.ok}}; true", 12, "is no expression"),
]


@pytest.mark.parametrize(("text", "offset", "expected"), SYNTAX, ids=[case[0][:40] for case in SYNTAX])
def test_bad_syntax_is_refused_with_its_place(text, offset, expected):
    """What is no part of the language is found when the file is read, and never evaluated."""
    with pytest.raises(BadText) as raised:
        expressions.parse(text)
    assert expected in str(raised.value)
    assert abs(raised.value.offset - offset) <= 1  # Python's own errors differ by one between versions


def test_an_agents_output_never_becomes_code():
    """A text that looks like an expression or a reference is compared as the text that it is."""
    gate = expressions.parse("{{coder.name}} == 'fix'")
    for evil in ("fix' or true or '", "{{input.limit}}", "__import__('os').system('id')", "v0", "true"):
        assert gate.evaluate({"coder": {"name": evil}}).held is False


def test_many_threads_evaluate_gates_without_mixing_values():
    """Workers evaluate in threads; each sees its own values."""
    gate = expressions.parse("{{a.x}} == {{a.y}}")
    wrong = []

    def work(number):
        values = {"a": {"x": number, "y": number}}
        wrong.extend(number for _ in range(200) if not gate.evaluate(values).held)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


TOKENS = ["{{a.x}}", "{{a.y}}", "{{a", "and", "or", "not", "in", "==", ">=", "<", "+", "*", "/", "-", "(", ")", "[", "]", ",", "1", "0.5", "1e300", "'t'", "true", "null", ".", "x", "**", "lambda", ":", "é"]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    text=st.one_of(st.text(max_size=80), st.lists(st.sampled_from(TOKENS), max_size=25).map(" ".join)),
    x=st.one_of(
        st.integers(), st.floats(), st.text(max_size=5), st.booleans(), st.none(), st.lists(st.integers(), max_size=3)
    ),
)
def test_no_text_makes_a_gate_do_anything_else(text, x):
    """A gate is refused, holds, does not hold, or is a mistake; nothing else is raised, and never slowly."""
    started = time.process_time()
    try:
        verdict = expressions.parse(text).evaluate({"a": {"x": x, "y": 2}})
        assert isinstance(verdict.held, bool)
    except (BadText, AuthorMistake):
        pass
    assert time.process_time() - started < 1


def test_a_template_is_parsed_into_parts_and_rendered():
    """Texts go in as they are and other values as JSON; `task_id` is the run's id."""
    parts = templates.parse("{{task_id}}:{{ input.n }}-{{coder.name}} {{coder.deep}}{{coder.ok}}!")
    assert parts[0] == {"path": ["run_id"]}
    assert templates.paths(parts)[1:3] == (("input", "n"), ("coder", "name"))
    context = {
        "run_id": "r1",
        "input": {"n": 7},
        "coder": {"name": "{{input.n}}", "deep": {"b": 1, "a": "é"}, "ok": True},
    }
    assert templates.render(parts, context) == 'r1:7-{{input.n}} {"a":"é","b":1}true!'
    assert json.loads(json.dumps(parts)) == list(parts)


def test_a_variable_without_a_value_names_the_nearest():
    """An unknown variable is the author's mistake, not an empty text."""
    with pytest.raises(AuthorMistake, match=r"input has no field 'isue'. Did you mean 'issue'\?"):
        templates.render(templates.parse("{{input.isue}}"), {"input": {"issue": "x"}})
    with pytest.raises(AuthorMistake, match=r"the run has no field 'codr'. Did you mean 'coder'\?"):
        templates.render(templates.parse("{{codr.x}}"), {"coder": {}})


@pytest.mark.parametrize(
    ("text", "offset"), [("a {{", 2), ("{{}}", 0), ("{{a b}}", 0), ("{{a.}}", 0), ("é{{1a}}", 1), ("{{{a}}}", 0)]
)
def test_braces_that_begin_no_variable_are_refused(text, offset):
    """`{{` always opens a variable."""
    with pytest.raises(BadText) as raised:
        templates.parse(text)
    assert raised.value.offset == offset


@given(st.text(alphabet="ab{}. ", max_size=40))
def test_a_template_without_variables_renders_to_itself(text):
    """Single braces and everything else pass unchanged."""
    if "{{" not in text:
        assert templates.render(templates.parse(text), {}) == text
