"""A provider of traces as the tests see it: takes OTLP over HTTP, decodes it, and fails or hangs where it is told to."""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from uuid import UUID

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Received:
    """A span, with ids in hexadecimal ("" for no parent) and attributes as Python values."""

    trace: str
    id: str
    parent: str
    name: str
    start_ns: int
    end_ns: int
    attributes: dict
    is_error: bool
    status: str
    links: tuple[tuple[str, str], ...]

    def json(self, attribute: str):
        return json.loads(self.attributes[attribute])


@dataclass
class Receiver:
    """`requests` are the path and the headers of each. While `hangs` is set, none is answered.

    `refuses` says of the spans of a request whether it is answered by 413.
    """

    url: str
    spans: list[Received] = field(default_factory=list)
    requests: list[tuple[str, dict]] = field(default_factory=list)
    status: int = 200
    refuses: Callable[[list[Received]], bool] = lambda _spans: False
    hangs: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def of(self, run_id) -> list[Received]:
        return [span for span in self.spans if span.trace == UUID(str(run_id)).hex]

    def one(self, run_id, name: str) -> Received:
        found = [span for span in self.of(run_id) if span.name == name]
        assert len(found) == 1, f"{name}: {[span.name for span in self.of(run_id)]}"
        return found[0]

    def tree(self, run_id) -> dict[str, list[str]]:
        """The names of spans, by those of their parents, each sorted; "" is above the roots."""
        spans = self.of(run_id)
        names = {span.id: span.name for span in spans} | {"": ""}
        found: dict[str, list[str]] = {}
        for span in spans:
            found.setdefault(names.get(span.parent, "?"), []).append(span.name)
        return {parent: sorted(children) for parent, children in found.items()}


def _value(value):
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind)


def _received(span) -> Received:
    return Received(
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.name,
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        {attribute.key: _value(attribute.value) for attribute in span.attributes},
        span.status.code == 2,
        span.status.message,
        tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
    )


@contextmanager
def receiving():
    """A receiver on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            receiver.requests.append((self.path, dict(self.headers.items())))
            if receiver.hangs.is_set():
                receiver.released.wait(60)
                return
            spans = [
                _received(span)
                for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans
                for of_scope in of_resource.scope_spans
                for span in of_scope.spans
            ]
            status = 413 if receiver.refuses(spans) else receiver.status
            if status == 200:
                receiver.spans.extend(spans)
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        receiver = Receiver(f"http://127.0.0.1:{server.server_address[1]}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield receiver
        finally:
            receiver.released.set()
            server.shutdown()
            thread.join()
