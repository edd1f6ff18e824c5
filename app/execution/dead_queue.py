"""The dead-letter queue on the broker: for each dead letter a message of its own, beside the row in Postgres.

Versioned JSON, its id in the message for deduplication; sent at least once; at most `dead_queue_max` wait, the oldest
leave first. The rows are the truth: nothing here is needed to resume a run.

Before it is sent a letter gets what `explain` says of its run just then, and the command to type next; both stay.
"""

from typing import TYPE_CHECKING
from uuid import UUID

from celery import current_app
from kombu.entity import Queue

from app import events
from app.crashpoints import CrashPoint, reach
from app.events import Event
from app.execution.canvas import BROKER_ERRORS
from app.redaction import redact_text
from app.runs.explain import explain
from app.runs.reads import Reads

if TYPE_CHECKING:
    from app.pipelines.model import Json
    from app.runs.store import Store

QUEUE = "stepfast.dead"
_BATCH = 100
_DROPPED_AT_ONCE_MAX = 1_000


def publish_pending(store: "Store", dead_queue_max: int) -> int:
    """Sends one batch of what is not sent yet. Returns how many: 0 where the broker is away; the sweep comes back."""
    payloads = [_told(store, payload) for payload in store.unpublished_dead_letters(_BATCH)]
    if not payloads:
        return 0
    try:
        with current_app.connection_for_write() as connection, connection.channel() as channel:
            queue = Queue(QUEUE, durable=True).bind(channel)
            waiting = queue.queue_declare().message_count
            # Redis has no limit of its own for a queue, so the oldest are taken off here, on either broker.
            for _ in range(min(max(0, waiting + len(payloads) - dead_queue_max), _DROPPED_AT_ONCE_MAX)):
                queue.get(no_ack=True)
            with current_app.amqp.Producer(channel) as producer:
                for payload in payloads:
                    reach(CrashPoint.DEAD_LETTER_BEFORE, payload["agent"])
                    producer.publish(
                        payload,
                        routing_key=QUEUE,
                        exchange="",
                        serializer="json",
                        delivery_mode=2,
                        message_id=payload["id"],
                        type="stepfast.dead_letter.v1",
                    )
                    reach(CrashPoint.DEAD_LETTER_SENT, payload["agent"])
    except BROKER_ERRORS as error:
        events.emit(Event.SEND_FAILED, queue=QUEUE, error=str(error))
        return 0
    store.mark_published([UUID(payload["id"]) for payload in payloads])
    for payload in payloads:
        reach(CrashPoint.DEAD_LETTER_AFTER, payload["agent"])
        events.emit(
            Event.DEAD_LETTER_PUBLISHED,
            run_id=payload["run_id"],
            agent=payload["agent"],
            pipeline=payload["pipeline"],
            code=payload["code"],
            dead_letter=payload["id"],
        )
    return len(payloads)


def _told(store: "Store", payload: "Json") -> "Json":
    if "explanation" in payload:
        return payload
    reads, run_id = Reads(store.engine), UUID(payload["run_id"])
    found = explain(reads.run(run_id), reads.event_list(run_id))
    told = {"explanation": redact_text(found.text), "next_step": found.command}
    return store.tell(UUID(payload["id"]), told)
