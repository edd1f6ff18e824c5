"""HTTP for the SDK that ends at a deadline, whatever the other side does.

The SDK's timeouts bound each read, so a server that sends a byte now and then holds a call for ever. Here every
connect, read and write gets what is left until the deadline of the call, which stands in a context variable: no thread
watches, and it holds in each of Celery's pools. Answers are bounded too.

Two things differ from the SDK's own transport. A proxy (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY) must be an
http:// one: TLS inside TLS and SOCKS have no bounded reads. And looking up a host's name is left to the system, whose
resolver has its own limits (usually 5 s a try).
"""

import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpcore2
import httpx2

from app import events
from app.clock import Deadline
from app.crashpoints import CrashPoint, reach

# Below the idle time after which servers usually hang up, so that a call seldom meets a connection that just closed.
IDLE_MAX_S = 5.0
# The answer's body. The largest that the API gives (128,000 tokens) has a tenth of this.
BODY_MAX_BYTES = 16_000_000

# A long answer is silent until it is complete, and networks forget silent connections.
_KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), 60)
        for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL")
        if hasattr(socket, name)
    ),
)

# Never by way of a proxy: the simulator.
_HERE = {"localhost", "127.0.0.1", "::1"}

_deadline: ContextVar[Deadline] = ContextVar("stepfast_http_deadline")


class ProxyRefused(ValueError):
    """The environment names a proxy through which no deadline would hold."""


@contextmanager
def ending_at(deadline: Deadline) -> Iterator[None]:
    """Every request inside must be made, and its body read, by the deadline."""
    token = _deadline.set(deadline)
    try:
        yield
    finally:
        _deadline.reset(token)


class Transport(httpx2.BaseTransport):
    """Connections to one origin, or to the proxy before it: as many as there are calls at once. Raises ProxyRefused.

    httpcore2's own pool looks at each of its connections before and after every call, under one lock: of 1,000 calls in
    flight every one waited for seconds. So it makes the connections here, and those that are idle stand in a row.
    """

    def __init__(self, url: httpx2.URL) -> None:
        pool = httpcore2.ConnectionPool(
            ssl_context=httpx2.create_ssl_context(),
            proxy=_proxy(url),
            keepalive_expiry=IDLE_MAX_S,
            network_backend=_Network(),
            socket_options=_KEEP_ALIVE,
        )
        self._connect = pool.create_connection
        # The one used last is the last. Each operation is atomic: no thread waits for another here.
        self._idle: deque[httpcore2.ConnectionInterface] = deque()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        assert isinstance(request.stream, httpx2.SyncByteStream)
        url = request.url
        wanted = httpcore2.Request(
            method=request.method,
            url=httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        connection = self._idle_one() or self._connect(wanted.url.origin)
        try:
            with _translated():
                response = connection.handle_request(wanted)
        except BaseException:
            connection.close()
            raise
        return httpx2.Response(
            status_code=response.status,
            headers=response.headers,
            stream=_Body(response, lambda: self._give_back(connection)),
            extensions=response.extensions,
        )

    def _idle_one(self) -> httpcore2.ConnectionInterface | None:
        while self._idle:
            with suppress(IndexError):  # another thread took it
                connection = self._idle.pop()
                if not connection.has_expired():
                    return connection
                connection.close()
        return None

    def _give_back(self, connection: httpcore2.ConnectionInterface) -> None:
        """Keeps it, if its answer was read to the end, and closes what has been idle for too long."""
        if connection.is_idle():
            self._idle.append(connection)
        else:
            connection.close()
        with suppress(IndexError):
            while (oldest := self._idle.popleft()).has_expired():
                oldest.close()
            self._idle.appendleft(oldest)

    def close(self) -> None:
        while self._idle:
            with suppress(IndexError):
                self._idle.pop().close()


class _Body(httpx2.SyncByteStream):
    def __init__(self, response: httpcore2.Response, closed: Callable[[], None]) -> None:
        self._response = response
        self._closed: Callable[[], None] | None = closed

    def __iter__(self) -> Iterator[bytes]:
        left_bytes = BODY_MAX_BYTES
        with _translated():
            for chunk in self._response.iter_stream():
                left_bytes -= len(chunk)
                if left_bytes < 0:
                    raise httpx2.ReadError(f"The answer has more than {BODY_MAX_BYTES:,} bytes.")
                yield chunk

    def close(self) -> None:
        closed, self._closed = self._closed, None
        if closed:
            with _translated():
                self._response.close()
            closed()


@contextmanager
def _translated() -> Iterator[None]:
    """The SDK tells a timeout from another failure by httpx2's exceptions."""
    try:
        yield
    except httpcore2.TimeoutException as error:
        raise httpx2.ReadTimeout(str(error)) from error
    except (httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.ProxyError) as error:
        raise httpx2.ReadError(str(error)) from error


class _Network(httpcore2.NetworkBackend):
    """Connects to a host's addresses in turn, with one deadline for all of them."""

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        until = Deadline.after_ms(max(1, round(_left_s(timeout, httpcore2.ConnectTimeout) * 1000)))
        try:
            addresses = {str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        except OSError as error:
            raise httpcore2.ConnectError(f"{host} is not found: {error}") from error
        failure: Exception = httpcore2.ConnectError(f"{host} has no address.")
        for address in sorted(addresses, key=lambda text: ":" in text):
            if until.passed:
                raise httpcore2.ConnectTimeout(f"{host} did not accept a connection in time.")
            try:
                stream = httpcore2.SyncBackend().connect_tcp(
                    address, port, until.remaining_s(), local_address, socket_options
                )
            except httpcore2.ConnectError as error:
                failure = error
            else:
                return _Stream(stream)
        raise failure


class _Stream(httpcore2.NetworkStream):
    """A connection each of whose operations ends by the deadline of the call that uses it now."""

    def __init__(self, inner: httpcore2.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        reach(CrashPoint.CALL_SENT, str(events.bound_fields().get("agent")))
        return self._inner.read(max_bytes, _left_s(timeout, httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Sends piece by piece: a reader that drips must not get the whole time again for each of its sips."""
        connection = self._inner.get_extra_info("socket")
        view = memoryview(buffer)
        while view:
            connection.settimeout(_left_s(timeout, httpcore2.WriteTimeout))
            try:
                view = view[connection.send(view) :]
            except TimeoutError as error:
                raise httpcore2.WriteTimeout(str(error)) from error
            except OSError as error:
                raise httpcore2.WriteError(str(error)) from error

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        left_s = _left_s(timeout, httpcore2.ConnectTimeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, left_s))

    def get_extra_info(self, info: str) -> Any:  # noqa: ANN401  # httpcore2's own signature
        return self._inner.get_extra_info(info)


def _left_s(timeout_s: float | None, late: type[httpcore2.TimeoutException]) -> float:
    left_s = _deadline.get().remaining_s()
    if left_s <= 0:
        raise late("The deadline has passed.")
    return left_s if timeout_s is None else min(timeout_s, left_s)


def _proxy(url: httpx2.URL) -> httpcore2.Proxy | None:
    proxies = getproxies()
    named = proxies.get(url.scheme) or proxies.get("all")
    if not named or url.host in _HERE or proxy_bypass(url.host):
        return None
    proxy = httpx2.Proxy(named if "://" in named else f"http://{named}")
    if proxy.url.scheme != "http":
        raise ProxyRefused(f"The proxy for {url.scheme} is {proxy.url.scheme}://…, and must be an http:// one.")
    return httpcore2.Proxy(url=str(proxy.url), auth=proxy.raw_auth)
