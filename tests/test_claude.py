"""Calls of Claude through the real SDK, over real HTTP, against the simulator and against servers that misbehave."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from working import GOOD, KEY, SCHEMA, emitting, settings_for, work

from app.agents import claude
from app.clock import Deadline
from app.errors import (
    AccountProblem,
    AuthorMistake,
    InvalidOutput,
    ModelRefused,
    OutputCut,
    RateLimited,
    TimedOut,
    Unavailable,
)
from app.events import Event
from app.simulator.script import parse
from app.simulator.server import Simulator

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def running():
    claude.warm_up()
    with Simulator(seed=7) as simulator:
        yield simulator
        claude.close()


@pytest.fixture
def ask(running):
    """Calls the simulator, which answers by the one rule given."""

    def ask(rule=None, *, settings=None, **fields):
        running.use(parse({"rules": [rule] if rule else []}))
        return claude.call(work(**fields), settings or settings_for(running.url))

    yield ask
    claude.close()


@pytest.fixture
def fails(ask):
    """The error that a call ends with."""

    def fails(kind, rule=None, **fields):
        with pytest.raises(kind) as caught:
            ask(rule, **fields)
        assert type(caught.value) is kind
        assert KEY not in f"{caught.value} {caught.value.details}"
        return caught.value

    return fails


# Answers


def test_answer_comes_with_usage_cost_and_request_id(ask, running):
    """What was paid for is told: tokens by kind, cost, model and request."""
    usage = {"input_tokens": 100, "output_tokens": 50, "cache_read_input_tokens": 20, "thinking_tokens": 5}
    with emitting() as seen:
        answer = ask({"reply": GOOD, "usage": usage}, model="claude-3-5-sonnet")
    assert answer.output == GOOD
    assert answer.usage == {
        "input_tokens": 120,
        "output_tokens": 50,
        "cache_read_tokens": 20,
        "cache_creation_tokens": 0,
        "thinking_tokens": 5,
    }
    assert answer.cost_usd > 0
    assert answer.model == "claude-sonnet-5-5"
    assert answer.request_id.startswith("req_")
    [(event, fields)] = seen
    assert event is Event.MODEL_CALLED
    assert fields["request_id"] == answer.request_id
    assert fields["cost_usd"] == answer.cost_usd
    assert fields["duration_ms"] >= 0
    assert "good" not in str(fields)
    assert KEY not in str(fields)


def test_answer_without_a_schema_is_its_text(ask):
    """An agent without a schema puts out {"text": …}."""
    assert ask({"reply": "Fine, all of it."}, schema=None).output == {"text": "Fine, all of it."}


def test_sampled_answer_fits_the_schema(ask):
    """The simulator takes the very request that is built, and its answer passes our own validation."""
    assert ask(effort="high").output.keys() == GOOD.keys()


def test_one_request_per_call_and_one_connection_for_many(ask, running):
    """No retry beneath ours, and connections are shared."""
    with pytest.raises(Unavailable):
        ask({"status": 529})
    assert running.state()["requests"] == 1
    assert len(claude._clients) == 1


def test_many_threads_share_one_client(ask, running):
    """200 calls in flight at once, all answered."""
    running.use(parse({"rules": [{"reply": GOOD, "delay_ms": 500}]}))
    settings = settings_for(running.url)
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda _: claude.call(work(timeout_ms=20_000), settings), range(200)))
    assert all(answer.output == GOOD for answer in answers)
    assert running.state()["max_in_flight"] > 10  # a busy machine starts threads slowly
    assert len(claude._clients) == 1


# Answers that are of no use, and were paid for


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (OutputCut, {"reply": GOOD, "stop_reason": "max_tokens"}),
        (ModelRefused, {"stop_reason": "refusal"}),
        (AuthorMistake, {"reply": GOOD, "stop_reason": "model_context_window_exceeded"}),
        (InvalidOutput, {"reply": GOOD, "stop_reason": "pause_turn"}),
        (InvalidOutput, {"invalid_json": True}),
        (InvalidOutput, {"reply": "[1, 2]"}),
        (InvalidOutput, {"reply": '{"verdict": "good", "score": NaN}'}),
        (InvalidOutput, {"reply": '{"verdict": "good", "score": 1e999}'}),
        (InvalidOutput, {"reply": '{"verdict": "good", "score": ' + "9" * 5000 + "}"}),
        (InvalidOutput, {"reply": "[" * 50_000}),
        (InvalidOutput, {"reply": {"verdict": "good"}}),
        (InvalidOutput, {"reply": {**GOOD, "score": 2}}),
        (InvalidOutput, {"reply": {**GOOD, "more": 1}}),
    ],
)
def test_useless_answer_is_an_error_of_its_own_with_its_cost(fails, kind, rule):
    """Stop reasons and invalid outputs are told apart, and what they cost is known."""
    error = fails(kind, rule)
    assert error.usage["input_tokens"] > 0
    assert error.cost_usd > 0
    assert len(str(error)) < 1_000


def test_invalid_output_names_the_place_and_never_the_value(fails):
    """What breaks the schema is told by path and rule."""
    error = fails(InvalidOutput, {"reply": {"verdict": "hunter2", "score": 7}})
    assert "output.verdict breaks 'enum'" in error.message
    assert "output.score breaks 'maximum': 1" in error.message
    assert "hunter2" not in f"{error} {error.details}"


def test_broken_json_is_shown_near_the_fault_unless_something_is_sensitive(fails):
    """Where JSON ends to be JSON, some of it is shown; never where the schema declares secrets."""
    rule = {"reply": '{"verdict": "good", score}'}
    assert "score}" in fails(InvalidOutput, rule).details["near"]
    hidden = {**SCHEMA, "properties": {**SCHEMA["properties"], "score": {"type": "number", "x-sensitive": True}}}
    assert fails(InvalidOutput, rule, schema=hidden).details == {}


@pytest.mark.parametrize("text", ["a\\u0000b", "\\ud800"])
@pytest.mark.parametrize("of", ["a value", "a key"])
def test_what_postgres_cannot_store_is_refused_with_its_place(fails, text, of):
    """NULs and lone surrogates, in values and in keys."""
    open_schema = {"type": "object", "properties": {"deep": {"type": "array", "items": {"type": "string"}}}}
    reply = f'{{"deep": ["ok", "{text}"]}}' if of == "a value" else f'{{"{text}": 1}}'
    error = fails(InvalidOutput, {"reply": reply}, schema=open_schema)
    assert error.message.startswith("output.deep[1] holds a NUL" if of == "a value" else "output has a key")


def test_nul_in_a_plain_text_is_refused(fails):
    """Text without a schema is stored too."""
    fails(InvalidOutput, {"reply": "a\0b"}, schema=None)


def test_deep_output_is_refused(fails):
    """Deeper than any reader of it could follow."""
    open_schema = {"type": "object", "properties": {}}
    fails(InvalidOutput, {"reply": '{"a":' * 200 + "1" + "}" * 200}, schema=open_schema)


def test_large_output_is_refused(fails, running):
    """Outputs are bounded, in bytes."""
    settings = settings_for(running.url, output_max_bytes=1_000)
    fails(InvalidOutput, {"reply": "x" * 1_001}, schema=None, settings=settings)


def test_endless_answer_is_refused(fails, monkeypatch):
    """A body is not read beyond its limit."""
    monkeypatch.setattr("app.agents.transport.BODY_MAX_BYTES", 50_000)
    assert "50,000 bytes" in fails(Unavailable, {"reply": "x" * 60_000}, schema=None).message


# Errors of the API


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        (AuthorMistake, 400, None),
        (AccountProblem, 400, "organization_on_hold"),
        (AccountProblem, 401, None),
        (AccountProblem, 402, None),
        (AccountProblem, 403, None),
        (AuthorMistake, 404, None),
        (Unavailable, 408, None),
        (Unavailable, 409, None),
        (AuthorMistake, 413, None),
        (RateLimited, 429, None),
        (RateLimited, 429, "ramp_limit_exceeded"),
        (AccountProblem, 429, "enforced_spend_limit_reached"),
        (AccountProblem, 429, "contract_spend_limit_reached"),
        (Unavailable, 500, None),
        (Unavailable, 503, None),
        (Unavailable, 504, None),
        (Unavailable, 529, None),
    ],
)
def test_each_status_says_who_must_act(fails, kind, status, code):
    """Retryable, the operator's, or the author's: with the API's words and the request's id."""
    error = fails(kind, {"status": status, "error": {"message": "because of this", "code": code}})
    assert "because of this" in error.message
    assert error.details["status"] == status
    assert error.details["request_id"].startswith("req_")
    assert error.usage is None


@pytest.mark.parametrize(("given", "obeyed"), [(7, 7.0), (3600, 120.0), (None, None)])
def test_retry_after_is_obeyed_up_to_a_cap(fails, given, obeyed):
    """A header must not stall a step for an hour."""
    rule = {"status": 429} | ({"retry_after_s": given} if given else {})
    assert fails(RateLimited, rule).retry_after_s == obeyed


def test_revoked_key_is_named_by_its_variable(fails):
    """The message says which variable to mend, and how to go on."""
    error = fails(AccountProblem, {"status": 401, "error": {"message": f"invalid x-api-key {KEY}"}})
    assert "ANTHROPIC_API_KEY" in error.message
    assert "stepfast resume" in error.next_step


@pytest.mark.parametrize("key", [None, "", "sk-ant with a blank", "sk-ant-line\n", "sk-ä"])
def test_missing_or_malformed_key_is_found_before_any_request(fails, running, key):
    """No request leaves without a usable key."""
    error = fails(AccountProblem, settings=settings_for(running.url, anthropic_api_key=key))
    assert "ANTHROPIC_API_KEY" in error.message
    assert running.state()["requests"] == 0


@pytest.mark.parametrize("url", ["nonsense", "ftp://here", "http://"])
def test_unusable_base_url_is_the_operators(fails, url):
    """The variable that is wrong is named."""
    assert "ANTHROPIC_BASE_URL" in fails(AccountProblem, settings=settings_for(url)).message


def test_unusable_proxy_is_the_operators(fails, monkeypatch):
    """A proxy through which no deadline would hold is refused by name, not used."""
    monkeypatch.setenv("HTTP_PROXY", "https://127.0.0.1:9")
    assert "http://" in fails(AccountProblem, settings=settings_for("http://api.example.com")).message


def test_nobody_listens(fails):
    """A refused connection is retried later, and says why it failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert "refused" in fails(Unavailable, settings=settings_for(url)).message


