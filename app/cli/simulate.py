"""`stepfast simulate`."""

from pathlib import Path

import click

from app.errors import NotReady


@click.command()
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=0, help="On loopback; 0, the default, picks a free one."
)
@click.option("--script", type=click.Path(path_type=Path), metavar="FILE", help="Rules for its answers, in YAML.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides every sampled answer.")
def command(port: int, script: Path | None, seed: int) -> None:
    """Serve the Claude simulator on the loopback address until Ctrl-C.

    It speaks Anthropic's API: set ANTHROPIC_BASE_URL to the address that it prints, and ANTHROPIC_API_KEY to any text
    that begins with sk-.
    """
    try:
        from app.simulator.server import serve
    except ModuleNotFoundError as error:
        raise NotReady(
            f"The simulator needs the package {error.name}.", next_step="Run: pip install 'stepfast-app[demo]'"
        ) from error
    serve(script, port, seed)
