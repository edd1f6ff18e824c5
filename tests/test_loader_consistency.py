"""What a skill file declares of how an agent reads another: what loads, and what is refused where."""

import re
import types

import pytest
from deploying import Memory
from skills import ROOT, check, lines, write
from working import order

from app.agents import handlers
from app.agents.handlers import Handler
from app.pipelines import starter
from app.pipelines.model import Consistency, Dependency, OnStale, Pipeline
from app.settings import MODEL_ALIASES, Settings

SKILL = """\
name: demo
version: 1.0
agents:
  - {id: first, model: claude-sonnet-5-5, output_schema: one}
  - {id: beside, handler: 'shop:look', idempotent: true}
  - id: second
    depends_on:
      - {agent: first, consistency: snapshot, max_staleness_ms: 60000, on_stale: accept}
      - {agent: beside, consistency: strong}
"""
NO_HANDLER_OF = "give it idempotent: true, or say on_stale: fail or accept."


def declaring(entry: str) -> str:
    return SKILL.replace("{agent: first, consistency: snapshot, max_staleness_ms: 60000, on_stale: accept}", entry)


def test_declared_consistency_is_read(tmp_path):
    """Names stay names; what is declared stands beside them, and travels with the stored definition."""
    pipeline = check(write(tmp_path, SKILL)).pipeline
    second = pipeline.by_id["second"]
    assert second.depends_on == ("first", "beside")
    assert second.declared == (
        Dependency("first", Consistency.SNAPSHOT, 60_000, OnStale.ACCEPT),
        Dependency("beside", Consistency.STRONG),
    )
    assert (second.strong, list(second.snapshots)) == (("beside",), ["first"])
    assert Pipeline.from_json(pipeline.as_json(), pipeline.hash) == pipeline


def test_plain_names_and_declarations_may_be_mixed(tmp_path):
    """A plain name is strong, and a snapshot that says nothing of staleness is done again where it is too old."""
    skill = declaring("{agent: first, consistency: snapshot, max_staleness_ms: 5}").replace(
        "{agent: beside, consistency: strong}", "beside"
    )
    second = check(write(tmp_path, skill)).pipeline.by_id["second"]
    assert second.declared == (Dependency("first", Consistency.SNAPSHOT, 5, OnStale.RERUN),)
    assert second.strong == ("beside",)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{agent: first, consistency: snapshot}", "8:9 error the field 'max_staleness_ms' is required."),
        ("{consistency: strong}", "8:9 error the field 'agent' is required."),
        (
            "{agent: first, max_staleness_ms: 5}",
            "8:42 error max_staleness_ms belongs to consistency: snapshot; a strong dependency is never stale.",
        ),
        (
            "{agent: first, consistency: strong, on_stale: fail}",
            "8:55 error on_stale belongs to consistency: snapshot; a strong dependency is never stale.",
        ),
        (
            "{agent: first, consistency: eventual}",
            "8:37 error consistency is 'eventual'. Known: snapshot, strong.",
        ),
        (
            "{agent: first, consistency: snapshot, max_staleness_ms: 0}",
            "8:65 error max_staleness_ms is 0; it must be from 1 to 31536000000.",
        ),
        ("{agent: furst}", "8:17 error depends_on names 'furst', which is no agent. Did you mean 'first'?"),
        ("{agent: beside}", "9:17 error depends_on names 'beside' twice."),
        ("{agent: first, freshness: high}", "8:24 error 'freshness' is no known field. Known: agent, consistency, max_staleness_ms, on_stale."),
        ("[first]", "8:9 error an entry of depends_on is neither a name nor a map of fields."),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(tmp_path, entry, said):
    """Each fault with its place: a limit of staleness without a snapshot means nothing."""
    assert said in lines(write(tmp_path, declaring(entry)))


def test_stale_snapshot_repeats_no_handler_that_may_not_be(tmp_path):
    """A re-run takes along all that read the dependency strongly: the author learns it, and not a dead letter at night."""
    skill = declaring("{agent: first, consistency: snapshot, max_staleness_ms: 5}")
    kept = skill + "  - {id: shipper, handler: 'shop:ship', depends_on: [first]}\n"
    assert lines(write(tmp_path, kept)) == [
        f"8:9 error shipper would be done again with first, and is a handler that may not be: {NO_HANDLER_OF}"
    ]
    behind = skill + "  - {id: shipper, handler: 'shop:ship', depends_on: [first, second]}\n"
    assert lines(write(tmp_path, behind)) == []
    accepting = kept.replace("max_staleness_ms: 5}", "max_staleness_ms: 5, on_stale: fail}")
    assert lines(write(tmp_path, accepting)) == []


def test_review_loop_needs_a_strong_way(tmp_path):
    """Whoever reads a snapshot does not wait for the new output, and would refuse the old one once more."""
    skill = SKILL.replace("{agent: beside, consistency: strong}", "beside") + (
        '    gate: "{{first.score}} > 0.5"\n    on_refused: {rerun: first}\n'
    )
    assert lines(write(tmp_path, skill)) == [
        "11:25 error second reads first as a snapshot, and would not wait for its new output."
    ]


def test_documents_examples_are_right(tmp_path):
    """docs/consistency.md: its file loads, and its handler observes what its probe sees."""
    document = (ROOT / "docs/consistency.md").read_text()
    path = tmp_path / "example.skill.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", document, re.DOTALL)[1])
    starter.complete(path, aliases=MODEL_ALIASES, handler_modules=())
    assert check(path).faults == ()

    beside = types.ModuleType("beside")
    exec(re.search(r"```python\n(.*?)```", document, re.DOTALL)[1], beside.__dict__)
    survey, probe = (Handler(one, "0" * 64, False, beside) for one in (beside.survey, beside.repo_head))
    work = order(given={"head": "abc"})
    (seen,) = handlers.call(survey, work, Memory(), Settings()).observed
    assert seen["value"] == handlers.look(probe, work) == "abc"