def test_connection_that_breaks_off_is_unavailable(fails):
    """Half an answer is no answer."""
    fails(Unavailable, {"reply": GOOD, "truncate": True})


@pytest.mark.parametrize("body", [b"<html>Log in to the hotel's network</html>", b'{"hello": 1}', b"[]"])
def test_answer_of_something_else_is_unavailable(fails, body):
    """A captive portal's 200 is no message."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: %d\r\n\r\n" % len(body)
    with serving(lambda connection: connection.sendall(head + body)) as url:
        assert "text/html" in fails(Unavailable, settings=settings_for(url)).message


def test_redirect_is_the_operators(fails):
    """A key is not carried to wherever somebody points."""
    head = b"HTTP/1.1 307 Moved\r\nlocation: http://127.0.0.1:9/\r\ncontent-length: 0\r\n\r\n"
    with serving(lambda connection: connection.sendall(head)) as url:
        assert "307" in fails(AccountProblem, settings=settings_for(url)).message


# The deadline


@contextmanager
def serving(answer):
    """A server of one's own: reads one request, then does what it likes with the connection. Yields its URL."""
    over = threading.Event()

    def serve():
        while not over.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(10)
                try:
                    _read_request(connection)
                    answer(connection)
                except OSError:
                    pass

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            assert not thread.is_alive()


