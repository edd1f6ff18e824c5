"""Calls Claude by the SDK: one request an attempt, no retries beneath ours, ended by the attempt's deadline.

The answer is not streamed: a step needs it whole, and an answer of 217 events took 8 ms of CPU instead of 1 (measured).
So what a call cost that ended without an answer (a timeout, a dropped connection) is not known; of every other it is,
also where the answer is of no use.
"""

import json
import os
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app import events
from app.agents import requests
from app.agents.outputs import check_output, parse_output
from app.agents.pricing import cost_usd
from app.agents.work import Answer, Work
from app.clock import monotonic_s
from app.errors import AccountProblem, AuthorMistake, InvalidOutput, ModelRefused, OutputCut, Unavailable
from app.events import Event
from app.observe import traces
from app.pipelines.model import Json
from app.settings import Settings

if TYPE_CHECKING:
    import anthropic
    import httpx2

DEFAULT_URL = "https://api.anthropic.com"
# Beyond this the network is at fault, not the model: no reason to spend the agent's whole time on it.
CONNECT_MAX_S = 10.0

_KEY = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class _Reply:
    """A message of the API, read without trust in its shape."""

    text: str
    model: str
    stop_reason: object
    stop_details: Json
    usage: dict[str, int]
    cost_usd: float | None
    request_id: str | None


def call(work: Work, settings: Settings) -> Answer:
    """Makes one call. Raises AgentError, with usage and cost where the API answered."""
    _check_key(settings)
    import anthropic
    import httpx2

    from app.agents.api_errors import timed_out, translate
    from app.agents.transport import ending_at

    request = requests.build(work, settings)
    client = traces.watched(_client(settings))
    left_s = work.deadline.remaining_s()
    if not left_s:
        raise timed_out(work)
    started_s = monotonic_s()
    try:
        with ending_at(work.deadline):
            response = client.messages.with_raw_response.create(
                **request, timeout=httpx2.Timeout(left_s, connect=min(left_s, CONNECT_MAX_S))
            )
    except anthropic.AnthropicError as error:
        raise translate(error, work, settings) from error
    reply = _read(response.http_response, request["model"])
    _emit_called(reply, response.http_response.headers, round((monotonic_s() - started_s) * 1000))
    try:
        output = _output(reply, work, settings)
    except (OutputCut, ModelRefused, InvalidOutput, AuthorMistake) as error:
        error.usage, error.cost_usd = reply.usage, reply.cost_usd
        raise
    return Answer(output, reply.usage, reply.cost_usd, reply.model, reply.request_id)


def _output(reply: _Reply, work: Work, settings: Settings) -> Json:
    agent = work.agent
    match reply.stop_reason:
        case "end_turn" | "stop_sequence":
            pass
        case "max_tokens":
            raise OutputCut(
                f"The answer of {agent.id} was cut at its max_tokens, {agent.max_tokens} (thinking counts).",
                next_step=f"Raise max_tokens, publish and start a new run; or try again: stepfast resume {work.run_id}",
            )
        case "refusal":
            why = {name: reply.stop_details.get(name) for name in ("category", "explanation")}
            raise ModelRefused(f"{reply.model} refused the request of {agent.id}.", details=why)
        case "model_context_window_exceeded":
            raise AuthorMistake(f"The prompt and the answer of {agent.id} do not fit into {reply.model}'s context.")
        case other:
            raise InvalidOutput(f"The answer of {agent.id} stopped for an unknown reason, {str(other)[:50]!r}.")
    output = {"text": reply.text} if agent.schema is None else parse_output(reply.text, agent)
    return check_output(output, agent, settings.output_max_bytes)


def _read(response: "httpx2.Response", asked_model: str) -> _Reply:
    """Raises Unavailable where something else than the API answered."""
    try:
        message = json.loads(response.content)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        raise Unavailable(
            f"The API's answer is no message but {response.headers.get('content-type', 'unknown')!r:.100}."
        )
    texts = [
        block.get("text") for block in message["content"] if isinstance(block, dict) and block.get("type") == "text"
    ]
    model = message["model"] if isinstance(message.get("model"), str) else asked_model
    usage = _usage(_object(message, "usage"))
    return _Reply(
        text="".join(text for text in texts if isinstance(text, str)),
        model=model,
        stop_reason=message.get("stop_reason"),
        stop_details=_object(message, "stop_details"),
        usage=usage,
        cost_usd=cost_usd(model, usage),
        request_id=response.headers.get("request-id"),
    )


