"""The outputs that an attempt reads, and leaves, where the pipeline's checkpoints are cached on Redis."""

import json
from typing import TYPE_CHECKING

from app.execution.persistence import OUTAGE_MAX_S, through_outage

if TYPE_CHECKING:
    from uuid import UUID

    from app.execution.worker import Worker
    from app.pipelines.model import Json, Pipeline
    from app.runs.store import Claim


def caches(worker: "Worker", pipeline: "Pipeline") -> bool:
    """Whether the file asks for a cache, and this worker has one."""
    return worker.cache is not None and pipeline.checkpointing.store == "redis"


def outputs(worker: "Worker", run_id: "UUID", pipeline: "Pipeline", claim: "Claim") -> "dict[str, Json]":
    """What a lean claim reads: from the cache, and from Postgres where it is not there."""
    assert worker.cache is not None
    found = worker.cache.get({read["attempt"]: read["hash"] for read in claim.reads.values()})
    missing = {read["attempt"] for read in claim.reads.values()} - found.keys()
    if missing:
        texts = through_outage(lambda: worker.store.outputs(run_id, missing), max_s=OUTAGE_MAX_S)
        for attempt_id, text in texts.items():
            found[attempt_id] = json.loads(text)
            worker.cache.put(attempt_id, text.encode(), pipeline.checkpointing.ttl_minutes)
    return {name: found[read["attempt"]] for name, read in claim.reads.items()}


def keep(worker: "Worker", pipeline: "Pipeline", attempt_id: "UUID", output: "Json") -> None:
    """Fills the cache with what was committed."""
    if worker.cache is not None and caches(worker, pipeline):
        from app.runs.output_cache import as_postgres_spells

        worker.cache.put(str(attempt_id), as_postgres_spells(output), pipeline.checkpointing.ttl_minutes)
