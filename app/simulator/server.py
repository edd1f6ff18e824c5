"""The simulator as an HTTP server, on the loopback address only.

Beside Anthropic's paths it has four of its own:

    GET  /_simulator/requests   the last requests: at (seconds since 1970), method, path, headers (keys redacted), body,
                                status
    GET  /_simulator/state      {requests, in_flight, max_in_flight, rules: [{matched, applied}]}
    POST /_simulator/reset      forgets requests, counts and the prompt cache; the script stays
    POST /_simulator/script     sets a new script (YAML or JSON) and resets; 400 names what is wrong with it

Every path below /v1 counts as a request; scripts decide `POST /v1/messages` only.
"""

import asyncio
import json
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from app.errors import InvalidFile, NotReady
from app.simulator import answers, requests
from app.simulator.catalogue import MODELS
from app.simulator.requests import ApiError
from app.simulator.script import ERROR_TYPES, Call, Count, Rule, Script, choose, load, parse

HOST = "127.0.0.1"
BACKLOG_MAX = 2048
RECORDS_MAX = 1_000
RECORDED_BODY_MAX_BYTES = 100_000
STOP_TIMEOUT_S = 10.0
REQUESTS_LIMIT = 4_000
TOKENS_LIMIT = 2_000_000
_SECRET_HEADERS = ("x-api-key", "authorization", "proxy-authorization", "cookie")


@dataclass(slots=True)
class Record:
    """One request. `status` is None until it is answered; `body` is None where it was no JSON or too long to keep.

    `at` is when its headers were there, in seconds since 1970: other processes and Postgres have the same clock.
    """

    number: int
    at: float
    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any] | None = None
    status: int | None = None


@dataclass(slots=True)
class _Traffic:
    """Everything that a reset forgets, and the script that it is counted by: replaced as one, from any thread."""

    script: Script
    counts: list[Count]
    records: deque[Record] = field(default_factory=lambda: deque(maxlen=RECORDS_MAX))
    requests: int = 0
    in_flight: int = 0
    max_in_flight: int = 0
    cache: answers.PromptCache = field(default_factory=answers.PromptCache)


class _Dropped(Exception):
    """Ends a body early, so that the server closes the connection."""


