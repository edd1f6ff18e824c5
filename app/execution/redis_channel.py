"""A mend for kombu 5.7 on Redis: a lost connection with a message in flight must not end the worker.

Celery closes the connection first; then `restore_unacked`, and later each acknowledgement, build a client on a channel
whose connection is gone, and fail with an AttributeError, which nobody expects: the worker ends as if by a bug. As the
ConnectionError that it is, Celery reconnects. A message that was restored too late is delivered twice, which the claim
refuses.
"""

from typing import Any

from kombu.transport.redis import Channel
from redis.exceptions import ConnectionError as RedisConnectionError


def mend() -> None:
    """Calling it again changes nothing."""
    original = Channel._connparams  # noqa: SLF001  # what is to be mended is not public
    if getattr(original, "is_mended", False):
        return

    def connparams(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # kombu is untyped
        if self.connection is None or self.connection.client is None:
            raise RedisConnectionError("the connection to the broker is gone")
        return original(self, *args, **kwargs)

    connparams.is_mended = True  # type: ignore[attr-defined]
    Channel._connparams = connparams  # type: ignore[method-assign]  # noqa: SLF001