def _read_request(connection):
    """All of it: closing a connection with unread bytes would take the answer away from the client."""
    read = b""
    while b"\r\n\r\n" not in read:
        read += connection.recv(65_536)
    head, _, body = read.partition(b"\r\n\r\n")
    length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
    while len(body) < length:
        body += connection.recv(65_536)


def _drip(text):
    def drip(connection):
        pause = threading.Event()
        for byte in text:
            connection.sendall(bytes([byte]))
            pause.wait(0.05)

    return drip


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"


@pytest.mark.parametrize("drip", [HEAD + b"{" * 400, HEAD[:20] + b"x" * 400], ids=["body", "headers"])
@pytest.mark.parametrize("where", ["main thread", "another thread"])
def test_deadline_holds_against_drips(drip, where):
    """A byte every 50 ms keeps each read alive, and does not keep the call alive."""
    with serving(_drip(drip)) as url:
        late, settings = work(timeout_ms=400), settings_for(url)
        started_s = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            waits = {
                "main thread": lambda: claude.call(late, settings),
                "another thread": lambda: pool.submit(claude.call, late, settings).result(10),
            }
            with pytest.raises(TimedOut):
                waits[where]()
        assert 0.35 < time.monotonic() - started_s < 5  # the drips would go on for 20 s
        claude.close()


