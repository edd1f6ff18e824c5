"""`--embedded`: servers, and where work is to be done workers too, that live as long as the command."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import click

from app import settings
from app.errors import Misuse, NotReady

# For commands that only look.
option = click.option("--embedded", is_flag=True, help="On the embedded servers of STEPFAST_HOME.")


@dataclass(frozen=True, slots=True)
class Embedding:
    """Workers that find their handlers beside `skill`, and whose Claude is simulated if `simulate`."""

    simulate: bool = False
    skill: Path | None = None

    @property
    def going_on(self) -> str:
        """The command under which an interrupted run goes on: workers with the skills that this home had last."""
        return f"stepfast up{' --simulate' if self.simulate else ''}"

    def extend(self, command: str) -> str:
        """A command of ours, as it is typed to go on here."""
        if command == "stepfast up":
            return command
        if not command.startswith("stepfast resume"):
            return f"{command} --embedded"
        simulate = " --simulate" if self.simulate else ""
        skill = f" --skill {quote(str(self.skill))}" if self.skill else ""
        return f"{command} --embedded{simulate}{skill}"

    @contextmanager
    def workers(self) -> Iterator[None]:
        """Servers, migrated, and workers; this process's settings name them. Raises NotReady."""
        from app.cli.local import start_system
        from app.cli.processes import OrderlyExit

        _refuse_others()
        if self.simulate:
            say("Claude is simulated: nothing is paid for.")
        with OrderlyExit() as stack:
            skills = [self.skill] if self.skill else []
            start_system(stack, skills, simulate=self.simulate, say=say)
            yield


@contextmanager
def servers() -> Iterator[None]:
    """The embedded servers, migrated; this process's settings name them. Raises NotReady."""
    from app.cli.local import embedded_servers

    _refuse_others()
    with embedded_servers(settings.load().home, say):
        yield


def embedding(*, embedded: bool, simulate: bool, skill: Path | None) -> Embedding | None:
    """What the options of a command ask for; None for the servers that the settings name. Raises Misuse."""
    if embedded:
        return Embedding(simulate, skill)
    if simulate:
        raise Misuse("--simulate needs --embedded: only workers of this command's own are given the simulator.")
    return None


def following(command: str, *, embedded: bool) -> str:
    """A command of ours to type next, on the servers that the one before it was on."""
    return Embedding().extend(command) if embedded else command


def refuse_without_key() -> None:
    """Raises NotReady where nothing says how Claude is reached: the simulator must be asked for."""
    configured = settings.load()
    if not (configured.anthropic_api_key or configured.anthropic_base_url):
        raise NotReady(
            "ANTHROPIC_API_KEY is not set.", next_step="Set it, or add --simulate: then nothing is paid for."
        )


def say(sentence: str) -> None:
    """Progress is no answer, so it goes to standard error."""
    print(sentence, file=sys.stderr, flush=True)


def _refuse_others() -> None:
    configured = settings.load()
    for name in ("database_url", "broker_url", "redis_url"):
        if getattr(configured, name):
            raise Misuse(
                f"--embedded asks for embedded servers, and {settings.variable(name)} names another.",
                next_step="Unset it, or leave --embedded out.",
            )
