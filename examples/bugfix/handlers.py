"""The handlers of this skill file: a function for each agent without a model, named after it."""

from app.agents.deployer import deploy as deployer

__all__ = ["deployer"]
