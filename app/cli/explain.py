"""`stepfast explain`."""

import click

from app.cli import embedding, output, system


@click.command()
@click.argument("run")
@embedding.option
@click.option("--json", "as_json", is_flag=True, help="Print {run_id, state, text, next}.")
def command(run: str, embedded: bool, as_json: bool) -> None:
    """Say in one paragraph what happened to a run, why, and the one command to type next.

    It is made of what is recorded, and the same for everybody who asks. RUN is the beginning of its id, or `last`.
    """
    worker = system.database(embedded=embedded)
    from app.runs.explain import explain
    from app.runs.reads import Reads

    reads = Reads(worker.store.engine)
    run_id = reads.run_id(run)
    found = reads.run(run_id)
    explained = explain(found, reads.event_list(run_id))
    following = embedding.following(explained.command, embedded=embedded) if explained.command else ""
    if as_json:
        output.print_json({"run_id": str(run_id), "state": found["state"], "text": explained.text, "next": following})
        return
    print(output.one_line(explained.text))
    if following:
        output.print_next(following)
