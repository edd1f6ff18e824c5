"""kombu 5.7 on Redis, as steps need it: what is mended, and what is left out because Postgres holds it already.

Mended: a lost connection with a message in flight must not end the worker. Celery closes the connection first; then
`restore_unacked`, and later each acknowledgement, build a client on a channel whose connection is gone, and fail with
an AttributeError, which nobody expects: the worker ends as if by a bug. As the ConnectionError that it is, Celery
reconnects. A message that was restored too late is delivered twice, which the claim refuses.

Left out: kombu makes a client for each command, which takes longer than the command; and it writes each message that a
worker takes into Redis, and removes it when it is acknowledged, so that another worker finds it after the visibility
timeout. A step is found in Postgres, and sooner: its message, and the one that asks to look after a run, are kept in
this process alone. That was a fifth of a worker's time.
"""

from typing import Any

from kombu.transport import virtual
from kombu.transport.redis import Channel, QoS
from redis.exceptions import ConnectionError as RedisConnectionError

from app.execution.canvas import DISPATCH_TASK, STEP_TASK

FOUND_IN_POSTGRES = {STEP_TASK, DISPATCH_TASK}


class StepQoS(QoS):
    """Of the messages that a worker has taken, those that Postgres knows of are not written into Redis."""

    def append(self, message: Any, delivery_tag: str) -> None:  # noqa: ANN401  # kombu is untyped
        if message.headers.get("task") in FOUND_IN_POSTGRES:
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        if self._kept(delivery_tag):
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        if self._kept(delivery_tag) and not requeue:
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().reject(delivery_tag, requeue)

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:  # noqa: ANN401
        """Gives a message back to its queue, where it was not acknowledged."""
        if not (message := self._kept(tag)):
            super().restore_by_tag(tag, client, leftmost)
        elif tag not in self._dirty:
            where = message.delivery_info
            with self.channel.conn_or_acquire(client) as redis:
                self.channel._do_restore_message(  # noqa: SLF001
                    message._raw,  # noqa: SLF001
                    where["exchange"],
                    where["routing_key"],
                    redis,
                    leftmost,
                )

    def _kept(self, tag: str) -> Any:  # noqa: ANN401
        message = self._delivered.get(tag)
        return message if message and message.headers.get("task") in FOUND_IN_POSTGRES else None


def mend() -> None:
    """Calling it again changes nothing."""
    if Channel.QoS is StepQoS:
        return
    Channel.QoS = StepQoS
    connparams, create_client = Channel._connparams, Channel._create_client  # noqa: SLF001  # not public

    def connected(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if self.connection is None or self.connection.client is None:
            raise RedisConnectionError("the connection to the broker is gone")
        return connparams(self, *args, **kwargs)

    def one_client(self: Any, asynchronous: bool = False) -> Any:  # noqa: ANN401
        if asynchronous:
            return create_client(self, asynchronous)
        known = self.__dict__.get("_stepfast_client")
        if known is None or known.connection_pool is not self.pool:
            known = self.__dict__["_stepfast_client"] = create_client(self)
        return known

    Channel._connparams = connected  # type: ignore[method-assign]  # noqa: SLF001
    Channel._create_client = one_client  # type: ignore[method-assign]  # noqa: SLF001
