"""The Claude simulator through the real SDK over real HTTP: what it answers, what can be scripted, how it serves."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import anthropic
import httpx2
import jsonschema
import pytest
import simulating
from conftest import eventually
from simulating import ADD, HEADERS, USER, VERDICT, form, refused, texts

from app.errors import InvalidFile, NotReady
from app.simulator.schemas import sample
from app.simulator.script import load, parse
from app.simulator.server import Simulator

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def running():
    with simulating.running() as pair:
        yield pair


@pytest.fixture
def simulator(running):
    running.simulator.use(parse({}))
    return running.simulator


@pytest.fixture
def ask(running, simulator):
    return running.ask


@pytest.fixture
def client(running):
    return running.client


# Answers


def test_an_answer_has_the_shape_of_a_real_message(ask):
    """A plain answer opens with a thinking block on a model that always thinks, and ends its turn."""
    message = ask()
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert (message.stop_reason, message.role, message.model) == ("end_turn", "assistant", "claude-opus-5-5")
    assert message.to_dict()["usage"]["service_tier"] == "standard"


@pytest.mark.parametrize("seed", range(20))
def test_structured_output_fits_its_schema(ask, seed):
    """The text of a structured output is JSON that validates, and that heeds bounds told in descriptions."""
    message = ask(output_config=form(VERDICT), messages=[{"role": "user", "content": f"Number {seed}."}])
    answer = json.loads(texts(message)[0])
    jsonschema.validate(answer, VERDICT, format_checker=jsonschema.FormatChecker())
    assert 0.5 <= answer["confidence"] <= 1


def test_sampled_values_keep_the_bounds_of_tools_schemas():
    """Bounds, unions, recursion and uniqueness hold in what is sampled for a tool."""
    schema = {
        "type": "object",
        "properties": {
            "low": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.02},
            "high": {"type": "integer", "maximum": -5},
            "text": {"type": "string", "minLength": 40, "maxLength": 44},
            "set": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 3, "maxItems": 3, "uniqueItems": True},
            "either": {"type": ["boolean", "null"]},
            "tree": {"$ref": "#/$defs/tree"},
            "both": {"allOf": [{"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}]},
        },
        "required": ["low", "high", "text", "set", "either", "tree", "both"],
        "$defs": {
            "tree": {"type": "object", "properties": {"left": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]}}}
        },
    }
    for seed in range(200):
        jsonschema.validate(sample(schema, Random(seed)), schema)


def test_a_tool_is_called_and_its_result_ends_the_turn(ask):
    """A tool's call fits the tool's schema; the SDK's own answer passes back, and then comes text."""
    first = ask(tools=[ADD])
    assert first.stop_reason == "tool_use"
    call = next(block for block in first.content if block.type == "tool_use")
    jsonschema.validate(call.input, ADD["input_schema"])
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "12"}]}
    turns = [*USER, {"role": "assistant", "content": first.content}, result]
    assert ask(tools=[ADD], messages=turns).stop_reason == "end_turn"

    assert "Each `tool_result` block must have" in refused(ask, tools=[ADD], messages=[*USER, result])
    unanswered = [*USER, {"role": "assistant", "content": first.content}, {"role": "user", "content": "Well?"}]
    assert call.id in refused(ask, tools=[ADD], messages=unanswered)
    assert "signature" in refused(ask, tools=[ADD], messages=turns, model="claude-fable-5-2")


