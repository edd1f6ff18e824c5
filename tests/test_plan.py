"""Planning: order, what remains, stretches, and the canvas as text."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.pipelines import plan
from app.pipelines.model import Agent, FailureMode, Pipeline


def pipeline(**depends_on):
    """`pipeline(a="", b="a")`; the agents must stand dependencies first."""
    agents = tuple(
        Agent(id=name, handler="h:run", depends_on=tuple(others.split())) for name, others in depends_on.items()
    )
    return Pipeline(name="p", version="1", agents=agents)


CHAIN = pipeline(researcher="", coder="researcher", reviewer="coder", deployer="reviewer")
DIAMOND = pipeline(plan="", fetch="plan", a="fetch", b="a", c="fetch", docs="b c", send="docs")
TWO_ROOTS = pipeline(a="", b="", c="a", d="b c", e="a")


@pytest.mark.parametrize(
    ("given_pipeline", "text"),
    [
        (CHAIN, "chain(researcher, coder, reviewer, deployer)"),
        (
            DIAMOND,
            """chain(plan, fetch)
group(chain(a, b), c) dispatched when fetch is completed
chain(docs, send) dispatched when b and c are completed""",
        ),
        (
            TWO_ROOTS,
            "group(a, b)\ngroup(c, e) dispatched when a is completed\nd dispatched when b and c are completed",
        ),
        (pipeline(only=""), "only"),
    ],
)
def test_the_canvas_as_text(given_pipeline, text):
    """A line for each dispatch: chains, groups, and joins with what they wait for."""
    assert plan.render(given_pipeline) == text


def test_the_canvas_says_which_agents_need_not_be_completed():
    """A join waits for the end of an agent whose failure mode is `continue`, and for the output of any other."""
    agents = [
        replace(agent, failure_mode=FailureMode.CONTINUE) if agent.id == "b" else agent for agent in DIAMOND.agents
    ]
    text = plan.render(replace(DIAMOND, agents=tuple(agents)))
    assert text.splitlines()[-1] == "chain(docs, send) dispatched when c is completed and b has ended"


def test_a_stretch_ends_before_a_fan_out_and_before_a_join():
    """A stretch goes on only through one dependent with one dependency."""
    assert plan.stretches(DIAMOND, ["plan"]) == (("plan", "fetch"),)
    assert plan.stretches(DIAMOND, ["c", "a"]) == (("a", "b"), ("c",))
    assert plan.stretches(DIAMOND, ["docs"]) == (("docs", "send"),)
    assert plan.stretches(CHAIN, ["reviewer"]) == (("reviewer", "deployer"),)
    assert plan.stretches(CHAIN, []) == ()


def test_ancestors_are_what_lies_upstream_at_any_distance():
    """Direct and indirect dependencies, without the agent itself."""
    assert plan.ancestors(plan.dependencies(DIAMOND), "docs") == {"plan", "fetch", "a", "b", "c"}
    assert plan.ancestors(plan.dependencies(DIAMOND), "plan") == set()


def test_cycles_are_named_once_each():
    """Every cycle is found, begun at its earliest agent, and the rest is ordered."""
    order, cycles = plan.order({"a": ["c"], "b": ["a"], "c": ["b"], "d": ["d"], "e": ["a"], "f": []})
    assert cycles == (("a", "c", "b"), ("d",))
    assert order == ("f", "e")


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30))
def test_an_order_puts_every_dependency_first_or_names_a_cycle(edges):
    """For any graph: each id is ordered once or stands on a named cycle, which is one."""
    depends_on = {str(n): [str(b) for a, b in edges if a == n] for n in range(10)}
    order, cycles = plan.order(depends_on)
    on_cycles = [name for cycle in cycles for name in cycle]
    assert sorted([*order, *on_cycles]) == sorted(depends_on)
    for name in order:
        assert all(other in on_cycles or order.index(other) < order.index(name) for other in depends_on[name])
    for cycle in cycles:
        assert all(following in depends_on[name] for name, following in zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    assert bool(cycles) == any(name in plan.ancestors(depends_on, name) for name in depends_on)


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(*(st.sets(st.integers(0, max(0, i - 1))) for i in range(n)))))
def test_stretches_cover_every_agent_once(dependencies):
    """Begun at the roots and, after each completion, at what becomes ready outside a stretch, all agents run once."""
    made = pipeline(
        **{f"a{i}": " ".join(f"a{j}" for j in sorted(others) if j < i) for i, others in enumerate(dependencies)}
    )
    ran = []
    while ready := [agent.id for agent in made.agents if agent.id not in ran and {*agent.depends_on} <= {*ran}]:
        for stretch in plan.stretches(made, ready):
            for name in stretch:
                assert set(ran).issuperset(made.by_id[name].depends_on)
                ran.append(name)
    assert sorted(ran) == sorted(made.by_id)
