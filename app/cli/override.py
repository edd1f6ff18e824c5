"""`stepfast override`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from app import settings
from app.cli import embedding, inputs, output, show, system
from app.cli.embedding import Embedding
from app.errors import InvalidOutput, Misuse

if TYPE_CHECKING:
    from uuid import UUID

    from app.execution.worker import Worker
    from app.pipelines.model import Json


@click.command()
@click.argument("run")
@click.argument("agent")
@click.option("--output", "file", required=True, type=click.Path(path_type=Path), help="A file: the output, as JSON.")
@click.option("--reason", help="Why, for the record.")
@embedding.option
@click.option("--json", "as_json", is_flag=True, help="Print the run, as `show` does, and `done_again`: the agents.")
def command(run: str, agent: str, file: Path, reason: str | None, embedded: bool, as_json: bool) -> None:
    """Give AGENT's output by hand, as an attempt of yours. RUN is the beginning of a run's id, or `last`.

    The output must fit the agent's schema. What was done on the old output is done again; a run that has failed waits
    for `resume`.
    """
    given = inputs.read_object(file, "output", settings.load().output_max_bytes)
    worker = system.database_and_broker(embedded=embedded)
    from app import operations
    from app.runs.reads import Reads

    reads = Reads(worker.store.engine)
    run_id = reads.run_id(run)
    again = _override(worker, run_id, agent, given, reason)
    if as_json:
        output.print_json({**operations.document(worker, run_id), "done_again": again})
        return
    print(output.one_line(f"The output of {agent} is what {file} says."))
    if again:
        print(f"Done again, because they were given the old one: {', '.join(again)}.")
    show.print_now(worker, str(run_id), Embedding() if embedded else None)


def _override(worker: "Worker", run_id: "UUID", agent: str, given: "Json", reason: str | None) -> tuple[str, ...]:
    from app import operations

    try:
        return operations.override(worker, run_id, agent, given, by=system.user(), reason=reason)
    except InvalidOutput as error:
        # An agent's mistake elsewhere; here it is the caller's.
        raise Misuse(error.message, next_step="Mend the file: nothing was changed.") from error