def test_a_stream_is_the_answer_in_the_real_order_of_events(simulator, client, ask):
    """A stream adds up to the very message that the same request gets at once, with a ping in between."""
    wanted = {"model": "claude-opus-5-5", "max_tokens": 1000, "messages": USER, "output_config": form(VERDICT)}
    with client.messages.stream(**wanted) as stream:
        streamed = stream.get_final_message()
    simulator.reset()
    whole = ask(output_config=form(VERDICT))
    assert streamed.to_dict() == whole.to_dict() | {"content": streamed.to_dict()["content"]}
    assert texts(streamed) == texts(whole) != []
    assert streamed.content[0].signature == whole.content[0].signature

    body = {**wanted, "stream": True}
    lines = httpx2.post(f"{simulator.url}/v1/messages", json=body, headers=HEADERS).text.splitlines()
    events = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert events[:4] == ["message_start", "content_block_start", "ping", "content_block_delta"]
    assert events[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_the_same_seed_gives_the_same_answers(ask):
    """Content is a function of seed and request, whatever was asked before."""
    first, second = ask(output_config=form(VERDICT)), ask(output_config=form(VERDICT))
    assert first.content == second.content
    assert first.id != second.id
    with Simulator(seed=8) as other, anthropic.Anthropic(api_key="sk-x", base_url=other.url, max_retries=0) as client:
        told = client.messages.create(
            model="claude-opus-5-5", max_tokens=1000, messages=USER, output_config=form(VERDICT)
        )
    assert texts(told) != texts(first)


def test_max_tokens_cuts_the_answer_and_counts_thinking(ask):
    """An answer longer than `max_tokens` is cut there; thinking counts, and may leave no room at all."""
    cut = ask(max_tokens=12, output_config={"effort": "low"})
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 12)
    assert cut.usage.output_tokens_details.thinking_tokens == 4
    nothing = ask(max_tokens=8)
    assert (nothing.stop_reason, texts(nothing)) == ("max_tokens", [])


