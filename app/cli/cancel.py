"""`stepfast cancel`."""

import click

from app.cli import embedding, output, show, system
from app.cli.embedding import Embedding


@click.command()
@click.argument("run")
@click.option("--reason", help="Why, for the record.")
@embedding.option
@click.option("--json", "as_json", is_flag=True, help="Print the run, as `show` does.")
def command(run: str, reason: str | None, embedded: bool, as_json: bool) -> None:
    """End a run that has not ended. RUN is the beginning of its id, or `last`.

    What executes is fenced: whatever it still says is not recorded. `resume` lets the run go on.
    """
    worker = system.database(embedded=embedded)
    from app import operations
    from app.runs.reads import Reads

    reads = Reads(worker.store.engine)
    run_id = reads.run_id(run)
    operations.cancel(worker, run_id, by=system.user(), reason=reason)
    if as_json:
        output.print_json(operations.document(worker, run_id))
        return
    print(f"Run {run_id} is cancelled.")
    show.print_now(worker, str(run_id), Embedding() if embedded else None)
