"""Agents that do nothing, and say who they are."""

from typing import Any

from app.agents import Context


def plan(ctx: Context) -> dict[str, Any]:
    return {"by": ctx.run.agent}


def write(ctx: Context) -> dict[str, Any]:
    return {"by": ctx.run.agent}


def check(ctx: Context) -> dict[str, Any]:
    return {"by": ctx.run.agent}


def ship(ctx: Context) -> dict[str, Any]:
    return {"by": ctx.run.agent}
