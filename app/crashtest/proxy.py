"""A way to a server's unix socket by loopback TCP that can be cut: the network between a worker and its database."""

import asyncio
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

CHUNK_MAX_BYTES = 65_536
STOP_TIMEOUT_S = 10.0


class Proxy:
    """Carries connections between `with` and its end, in a thread of its own."""

    host = "127.0.0.1"

    def __init__(self, target: Path) -> None:
        self._target = target
        self._open = True
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="crashtest-proxy", daemon=True)
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        starting = asyncio.start_server(self._carry, self.host, 0)
        self._server = asyncio.run_coroutine_threadsafe(starting, self._loop).result(STOP_TIMEOUT_S)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(STOP_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_TIMEOUT_S)
        self._loop.close()

    def drop(self) -> None:
        """Resets every connection; new ones are taken."""
        self._loop.call_soon_threadsafe(self._abort)

    def cut(self) -> None:
        """Resets every connection, and each new one, until `heal`."""
        self._open = False
        self.drop()

    def heal(self) -> None:
        self._open = True

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _stop(self) -> None:
        self._server.close()
        self._abort()
        mine = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not mine]
        await asyncio.gather(*others, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._open:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_unix_connection(str(self._target))
        except OSError:  # the server is away
            writer.transport.abort()
            return
        self._writers |= {writer, far_writer}
        await asyncio.gather(self._pipe(reader, far_writer), self._pipe(far_reader, writer))
        self._writers -= {writer, far_writer}

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await reader.read(CHUNK_MAX_BYTES):
                writer.write(chunk)
                await writer.drain()
        writer.close()
