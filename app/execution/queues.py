"""The broker's queues of steps, and the place beside them for what is no step of ours.

A message that is malformed or unknown is rejected. RabbitMQ keeps it in `stepfast.strays`, through a dead-letter
exchange; Redis has no such exchange: there it is logged.
"""

from typing import TYPE_CHECKING, Any

from amqp import Channel as AMQPChannel
from celery import current_app
from celery.app.amqp import AMQP, Queues
from kombu.entity import Exchange, Queue

if TYPE_CHECKING:
    from collections.abc import Collection

STRAYS = "stepfast.strays"
STRAYS_MAX = 10_000


class StepQueue(Queue):
    """Declared together with the place for its strays: what was rejected before that place existed would be gone."""

    def declare(self, nowait: bool = False, channel: Any = None) -> str:  # noqa: ANN401  # kombu is untyped
        if isinstance(channel or self.channel, AMQPChannel):
            arguments = {"x-queue-type": "quorum", "x-max-length": STRAYS_MAX}
            strays = Queue(STRAYS, Exchange(STRAYS, type="fanout"), queue_arguments=arguments)
            strays.bind(channel or self.channel).declare()
        return str(super().declare(nowait=nowait, channel=channel))


def step_queue(name: str) -> StepQueue:
    """The declaration of a queue. Redis ignores its arguments."""
    arguments = {"x-queue-type": "quorum", "x-dead-letter-exchange": STRAYS}
    return StepQueue(name, Exchange(name, type="direct"), name, queue_arguments=arguments)


class _Queues(Queues):
    """Also a queue that a skill file names, and nobody configured."""

    def new_missing(self, name: str) -> StepQueue:
        return step_queue(name)


class StepAMQP(AMQP):
    queues_cls = _Queues


def empty_queues(names: "Collection[str]") -> tuple[str, ...]:
    """Which of these queues hold no waiting message. A queue that does not exist (a wiped broker) is empty."""
    empty = []
    with current_app.connection_for_write() as connection:
        for name in names:
            with connection.channel() as channel:
                try:
                    waiting = channel.queue_declare(name, passive=True).message_count
                except connection.channel_errors:
                    waiting = 0
                if waiting == 0:
                    empty.append(name)
    return tuple(empty)
