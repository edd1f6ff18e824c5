"""`stepfast run`."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from app import settings
from app.cli import embedding as embeddings
from app.cli import inputs, output, system, watch
from app.errors import UnknownName
from app.pipelines.run_input import check_input

if TYPE_CHECKING:
    from app.pipelines.model import Json


@click.command()
@click.argument("name_or_skill")
@click.option("--input", "given", multiple=True, metavar="K=V", help=inputs.HELP)
@click.option("--key", help="Starting twice with one key gives one run.")
@click.option(
    "--priority", type=click.IntRange(0, 9), default=0, show_default=True, help="Higher ones start before others."
)
@click.option("--tenant", default="default", show_default=True, help="For whom: keys are each tenant's own.")
@click.option("--label", "labels", multiple=True, metavar="K=V", help=inputs.LABEL_HELP)
@click.option("--watch", "follow", is_flag=True, help="Follow the run to its end; exit 1 if it fails.")
@click.option("--embedded", is_flag=True, help="On servers and workers of its own, which live as long as this command.")
@click.option("--simulate", is_flag=True, help="With --embedded: Claude is simulated, and nothing is paid for.")
@click.option("--json", "as_json", is_flag=True, help="Print the run, as `show` does, and `created`.")
def command(  # noqa: PLR0913, PLR0917  # one parameter an option
    name_or_skill: str,
    given: tuple[str, ...],
    key: str | None,
    priority: int,
    tenant: str,
    labels: tuple[str, ...],
    follow: bool,
    embedded: bool,
    simulate: bool,
    as_json: bool,
) -> int:
    """Start a run of a published pipeline, by its NAME, or of a SKILL: a path that ends in .yaml, or ./folder.

    A SKILL is published first. --embedded implies --watch.
    """
    skill = Path(name_or_skill) if system.is_skill(name_or_skill) else None
    embedding = embeddings.embedding(embedded=embedded, simulate=simulate, skill=skill)
    configured = settings.load()
    pipeline = system.load_skill(skill) if skill else None
    run_input, labelled = inputs.parse(given, configured.input_max_bytes), inputs.labels(labels)
    from app import operations

    # Before anything is started: what is refused here leaves nothing behind.
    check_input(run_input, configured.input_max_bytes, pipeline.input_schema if pipeline else None)
    if embedding and not simulate and pipeline and any(agent.model for agent in pipeline.agents):
        embeddings.refuse_without_key()
    with embedding.workers() if embedding else nullcontext():
        worker = system.database_and_broker()
        if pipeline:
            operations.publish(worker, pipeline)
        name = pipeline.name if pipeline else name_or_skill
        try:
            started = operations.start(
                worker, name, run_input, key=key, tenant=tenant, labels=labelled, priority=priority
            )
        except UnknownName as error:
            if Path(name).is_dir():
                raise UnknownName(error.message, next_step=f"To run the folder: stepfast run ./{name}") from error
            raise
        if not as_json:
            who = f"Started {name} as run" if started.created else f"The key {key} has started run"
            print(output.one_line(f"{who} {started.run_id}{'' if started.created else ' already'}."), flush=True)
        fields: Json | None = {"created": started.created} if as_json else None
        return watch.finish(worker, started.run_id, follow=follow or embedded, fields=fields, embedding=embedding)
