"""What the simulated models answer in a cell, and how their calls are counted."""

import re
from collections.abc import Mapping

from app.crashtest.cells import Answers
from app.pipelines.model import Agent, Json, Pipeline
from app.simulator.script import Match, Rule, Script


def recorded(pipeline: Pipeline, outputs: Mapping[str, Json]) -> Script:
    """Answers that repeat an earlier run's outputs, by agent."""
    rules = []
    for agent in pipeline.agents:
        if agent.model:
            output = outputs[agent.id]
            reply = output["text"] if agent.schema is None else output
            rules.append(Rule(match=Match(system=_system(agent)), reply=reply))
    return Script(rules=rules)


def script(pipeline: Pipeline, good: Script, agent: str, answers: Answers) -> Script:
    """The good answers without their delays; before them what only counts, a rule for each prompt, and the trouble."""
    rules = [Rule(match=Match(system=_system(one), nth=[])) for one in _counted(pipeline)]
    match = Match(system=_system(pipeline.by_id[agent])) if answers != Answers.GOOD else Match()
    if answers == Answers.FAILS_ONCE:
        rules.append(Rule(match=match, times=1, status=529))
    elif answers == Answers.FAILS:
        rules.append(Rule(match=match, status=400))
    # A person likes to watch; a crash test has better things to wait for.
    return Script(rules=[*rules, *(rule.model_copy(update={"delay_ms": 0}) for rule in good.rules)])


def calls(pipeline: Pipeline, counts: list[Json]) -> dict[str, int]:
    """From the simulator's counts of a script's rules, how often each prompt was asked, by its first agent."""
    return {agent.id: count["matched"] for agent, count in zip(_counted(pipeline), counts, strict=False)}


def _counted(pipeline: Pipeline) -> list[Agent]:
    """The agents with a model, one for each prompt: calls are told apart by their system prompts."""
    return list({agent.prompt.system: agent for agent in reversed(pipeline.agents) if agent.prompt}.values())


def _system(agent: Agent) -> re.Pattern[str]:
    assert agent.prompt is not None
    return re.compile(rf"\A{re.escape(agent.prompt.system)}\n\n")