def test_deadline_holds_where_nothing_is_read_or_answered(monkeypatch):
    """A server that takes neither the request nor time to answer: the write, and then the read, end in time."""
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for size in (10, 8_000_000):
            started_s = time.monotonic()
            with pytest.raises(TimedOut):
                claude.call(work(given={"text": "x" * size}, timeout_ms=600), settings_for(url))
            assert 0.5 < time.monotonic() - started_s < 5
        claude.close()


@pytest.mark.parametrize("rule", [{"delay_ms": 60_000}, {"drip_ms": 50}, {"drip_headers_ms": 50}])
def test_deadline_holds_against_the_simulators_delays(fails, rule):
    """The simulator can be as slow."""
    started_s = time.monotonic()
    fails(TimedOut, {"reply": GOOD, **rule}, timeout_ms=500)
    assert time.monotonic() - started_s < 5


def test_passed_deadline_makes_no_request(ask, running):
    """Nothing is asked for that nobody would wait for."""
    late = work()
    object.__setattr__(late, "deadline", Deadline(0.0))
    running.reset()
    with pytest.raises(TimedOut):
        claude.call(late, settings_for(running.url))
    assert running.state()["requests"] == 0


def test_next_call_on_the_connection_has_its_own_deadline(ask):
    """A deadline belongs to a call, not to a connection."""
    for timeout_ms in (5_000, 300, 5_000):
        slow = {"reply": GOOD, "delay_ms": 600} if timeout_ms == 300 else {"reply": GOOD}
        try:
            assert ask(slow, timeout_ms=timeout_ms).output == GOOD
        except TimedOut:
            assert timeout_ms == 300


def test_long_answers_need_no_stream(ask):
    """The SDK refuses many tokens without a timeout; ours is always given."""
    assert ask({"reply": GOOD}, max_tokens=60_000, timeout_ms=3_600_000).output == GOOD


# Forks and proxies


def test_forked_child_makes_its_own_client(ask, running):
    """Two processes must never talk over one connection."""
    ask({"reply": GOOD})
    [parents] = claude._clients.values()
    with claude._lock:  # as if another thread were just making a client
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if not claude._clients:
                    answer = claude.call(work(), settings_for(running.url))
                    [childs] = claude._clients.values()
                    code = 0 if answer.output == GOOD and childs is not parents else 2
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert ask({"reply": GOOD}).output == GOOD


def test_calls_go_through_the_proxy_of_the_environment(monkeypatch):
    """HTTP_PROXY is obeyed, with its password, for any host but this machine's own."""
    heard = []
    body = json.dumps({"type": "error", "error": {"type": "api_error", "message": "the proxy spoke"}}).encode()

    def proxy(connection):
        connection.sendall(b"HTTP/1.1 502 No\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        heard.append(True)

    with serving(proxy) as url:
        monkeypatch.setenv("HTTP_PROXY", url.replace("http://", "http://me:secret@"))
        with pytest.raises(Unavailable, match="the proxy spoke"):
            claude.call(work(), settings_for("http://api.example.com"))
        claude.close()
    assert heard == [True]


def test_importing_the_room_costs_little():
    """A command line, and a worker of handlers, do not wait for the SDK."""
    heavy = "{'anthropic', 'httpx2', 'jsonschema', 'genai_prices', 'sqlalchemy', 'pydantic'}"
    code = f"import sys, app.agents, app.agents.claude, app.agents.handlers; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
