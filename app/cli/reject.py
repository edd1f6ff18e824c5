"""`stepfast reject`."""

import click

from app.cli import approve, embedding, show, system
from app.cli.embedding import Embedding


@click.command()
@click.argument("run")
@click.argument("agent")
@click.option("--reason", required=True, help="Why, for the record and for whoever reads the run.")
@embedding.option
@click.option("--json", "as_json", is_flag=True, help="Print {run_id, agent, decision, digest, by}.")
def command(run: str, agent: str, reason: str, embedded: bool, as_json: bool) -> None:
    """Refuse what AGENT is about to do. RUN is the beginning of a run's id, or `last`.

    The agent is cancelled, and its failure_mode says what becomes of the run. It leaves no dead letter.
    """
    worker = system.database_and_broker(embedded=embedded)
    from app import operations
    from app.runs.reads import Reads

    found, _, approval = operations.waiting(worker, Reads(worker.store.engine).run_id(run), agent)
    approve.decide(worker, found["id"], approval, approved=False, reason=reason, as_json=as_json)
    if not as_json:
        print(f"{agent} is rejected.")
        show.print_now(worker, found["id"], Embedding() if embedded else None)
