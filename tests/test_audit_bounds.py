"""The audit of an odd or hostile handlers.py: it ends soon, and says what it found or why it could not look."""

import pytest
from skills import write
from test_audit import ACTS, ONCE, SOUND, audited, found

from app.pipelines.limits import FAULTS_MAX_COUNT, HANDLERS_MAX_LEVELS, HANDLERS_MAX_NODES


def said(path, rule):
    return [finding for finding in audited(path).findings if finding.rule == rule]


def function(*lines: str) -> str:
    return "import time\n\n\ndef second(ctx):\n" + "".join(f"    {line}\n" for line in lines)


def _decorators(depth):
    return f"@a{'()' * depth}\ndef second(ctx):\n    return {{}}\n"


def _attributes(depth):
    return function(f"return ctx{'.run' * depth}")


def _fields(depth):
    return function(f"return ctx.inputs['first']{'[0]' * depth}['a']")


def _sum(depth):
    return function(f"return ctx.once('a' {'+ time' * depth}, print, check=print)")


@pytest.mark.parametrize(("make", "line"), [(_decorators, 1), (_attributes, 5), (_fields, 5), (_sum, 5)])
def test_what_nests_too_deeply_is_refused_where_it_stands(tmp_path, make, line):
    """A chain of thousands of calls, attributes, fields or terms is an error with its line, and one of many is read."""
    (finding,) = said(write(tmp_path, SOUND, handlers=make(2_500)), "skill-file")
    assert (finding.severity, finding.line) == ("error", line)
    assert "nests deeper than 200 levels" in finding.message
    assert said(write(tmp_path, SOUND, handlers=make(HANDLERS_MAX_LEVELS - 20)), "skill-file") == []


@pytest.mark.parametrize("sign", ["()", ".a", "-a"])
def test_what_python_itself_cannot_nest_is_refused(tmp_path, sign):
    """Where Python's own parser gives up, the error says so."""
    (finding,) = said(write(tmp_path, SOUND, handlers=f"a{sign * 100_000}\n{ACTS}"), "skill-file")
    assert "nests too deeply to be read" in finding.message


def test_what_is_too_much_is_refused(tmp_path):
    """A file of more names and calls than anybody writes is an error, whatever they do."""
    (finding,) = said(write(tmp_path, SOUND, handlers="a=" * HANDLERS_MAX_NODES + "0\n" + ACTS), "skill-file")
    assert "has more than 100000 names, calls and the like" in finding.message


def test_lone_carriage_returns_end_lines(tmp_path):
    """Python counts them as ends of lines, and so do places."""
    path = write(tmp_path, SOUND)
    (tmp_path / "handlers.py").write_bytes(ONCE.replace("\n", "\r").encode())
    assert found(path) == ["handlers.py:6:12 effect-without-check", "handlers.py:6:12 key-not-stable"]


@pytest.mark.timeout(60)
def test_names_that_name_each_other_again_and_again(tmp_path):
    """What a key is made of is followed through each name once, however often that is assigned."""
    names = "abcd"
    lines = [f"{name} = {'+'.join(names * 25)}" for name in names * 40]
    body = [*lines, "ctx.once(d, print, check=print)", "a = time.time()", "ctx.once(d, print, check=print)"]
    findings = said(write(tmp_path, SOUND, handlers=function(*body)), "key-not-stable")
    assert [finding.line for finding in findings] == [4 + len(lines) + 1, 4 + len(lines) + 3]
    assert "time.time" in findings[0].message
    assert (
        said(write(tmp_path, SOUND, handlers=function(*lines, "ctx.once(d, print, check=print)")), "key-not-stable")
        == []
    )


@pytest.mark.timeout(10)
def test_many_imports_and_many_calls(tmp_path):
    """Whether a call leaves the module is looked up, not searched for among all imports."""
    imports = "".join(f"from math import a{number}\n" for number in range(15_000))
    path = write(tmp_path, SOUND, handlers=imports + function(*(f"b{number}()" for number in range(15_000))))
    assert found(path) == []


@pytest.mark.timeout(60)
def test_many_agents_of_one_large_file(tmp_path):
    """It is parsed once, and each function in it looked at once, whoever reaches it."""
    agents = "".join(f"  - {{id: a{number}, depends_on: [first], idempotent: true}}\n" for number in range(98))
    text = SOUND.replace("tracing:", f"{agents}tracing:")
    calls = "".join(f"    shared(ctx.inputs['a{number}'])\n" for number in range(8_000))
    handlers = f"def shared(ctx):\n{calls}\n\n" + "".join(
        f"def {name}(ctx):\n    return shared(ctx)\n\n\n"
        for name in ["second", *(f"a{number}" for number in range(98))]
    )
    findings = said(write(tmp_path, text, handlers=handlers), "schema-lacks-field")
    assert len({finding.agent for finding in findings}) == 99


def test_what_is_found_in_one_handler_has_a_bound(tmp_path):
    """Past the limit a further finding helps nobody."""
    once = "ctx.once('a', print)"
    handlers = function(*[once] * (FAULTS_MAX_COUNT + 50))
    assert len(said(write(tmp_path, SOUND, handlers=handlers), "effect-without-check")) == FAULTS_MAX_COUNT
