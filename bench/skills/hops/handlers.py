"""Each agent is what it is on every side of the bench: bench/peers/workload.py, found by PYTHONPATH."""

from typing import Any

from workload import agent

from app.agents import Context


def a(ctx: Context) -> dict[str, Any]:
    return agent("a", ctx.inputs)


def b(ctx: Context) -> dict[str, Any]:
    return agent("b", ctx.inputs)


def c(ctx: Context) -> dict[str, Any]:
    return agent("c", ctx.inputs)


def d(ctx: Context) -> dict[str, Any]:
    return agent("d", ctx.inputs)
