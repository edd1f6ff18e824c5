"""A read cache of committed outputs on Redis, for `checkpointing: {store: redis}`. Postgres keeps them all.

An entry is named by its attempt and holds the output as Postgres spells it, so that the hash that a reader pinned
proves it: what is missing, expired, cut or forged is a miss, and is read from Postgres.
"""

import hashlib
import json
import time
import zlib
from typing import TYPE_CHECKING, Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from app import events
from app.events import Event

if TYPE_CHECKING:
    from collections.abc import Mapping

    from app.pipelines.model import Json

# A step must not wait for a cache: one that does not answer so soon is not asked for a while.
ANSWER_MAX_S = 0.25
AWAY_S = 5.0
COMPRESSED_FROM_BYTES = 262_144
TTL_MINUTES = 60  # where the file says none
_PLAIN, _ZLIB = b"-", b"z"


def as_postgres_spells(output: "Json") -> bytes:
    """The text of a jsonb. Numbers that Postgres spells otherwise make an entry that nobody takes."""
    return json.dumps(_sorted(output), ensure_ascii=False).encode("utf-8", "surrogatepass")


def _sorted(value: object) -> object:
    """As jsonb sorts: keys by their length in bytes, then by their bytes."""
    match value:
        case dict():
            keys = sorted(value, key=lambda key: (len(key.encode()), key.encode()))
            return {key: _sorted(value[key]) for key in keys}
        case list() | tuple():
            return [_sorted(entry) for entry in value]
        case _:
            return value


class OutputCache:
    """Over one Redis; safe for threads, and not for use across a fork. Never raises for what Redis does."""

    def __init__(self, url: str, max_bytes: int) -> None:
        """`max_bytes` bounds what an entry may unfold into."""
        prefix, _, rest = url.partition("redis+socket://")
        # The form that brokers' URLs have.
        address = url if prefix else f"unix://{rest.replace('virtual_host=', 'db=')}"
        self._redis = Redis.from_url(
            address,
            socket_timeout=ANSWER_MAX_S,
            socket_connect_timeout=ANSWER_MAX_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._max_bytes = max_bytes
        self._away_until_s = 0.0

    def get(self, pins: "Mapping[str, str]") -> "dict[str, Json]":
        """The outputs that are there, by attempt id; `pins` are the hashes that they must have."""
        if not pins or time.monotonic() < self._away_until_s:
            return {}
        try:
            entries: list[Any] = self._redis.mget([_name(attempt_id) for attempt_id in pins])
        except RedisError as error:
            self._note(error)
            return {}
        found = {}
        for (attempt_id, pinned), entry in zip(pins.items(), entries, strict=True):
            text = self._unpacked(entry) if entry else b""
            if hashlib.sha256(text).hexdigest() == pinned:
                found[attempt_id] = json.loads(text)
        return found

    def put(self, attempt_id: str, text: bytes, ttl_minutes: int | None) -> None:
        """Keeps an output, as Postgres spells it. Only for what is committed."""
        if time.monotonic() < self._away_until_s:
            return
        packed = _ZLIB + zlib.compress(text, 1) if len(text) > COMPRESSED_FROM_BYTES else _PLAIN + text
        try:
            self._redis.set(_name(attempt_id), packed, ex=(ttl_minutes or TTL_MINUTES) * 60)
        except RedisError as error:
            self._note(error)

    def close(self) -> None:
        self._redis.close()

    def _unpacked(self, entry: bytes) -> bytes:
        try:
            unpacked = zlib.decompressobj().decompress(entry[1:], self._max_bytes) if entry[:1] == _ZLIB else entry[1:]
        except zlib.error:
            return b""
        return unpacked

    def _note(self, error: RedisError) -> None:
        self._away_until_s = time.monotonic() + AWAY_S
        events.emit(Event.CACHE_AWAY, message=f"Outputs are read from Postgres: {error}")


def _name(attempt_id: str) -> str:
    return f"stepfast:output:{attempt_id}"
