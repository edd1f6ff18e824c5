"""`stepfast resume`."""

from contextlib import nullcontext
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click

from app.cli import bulk, embedding, inputs, output, plan, system, watch
from app.errors import Misuse

if TYPE_CHECKING:
    from app.cli.embedding import Embedding
    from app.pipelines.model import Json


@click.command()
@click.argument("run", required=False)
@click.option("--from", "from_agent", metavar="AGENT", help="Do AGENT, and all that depends on it, again.")
@click.option("--plan", "only_plan", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--failed", is_flag=True, help="All failed runs that a resume can mend, instead of one RUN.")
@click.option("--pipeline", metavar="NAME", help="With --failed: only runs of this pipeline.")
@click.option(
    "--since", metavar="T", callback=inputs.since, help="With --failed: only what failed since 2h, 3d or an ISO time."
)
@click.option("--yes", is_flag=True, help="With --failed: do not ask.")
@click.option("--watch", "follow", is_flag=True, help="Follow the run to its end; exit 1 if it fails again.")
@click.option("--embedded", is_flag=True, help="On servers and workers of its own, which live as long as this command.")
@click.option("--simulate", is_flag=True, help="With --embedded: Claude is simulated, and nothing is paid for.")
@click.option("--skill", type=click.Path(path_type=Path), help="With --embedded: the skill whose handlers are needed.")
@click.option("--json", "as_json", is_flag=True, help="Print the plan; or the run, as `show` does, and `resumed`.")
def command(  # noqa: PLR0913, PLR0917  # one parameter an option
    run: str | None,
    from_agent: str | None,
    only_plan: bool,
    failed: bool,
    pipeline: str | None,
    since: datetime | timedelta | None,
    yes: bool,
    follow: bool,
    embedded: bool,
    simulate: bool,
    skill: Path | None,
    as_json: bool,
) -> int:
    """Continue a failed run from its last checkpoint. RUN is the beginning of its id, or `last`.

    What is completed stays, and is not paid for again; what was given up gets a new budget of attempts. With --from
    everything from that agent on is done again, on purpose. --embedded implies --watch.

    --failed resumes all failed runs but those that a resume cannot mend: refused gates, unknown outcomes, authors'
    errors, and what a person decided. Where more than 5 failed alike, one goes first, and the others only if it gets
    past the step that failed.
    """
    if failed:
        if run or from_agent or follow or embedded or simulate or skill:
            raise Misuse("--failed goes with --pipeline, --since, --plan, --yes and --json.", next_step=_HELP)
        return bulk.resume_failed(pipeline, since, only_plan=only_plan, yes=yes, as_json=as_json)
    if run is None or pipeline or since or yes:
        raise Misuse("Name a RUN, or use --failed, which --pipeline, --since and --yes belong to.", next_step=_HELP)
    if only_plan:
        plan.show(run, from_agent, embedded=embedded, as_json=as_json)
        return 0
    workers = embedding.embedding(embedded=embedded, simulate=simulate, skill=skill)
    with workers.workers() if workers else nullcontext():
        return _resume(run, from_agent, follow=follow, workers=workers, as_json=as_json)


_HELP = "See: stepfast resume --help"


def _resume(run: str, from_agent: str | None, *, follow: bool, workers: "Embedding | None", as_json: bool) -> int:
    worker = system.database_and_broker()
    from app import operations
    from app.runs.reads import Reads

    reads = Reads(worker.store.engine)
    run_id = reads.run_id(run)
    agents = operations.resume(worker, run_id, by=system.user(), from_agent=from_agent)
    before = max(entry["seq"] for entry in reads.event_list(run_id) if entry["name"] == "run.resumed") - 1
    if not as_json:
        other = reads.run(run_id)["blocked_by"]
        waits = f"waits for run {output.short(other)}, which has the same concurrency key, then " if other else ""
        print(f"Run {run_id} {waits}goes on{' with ' if agents else ''}{', '.join(agents)}.", flush=True)
    fields: Json | None = {"resumed": agents} if as_json else None
    follows = follow or workers is not None
    return watch.finish(worker, run_id, follow=follows, fields=fields, embedding=workers, after_seq=before)