def test_a_stop_sequence_ends_the_text(ask):
    """The text ends before the sequence, which the answer names."""
    message = ask(stop_sequences=["simulated"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "simulated")
    assert texts(message) == ["This is a "]


def test_cache_control_moves_tokens_from_input_to_cache(ask):
    """The first request stores the marked prefix, the second reads it, and the sum stays the same."""
    system = [{"type": "text", "text": "s" * 400, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    first, second = ask(system=system).usage, ask(system=system).usage
    assert (first.cache_creation_input_tokens, first.cache_read_input_tokens) == (101, 0)
    assert first.cache_creation.ephemeral_1h_input_tokens == 101
    assert (second.cache_creation_input_tokens, second.cache_read_input_tokens) == (0, 101)
    assert first.input_tokens == second.input_tokens == ask().usage.input_tokens > 0


def test_tokens_are_counted_as_they_are_billed(simulator, client, ask):
    """count_tokens gives what the same request reports as its input."""
    counted = client.messages.count_tokens(model="claude-opus-5-5", messages=USER, output_config=form(VERDICT))
    assert counted.input_tokens == ask(output_config=form(VERDICT)).usage.input_tokens


def test_rate_limits_and_ids_are_in_the_headers(simulator, client):
    """The SDK's raw response shows the limits and the request's id."""
    raw = client.messages.with_raw_response.create(model="claude-haiku-5-5", max_tokens=100, messages=USER)
    assert int(raw.headers["anthropic-ratelimit-requests-remaining"]) > 0
    assert raw.headers["request-id"] == raw.parse()._request_id


# Scripts


@pytest.mark.parametrize(
    ("status", "error", "type_"),
    [
        (400, anthropic.BadRequestError, "invalid_request_error"),
        (401, anthropic.AuthenticationError, "authentication_error"),
        (402, anthropic.APIStatusError, "billing_error"),
        (403, anthropic.PermissionDeniedError, "permission_error"),
        (404, anthropic.NotFoundError, "not_found_error"),
        (408, anthropic.APIStatusError, "timeout_error"),
        (409, anthropic.ConflictError, "conflict_error"),
        (413, anthropic.APIStatusError, "request_too_large"),
        (429, anthropic.RateLimitError, "rate_limit_error"),
        (500, anthropic.InternalServerError, "api_error"),
        (503, anthropic.InternalServerError, "api_error"),
        (504, anthropic.InternalServerError, "timeout_error"),
        (529, anthropic.InternalServerError, "overloaded_error"),
    ],
)
def test_every_scripted_status_is_the_sdks_error(simulator, ask, status, error, type_):
    """A scripted status reaches the caller as the SDK's class for it, with its type, message and Retry-After."""
    simulator.use(parse({"rules": [{"status": status, "error": {"message": "so it is"}, "retry_after_s": 2}]}))
    with pytest.raises(error) as caught:
        ask()
    assert (caught.value.status_code, caught.value.type, caught.value.api_message) == (status, type_, "so it is")
    assert caught.value.response.headers["retry-after"] == "2"


def test_a_spend_limit_is_told_by_its_code(simulator, ask):
    """`code` becomes `details.error_code`, by which the SDK and our own classes tell 429s apart."""
    error = {"code": "enforced_spend_limit_reached"}
    simulator.use(parse({"rules": [{"status": 429, "error": error}]}))
    with pytest.raises(anthropic.RateLimitError) as caught:
        ask()
    assert caught.value.error_code == "enforced_spend_limit_reached"


def test_a_rule_can_revoke_a_key(simulator, ask):
    """A rule on the key's header answers 401 to that key alone."""
    simulator.use(parse({"rules": [{"match": {"header": {"Authorization": "sk-test"}}, "status": 401}]}))
    with pytest.raises(anthropic.AuthenticationError):
        ask()
    ask(extra_headers={"authorization": "Bearer sk-other"})


def test_rules_are_tried_in_order_and_spent(simulator, ask):
    """The first rule that applies decides; `times` spends it, `nth` picks one call, and each rule is counted."""
    simulator.use(
        parse("""
            rules:
              - match: {system: "You are the (coder|tester)", user: Review}
                times: 1
                reply: {diff: "+1"}
              - match: {model: haiku, nth: 2}
                reply: second
              - match: {model: haiku, nth: [1, 3]}
                reply: odd
        """)
    )
    coder = {"system": [{"type": "text", "text": "You are the coder."}]}
    assert texts(ask(**coder)) == ['{"diff": "+1"}']
    assert texts(ask(**coder))[0].startswith("This is a simulated answer")
    assert [texts(ask(model="claude-haiku-5-5"))[0] for _ in range(3)] == ["odd", "second", "odd"]
    counts = [(count["matched"], count["applied"]) for count in simulator.state()["rules"]]
    assert counts == [(2, 1), (3, 1), (3, 2)]


def test_usage_and_stop_reasons_can_be_scripted(simulator, ask):
    """A rule replaces figures of usage; a refusal has no content, and max_tokens cuts the answer in half."""
    simulator.use(
        parse(
            {
                "rules": [
                    {"times": 1, "stop_reason": "refusal"},
                    {"times": 1, "stop_reason": "max_tokens", "reply": "12345678"},
                    {"usage": {"input_tokens": 5, "cache_read_input_tokens": 900, "thinking_tokens": 3}},
                ]
            }
        )
    )
    refusal = ask()
    assert (refusal.stop_reason, refusal.content, refusal.stop_details.type) == ("refusal", [], "refusal")
    assert (texts(cut := ask()), cut.stop_reason) == (["1234"], "max_tokens")
    usage = ask().usage
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (5, 900)
    assert usage.output_tokens_details.thinking_tokens == 3


def test_an_answer_can_be_no_json(simulator, ask):
    """`invalid_json` spoils a structured output, sampled or scripted."""
    simulator.use(parse({"rules": [{"times": 1, "invalid_json": True}, {"invalid_json": True, "reply": {"a": 1}}]}))
    for _ in range(2):
        with pytest.raises(json.JSONDecodeError):
            json.loads(texts(ask(output_config=form(VERDICT)))[0])


def test_a_stream_fails_in_the_middle(simulator, client, ask):
    """The error event reaches the caller after some content; a call that does not stream gets the status."""
    simulator.use(parse({"rules": [{"fail_midstream": True, "error": {"message": "too much"}}]}))
    seen = []
    with pytest.raises(anthropic.APIStatusError) as caught:
        seen.extend(event.type for event in ask(stream=True))
    assert "content_block_delta" in seen
    assert (caught.value.type, caught.value.api_message) == ("overloaded_error", "too much")
    with pytest.raises(anthropic.InternalServerError) as caught:
        ask()
    assert caught.value.status_code == 529


@pytest.mark.parametrize("stream", [False, True])
def test_a_truncated_answer_is_a_broken_connection(simulator, ask, stream):
    """The connection drops in the middle of the body, streamed or not."""
    simulator.use(parse({"rules": [{"truncate": True}]}))
    with pytest.raises((anthropic.APIConnectionError, httpx2.RemoteProtocolError)):
        list(ask(stream=stream))


@pytest.mark.parametrize(
    "rule", [{"drip_ms": 20}, {"drip_headers_ms": 1}, {"drip_ms": 5, "status": 529}, {"delay_ms": 500}]
)
def test_a_drip_keeps_a_read_timeout_from_firing(simulator, rule):
    """Bytes that keep coming outlast a read timeout; only a deadline of one's own ends them. A delay does not."""
    simulator.use(parse({"rules": [rule]}))
    body = {"model": "claude-haiku-5-5", "max_tokens": 100, "messages": USER, "stream": rule.get("drip_ms") == 20}
    began = time.monotonic()
    with httpx2.Client(timeout=httpx2.Timeout(0.25, connect=5, write=5)) as client:
        if "delay_ms" in rule:
            with pytest.raises(httpx2.ReadTimeout):
                client.post(f"{simulator.url}/v1/messages", json=body, headers=HEADERS)
            return
        answer = client.post(f"{simulator.url}/v1/messages", json=body, headers=HEADERS)
    assert time.monotonic() - began > 0.25
    assert answer.status_code == rule.get("status", 200)
    assert "message_stop" in answer.text if body["stream"] else answer.json()["type"] in ("message", "error")


def test_a_client_that_leaves_is_no_longer_in_flight(simulator):
    """A long delay ends with its client."""
    simulator.use(parse({"rules": [{"delay_ms": 600_000}]}))
    body = {"model": "claude-haiku-5-5", "max_tokens": 100, "messages": USER}
    with pytest.raises(httpx2.ReadTimeout):
        httpx2.post(f"{simulator.url}/v1/messages", json=body, headers=HEADERS, timeout=0.2)
    eventually(lambda: simulator.state()["in_flight"] == 0)
    assert simulator.state()["max_in_flight"] == 1


@pytest.mark.parametrize(
    ("script", "named"),
    [
        ({"rule": []}, "rule is unknown: did you mean rules?"),
        ({"rules": [{"repply": "x"}]}, "rules.0.repply is unknown: did you mean reply?"),
        ({"rules": [{"match": {"sistem": "x"}}]}, "rules.0.match.sistem is unknown: did you mean system?"),
        ({"rules": [{"usage": {"tokens": 1}}]}, "rules.0.usage.tokens is unknown"),
        ({"rules": [{"status": 418}]}, "rules.0.status"),
        ({"rules": [{"match": {"user": "("}}]}, "rules.0.match.user"),
        ({"rules": [{"delay_ms": "5"}]}, "rules.0.delay_ms"),
        ({"rules": [{"times": 0}]}, "rules.0.times"),
        ({"rules": [{"status": 500, "reply": "x"}]}, "takes no reply"),
        ({"rules": [{"retry_after_s": 1}]}, "needs a status"),
        ({"rules": [{"reply_file": "x"}]}, "itself a file"),
        ("rules: [", "no valid YAML"),
        ("- x", "valid dictionary"),
        ("a: &a [1]\nrules: *a", "aliases are not allowed"),
    ],
)
def test_a_bad_script_is_refused_by_name(script, named):
    """A script with an unknown key, a wrong value or a contradiction is refused, with the nearest valid name."""
    with pytest.raises(InvalidFile) as caught:
        parse(script)
    assert named in str(caught.value)


def test_replies_come_from_the_scripts_own_folder(simulator, ask, tmp_path):
    """A `reply_file` is read from beside the script, and never from outside, by path or by link."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    (folder / "reply.json").write_text('{"ok": true}')
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "secret.txt")
    script = folder / "script.yaml"
    script.write_text("rules: [{reply_file: reply.json}]")
    simulator.use(load(script))
    assert texts(ask()) == ['{"ok": true}']
    for path in ("../secret.txt", str(tmp_path / "secret.txt"), "link.txt", "none.txt", "."):
        script.write_text(json.dumps({"rules": [{"reply_file": path}]}))
        with pytest.raises(InvalidFile, match=r"outside|no file"):
            load(script)
    with pytest.raises(InvalidFile, match="is no file"):
        load(folder / "none.yaml")


# The server


def test_a_script_can_be_set_and_state_reset_over_http(simulator, ask):
    """The simulator's own paths set a script, refuse a bad one by name, show the state and reset it."""
    own = f"{simulator.url}/_simulator"
    assert httpx2.post(f"{own}/script", content="rules: [{reply: scripted}]").status_code == 200
    assert texts(ask()) == ["scripted"]
    bad = httpx2.post(f"{own}/script", content="rulez: []")
    assert (bad.status_code, "did you mean rules" in bad.text) == (400, True)
    state = httpx2.get(f"{own}/state").json()
    assert state == {"requests": 1, "in_flight": 0, "max_in_flight": 1, "rules": [{"matched": 1, "applied": 1}]}
    [record] = httpx2.get(f"{own}/requests").json()
    assert (record["path"], record["status"], record["body"]["messages"]) == ("/v1/messages", 200, USER)
    assert record["headers"]["authorization"] == "redacted"
    assert httpx2.post(f"{own}/reset").json()["requests"] == len(simulator.requests) == 0
    assert texts(ask()) == ["scripted"]


def test_a_taken_port_is_named():
    """A port that is taken is told in one sentence."""
    with Simulator() as one, pytest.raises(NotReady, match="cannot be used"):
        Simulator(port=int(one.url.rpartition(":")[2]))


@pytest.fixture
def process():
    """The simulator as a process: (the process, its URL)."""
    command = [sys.executable, "-m", "app.simulator", "--seed", "3"]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with started:
        yield started, started.stdout.readline().split()[-1]
        started.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_process_says_where_it_listens_and_stops_cleanly(process, number):
    """One line on stdout ends with the URL, on loopback; a signal ends the process with 0 and no traceback."""
    started, url = process
    assert url.startswith("http://127.0.0.1:")
    assert httpx2.get(f"{url}/_simulator/state").json()["requests"] == 0
    os.kill(started.pid, number)
    out, err = started.communicate(timeout=10)
    assert (started.returncode, out, err) == (0, "", "")


def test_the_process_names_a_bad_script(tmp_path):
    """A bad script ends the process with 2 and one sentence."""
    (tmp_path / "bad.yaml").write_text("rulez: []")
    command = [sys.executable, "-m", "app.simulator", "--script", str(tmp_path / "bad.yaml")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "did you mean rules?" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_thousand_requests_at_once_are_all_answered(process):
    """With 1,000 requests in flight at the same moment, each gets its answer."""
    _, url = process
    port = int(url.rpartition(":")[2])
    body = json.dumps(
        {"model": "claude-haiku-5-5", "max_tokens": 500, "messages": USER, "output_config": form(VERDICT)}
    )
    head = (
        f"POST /v1/messages HTTP/1.1\r\nhost: x\r\nx-api-key: sk-a\r\nanthropic-version: 2023-06-01\r\n"
        f"connection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )

    async def all_at_once():
        connections = []
        for _ in range(1000):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write((head + body[:-1]).encode())  # the last byte is held back: the request is in flight
            connections.append((reader, writer))
        await asyncio.to_thread(eventually, lambda: httpx2.get(f"{url}/_simulator/state").json()["in_flight"] == 1000)
        for _, writer in connections:
            writer.write(body[-1:].encode())
        answers = await asyncio.gather(*(reader.read() for reader, _ in connections))
        for _, writer in connections:
            writer.close()
            await writer.wait_closed()
        return answers

    answers = asyncio.run(asyncio.wait_for(all_at_once(), 25))
    assert {answer.split(b"\r\n", 1)[0] for answer in answers} == {b"HTTP/1.1 200 OK"}
    jsonschema.validate(json.loads(json.loads(answers[-1].partition(b"\r\n\r\n")[2])["content"][1]["text"]), VERDICT)
    state = httpx2.get(f"{url}/_simulator/state").json()
    assert (state["requests"], state["max_in_flight"], state["in_flight"]) == (1000, 1000, 0)