def _usage(given: Json) -> dict[str, int]:
    """The API's figures by our names. What it calls input_tokens leaves out what went through the cache."""
    read, created = _count(given, "cache_read_input_tokens"), _count(given, "cache_creation_input_tokens")
    return {
        "input_tokens": _count(given, "input_tokens") + read + created,
        "output_tokens": _count(given, "output_tokens"),
        "cache_read_tokens": read,
        "cache_creation_tokens": created,
        "thinking_tokens": _count(_object(given, "output_tokens_details"), "thinking_tokens"),
    }


def _object(owner: Json, name: str) -> Json:
    value = owner.get(name)
    return value if isinstance(value, dict) else {}


def _count(owner: Json, name: str) -> int:
    value = owner.get(name)
    return value if isinstance(value, int) and value > 0 else 0


def _emit_called(reply: _Reply, headers: "httpx2.Headers", duration_ms: int) -> None:
    events.emit(
        Event.MODEL_CALLED,
        model=reply.model,
        stop_reason=reply.stop_reason,
        **reply.usage,
        cost_usd=reply.cost_usd,
        request_id=reply.request_id,
        duration_ms=duration_ms,
        requests_remaining=headers.get("anthropic-ratelimit-requests-remaining"),
        tokens_remaining=headers.get("anthropic-ratelimit-tokens-remaining"),
    )


def _check_key(settings: Settings) -> None:
    key = settings.anthropic_api_key
    next_step = "Set it for the workers, restart them, and resume the run."
    if not key:
        raise AccountProblem("ANTHROPIC_API_KEY is not set.", next_step=next_step)
    if not _KEY.fullmatch(key):
        raise AccountProblem(
            "ANTHROPIC_API_KEY holds a blank, a line end or another letter that no key has.", next_step=next_step
        )


# One client a process and account: making one costs 42 ms, and its connections are what is worth sharing.
_clients: dict[tuple[str, str], "anthropic.Anthropic"] = {}
_inherited: list[Any] = []
_lock = threading.Lock()


def _client(settings: Settings) -> "anthropic.Anthropic":
    """Raises AccountProblem where the base URL or the proxy cannot be used."""
    assert settings.anthropic_api_key is not None
    account = (settings.anthropic_base_url or DEFAULT_URL, settings.anthropic_api_key)
    with _lock:
        if account not in _clients:
            _clients[account] = _new_client(*account)
        return _clients[account]


def _new_client(base_url: str, key: str) -> "anthropic.Anthropic":
    import anthropic
    import httpx2

    from app.agents.transport import ProxyRefused, Transport

    try:
        url = httpx2.URL(base_url)
        if url.scheme not in {"http", "https"} or not url.host:
            raise httpx2.InvalidURL("it must begin with https:// and name a host")
        # The whole answer is counted as it arrives, so it must arrive as it is.
        http = httpx2.Client(
            transport=Transport(url), trust_env=False, headers={"accept-encoding": "identity"}, follow_redirects=False
        )
    except ProxyRefused as error:
        raise AccountProblem(str(error)) from error
    except httpx2.InvalidURL as error:
        raise AccountProblem(f"ANTHROPIC_BASE_URL is no URL that can be called: {error}.") from error
    return anthropic.Anthropic(api_key=key, base_url=base_url, max_retries=0, http_client=http)


def warm_up() -> None:
    """Loads what the first call needs (2 s), so that it does not go off an agent's time."""
    import anthropic  # noqa: F401
    import genai_prices  # noqa: F401
    import jsonschema  # noqa: F401

    from app.agents import api_errors, transport  # noqa: F401


def close() -> None:
    """Closes this process's connections. The next call makes new ones."""
    with _lock:
        for client in _clients.values():
            client.close()
        _clients.clear()


def _after_fork() -> None:
    """The child makes its own connections. Those of its parent must neither be used nor closed: so they are kept."""
    global _clients, _lock
    _inherited.append(_clients)
    _clients, _lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
