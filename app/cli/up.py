"""`stepfast up`."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from threading import Event

import click

from app import settings
from app.cli import local, output, system
from app.cli.local import say
from app.cli.processes import OrderlyExit
from app.settings import variable

SERVERS_WATCH_S = 2.0
SERVERS = 2


@click.command()
@click.argument("skills", nargs=-1, metavar="[SKILL]...", type=click.Path(path_type=Path))
@click.option(
    "--simulate", is_flag=True, help="Claude is simulated; simulator.yaml beside a SKILL scripts its answers."
)
@click.option("--no-flower", is_flag=True, help="Without Flower's pages.")
def command(skills: tuple[Path, ...], simulate: bool, no_flower: bool) -> None:
    """Start servers, workers and Flower, publish the SKILLs, and keep all running until Ctrl-C.

    The servers are embedded ones, unless STEPFAST_DATABASE_URL and STEPFAST_BROKER_URL name others.
    """
    pipelines = [system.load_skill(skill) for skill in skills]
    own_servers = settings.load().database_url is None
    names = local.WORKERS if no_flower else (*local.WORKERS, "flower")
    with OrderlyExit() as stack:
        try:
            running = local.start_system(stack, skills, simulate=simulate, names=names, say=say)
            from app import operations
            from app.execution import worker

            for pipeline in pipelines:
                operations.publish(worker.current(), pipeline)
                say(f"Published {pipeline.name} {pipeline.version}.")
            _say_what_is_there(running)
            _say_what_next(own_servers, [system.run_command(pipeline.name, pipeline) for pipeline in pipelines])
            _keep_running(stack, own_servers=own_servers)
        except KeyboardInterrupt:
            say("\nStopping. What executes may finish; a second Ctrl-C does not wait for it.")
    say("Stopped. Runs are kept, and go on at the next start.")


def _keep_running(stack: OrderlyExit, *, own_servers: bool) -> None:
    """Until Ctrl-C. Workers that end are started again elsewhere; servers of ours that are gone, here."""
    from app.embedded import running, servers

    home, pause = settings.load().home, Event()
    while True:
        pause.wait(SERVERS_WATCH_S)
        if own_servers and len(running(home)) < SERVERS:
            say("A server is gone.")
            stack.enter_context(servers(home, on_progress=local.unfailing(say)))


def _say_what_is_there(running: local.Running) -> None:
    rows = {"Flower": running.flower, "Claude simulator": running.simulator, "logs": str(running.logs)}
    output.print_fields({name: value for name, value in rows.items() if value})
    if not running.simulator and not settings.load().anthropic_api_key:
        say("ANTHROPIC_API_KEY is not set, so agents with a model will fail: set it, or use --simulate.")


def _say_what_next(own_servers: bool, commands: Sequence[str]) -> None:
    say("In another terminal:")
    if own_servers:
        configured = settings.load()
        for name in ("database_url", "broker_url"):
            say(f"  export {variable(name)}={shlex.quote(str(getattr(configured, name)))}")
    for text in commands or ["stepfast run SKILL"]:
        say(output.clean(f"  {local.program()}{text.removeprefix('stepfast')}"))
    say("Ctrl-C stops everything.")