class _Api:
    """The ASGI application. All of it runs in one event loop; other threads only read, or replace `traffic`."""

    def __init__(self, script: Script, seed: int) -> None:
        self.seed = seed
        self.use(script)
        self._routes = Starlette(
            routes=[
                Route("/v1/messages", self.messages, methods=["POST"]),
                Route("/v1/messages/count_tokens", self.count_tokens, methods=["POST"]),
                Route("/v1/models", self.models, methods=["GET"]),
                Route("/_simulator/requests", self.recorded, methods=["GET"]),
                Route("/_simulator/state", self.current_state, methods=["GET"]),
                Route("/_simulator/reset", self.forget, methods=["POST"]),
                Route("/_simulator/script", self.new_script, methods=["POST"]),
            ],
            exception_handlers={
                ApiError: self.failed,
                HTTPException: self.not_routed,
                ClientDisconnect: self.failed,
                Exception: self.failed,
            },
        )

    def use(self, script: Script) -> None:
        self.traffic = _Traffic(script, [Count() for _ in script.rules])

    def reset(self) -> None:
        self.use(self.traffic.script)

    def state(self) -> dict[str, Any]:
        traffic = self.traffic
        return {
            "requests": traffic.requests,
            "in_flight": traffic.in_flight,
            "max_in_flight": traffic.max_in_flight,
            "rules": [asdict(count) for count in traffic.counts],
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self._routes(scope, receive, send)
        traffic = self.traffic  # a reset in between must not let the old request end in the new traffic
        traffic.requests += 1
        traffic.in_flight += 1
        traffic.max_in_flight = max(traffic.max_in_flight, traffic.in_flight)
        headers = Request(scope).headers
        kept = {name: "redacted" if name in _SECRET_HEADERS else value for name, value in headers.items()}
        record = Record(traffic.requests, time.time(), scope["method"], scope["path"], kept)
        traffic.records.append(record)
        # uvicorn's `send` belongs to the connection, whose transport writes single bytes of the headers.
        scope["state"] = {"traffic": traffic, "record": record, "transport": cast("Any", send).__self__.transport}
        try:
            await self._routes(scope, receive, send)
        finally:
            traffic.in_flight -= 1

    async def messages(self, request: Request) -> Response:
        body = await self._body(request)
        requests.check_message(body)
        traffic: _Traffic = request.state.traffic
        call = Call(body["model"], answers.system_text(body), answers.user_text(body), dict(request.headers))
        rule = choose(traffic.script, call, traffic.counts) or Rule()
        await _pause(request, rule.delay_ms)
        number = request.state.record.number
        streams = body.get("stream") is True
        if rule.status or (rule.fail_midstream and not streams):
            return self._deliver(request, _scripted_error(rule), rule)
        message = answers.answer(body, rule, seed=self.seed, number=number, cache=traffic.cache)
        if not streams:
            return self._deliver(request, message, rule)
        events = answers.events(message)
        if rule.fail_midstream:
            events = answers.broken_off(events, _scripted_error(rule).error)
        return self._deliver(request, events, rule)

    async def count_tokens(self, request: Request) -> Response:
        body = await self._body(request)
        requests.check_count(body)
        return self._deliver(request, {"input_tokens": answers.count_input_tokens(body)}, Rule())

    async def models(self, request: Request) -> Response:
        requests.authenticate(dict(request.headers))
        data = [
            {
                "type": "model",
                "id": name,
                "display_name": name.replace("-", " ").title(),
                "created_at": "2026-01-01T00:00:00Z",
                "lifecycle": "active",
                "max_tokens": model.output_max_tokens,
                "max_input_tokens": model.context_max_tokens,
            }
            for name, model in MODELS.items()
        ]
        page = {"data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]}
        return self._deliver(request, page, Rule())

    async def recorded(self, _: Request) -> Response:
        return JSONResponse([asdict(record) for record in self.traffic.records])

    async def current_state(self, _: Request) -> Response:
        return JSONResponse(self.state())

    async def forget(self, _: Request) -> Response:
        self.reset()
        return JSONResponse(self.state())

    async def new_script(self, request: Request) -> Response:
        try:
            self.use(parse((await _content(request)).decode()))
        except (InvalidFile, UnicodeDecodeError) as error:
            raise ApiError(400, str(error)) from None
        return JSONResponse(self.state())

    async def _body(self, request: Request) -> dict[str, Any]:
        content = await _content(request)
        requests.authenticate(dict(request.headers))
        body = requests.parse(content)
        if len(content) <= RECORDED_BODY_MAX_BYTES:
            request.state.record.body = body
        return body

    async def not_routed(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return await self.failed(request, ApiError(error.status_code, error.detail, type_="not_found_error"))

    async def failed(self, request: Request, error: Exception) -> Response:
        if not isinstance(error, ApiError):
            error = ApiError(500, f"The simulator itself failed: {error!r}")
        if not request.url.path.startswith("/v1/"):
            return JSONResponse({"error": error.error}, error.status)
        return self._deliver(request, error, Rule())

    def _deliver(
        self, request: Request, answer: ApiError | dict[str, Any] | Iterator[dict[str, Any]], rule: Rule
    ) -> Response:
        """The HTTP response for an error, a JSON body or a stream's events, at the pace that the rule demands."""
        record: Record = request.state.record
        ids = {"request-id": answers.request_id(self.seed, record.number), "anthropic-organization-id": "simulator"}
        record.status = 200
        headers = {**ids, **_rate_limits(request.state.traffic), "content-type": "application/json"}
        if isinstance(answer, ApiError):
            record.status = answer.status
            headers |= answer.headers
            answer = {"type": "error", "error": answer.error, "request_id": ids["request-id"]}
        if isinstance(answer, dict):
            whole = json.dumps(answer).encode()
            headers["content-length"] = str(len(whole))
            slowly = rule.drip_ms or rule.truncate
            chunks = [whole[at : at + 1] for at in range(len(whole))] if slowly else [whole]
        else:
            headers |= {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
            chunks = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in answer]
        if rule.drip_headers_ms:
            return _DrippedHeaders(
                b"".join(chunks), record.status, headers, rule.drip_headers_ms, request.state.transport
            )
        if len(chunks) == 1:
            return Response(chunks[0], record.status, headers)
        return StreamingResponse(_paced(chunks, rule), record.status, headers)


def _scripted_error(rule: Rule) -> ApiError:
    """The error that a rule describes. A rule without a status breaks a stream off: its error's type decides."""
    type_ = rule.error.type or ERROR_TYPES[rule.status or 529]
    fitting: list[int] = [status for status, name in ERROR_TYPES.items() if name == type_]
    status = rule.status or (fitting[0] if fitting else 500)
    headers = {} if rule.retry_after_s is None else {"retry-after": f"{rule.retry_after_s:.3f}".rstrip("0").rstrip(".")}
    return ApiError(
        status, rule.error.message or f"Scripted: {type_}", type_=type_, code=rule.error.code, headers=headers
    )


def _rate_limits(traffic: _Traffic) -> dict[str, str]:
    """docs/en/api/rate-limits. What is in flight is all that counts against the limits here."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    headers = {}
    for kind, limit, used in (
        ("requests", REQUESTS_LIMIT, traffic.in_flight),
        ("tokens", TOKENS_LIMIT, 0),
        ("input-tokens", TOKENS_LIMIT, 0),
        ("output-tokens", TOKENS_LIMIT, 0),
    ):
        headers[f"anthropic-ratelimit-{kind}-limit"] = str(limit)
        headers[f"anthropic-ratelimit-{kind}-remaining"] = str(max(0, limit - used))
        headers[f"anthropic-ratelimit-{kind}-reset"] = now
    return headers


async def _content(request: Request) -> bytes:
    """The body's bytes, refused as soon as they are too many."""
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > requests.BODY_MAX_BYTES:
            raise ApiError(413, "Request exceeds the maximum size", headers={"connection": "close"})
    return bytes(content)


async def _pause(request: Request, delay_ms: int) -> None:
    """Waits, unless the client goes away first: once the body is read, all that can still arrive is its farewell."""
    if delay_ms:
        with suppress(TimeoutError):
            await asyncio.wait_for(request.receive(), delay_ms / 1000)
            raise ClientDisconnect


async def _paced(chunks: list[bytes], rule: Rule) -> AsyncIterator[bytes]:
    for chunk in chunks[: len(chunks) // 2] if rule.truncate else chunks:
        yield chunk
        if rule.drip_ms:
            await asyncio.sleep(rule.drip_ms / 1000)
    if rule.truncate:
        raise _Dropped


class _DrippedHeaders(Response):
    """Writes the head of the answer byte by byte, past uvicorn, which would send it whole; then closes."""

    def __init__(
        self, content: bytes, status: int, headers: dict[str, str], drip_ms: int, transport: asyncio.Transport
    ) -> None:
        super().__init__(content, status, headers)
        self.drip_ms = drip_ms
        self.transport = transport

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  # ASGI's signature
        lines = [b"HTTP/1.1 %d %s" % (self.status_code, HTTPStatus(self.status_code).phrase.encode())]
        lines += [name + b": " + value for name, value in self.raw_headers]
        for byte in b"\r\n".join([*lines, b"connection: close", b"", b""]):
            if self.transport.is_closing():
                return
            self.transport.write(bytes([byte]))
            await asyncio.sleep(self.drip_ms / 1000)
        self.transport.write(bytes(self.body))
        self.transport.close()
        while (await receive())["type"] != "http.disconnect":
            pass


class Simulator:
    """Runs the simulator in a thread of this process, between `with` and its end.

    `port` 0 picks a free port. Raises NotReady if the port is taken.
    """

    def __init__(self, script: Script | None = None, seed: int = 0, port: int = 0) -> None:
        self._api = _Api(script or Script(), seed)
        # asyncio sets TCP_NODELAY only where the protocol is named; without, each answer waits 40 ms for an ACK.
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((HOST, port))
        except (OSError, OverflowError) as error:
            self._socket.close()
            raise NotReady(f"Port {port} cannot be used: {error}.", next_step="Choose another one, or 0.") from None
        self._socket.listen(BACKLOG_MAX)  # from here on, who connects is served, if need be when the loop runs
        self.url = f"http://{HOST}:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            self._api,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG_MAX,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="simulator", daemon=True)

    def __enter__(self) -> Self:
        requests.warm_up()
        self._thread.start()
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(STOP_TIMEOUT_S)
        self._socket.close()
        assert not self._thread.is_alive()

    @property
    def requests(self) -> list[Record]:
        """The last requests below /v1, oldest first."""
        return list(self._api.traffic.records)

    def state(self) -> dict[str, Any]:
        """What `/_simulator/state` shows."""
        return self._api.state()

    def reset(self) -> None:
        """Forgets requests, counts and the prompt cache; the script stays."""
        self._api.reset()

    def use(self, script: Script) -> None:
        """Sets another script, and resets."""
        self._api.use(script)


def serve(script_path: Path | None = None, port: int = 0, seed: int = 0) -> None:
    """Serves until SIGINT or SIGTERM. Ready is said by one line on stdout that ends with the URL.

    Raises InvalidFile for a bad script, NotReady for a port that is taken.
    """
    stop = threading.Event()
    script = load(script_path) if script_path else Script()
    with Simulator(script, seed, port) as simulator:
        before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            sys.stdout.write(f"Claude simulator: {simulator.url}\n")
            sys.stdout.flush()
            stop.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
