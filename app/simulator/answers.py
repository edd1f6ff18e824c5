"""What the simulated model answers: content, stop reason and usage, as a Message or as the events of a stream.

Content is decided by the seed and the request alone; ids also by the request's number, and the cache's figures by what
came before. A token is four characters.
"""

import hashlib
import json
import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from app.simulator.catalogue import MODELS, Thinking
from app.simulator.schemas import sample
from app.simulator.script import Rule, reply_text

Body = dict[str, Any]

CHARS_A_TOKEN = 4
CHARS_A_DELTA = 24
CACHE_MAX_ENTRIES = 10_000

# Thinking counts toward `max_tokens`, as it does there. Real thinking is longer; small limits shall stay usable here.
_THINKING_TOKENS = {"low": 4, "medium": 8, "high": 16, "xhigh": 32, "max": 64}


def count_input_tokens(body: Body) -> int:
    """Tokens of the whole prompt: tools, system, messages and the output's schema."""
    form = (body.get("output_config") or {}).get("format")
    return sum(_tokens(text) for text, _ in _parts(body)) + (_tokens(_json(form)) if form else 0)


def signature(model: str, thinking: str) -> str:
    """The signature of a thinking block: it is good for this text of this model only."""
    return hashlib.sha256(f"{model}\n{thinking}".encode()).hexdigest()


def system_text(body: Body) -> str:
    return _text(body.get("system") or "")


def user_text(body: Body) -> str:
    return "\n".join(_text(message["content"]) for message in body["messages"] if message["role"] == "user")


@dataclass(slots=True)
class PromptCache:
    """Which prefixes of prompts `cache_control` has stored: of any length, and until there are too many."""

    _known: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def usage(self, body: Body) -> dict[str, Any]:
        """The input's figures for this request; its own prefixes are stored for the next ones."""
        prefixes: list[tuple[str, int, str]] = []
        tokens, digest = 0, hashlib.sha256(body["model"].encode())
        for text, control in _parts(body):
            tokens += _tokens(text)
            digest.update(text.encode())
            if control:
                prefixes.append((digest.hexdigest(), tokens, control.get("ttl", "5m")))
        read = max((size for key, size, _ in prefixes if key in self._known), default=0)
        stored, ttl = (prefixes[-1][1], prefixes[-1][2]) if prefixes else (0, "5m")
        for key, _, _ in prefixes:
            self._known[key] = None
            self._known.move_to_end(key)
        while len(self._known) > CACHE_MAX_ENTRIES:
            self._known.popitem(last=False)
        created = stored - read
        return {
            "input_tokens": count_input_tokens(body) - stored,
            "cache_creation_input_tokens": created,
            "cache_read_input_tokens": read,
            "cache_creation": {
                "ephemeral_5m_input_tokens": 0 if ttl == "1h" else created,
                "ephemeral_1h_input_tokens": created if ttl == "1h" else 0,
            },
        }


def answer(body: Body, rule: Rule, *, seed: int, number: int, cache: PromptCache) -> Body:
    """The whole Message for a valid request."""
    asked = {key: value for key, value in body.items() if key != "stream"}
    random = Random(hashlib.sha256(f"{seed}\n{_json(asked)}".encode()).digest())  # noqa: S311  # reproducible on purpose
    thinking, thinking_tokens = _thinking(body, random)
    natural, stop_reason = _block(body, rule, random, number)
    room = max(0, body["max_tokens"] - thinking_tokens)
    block, stop_reason, stop_sequence = _stopped(natural, rule.stop_reason or stop_reason, room, body)
    content = [part for part in (thinking, block) if part]
    usage = cache.usage(body)
    usage["output_tokens"] = min(thinking_tokens + _block_tokens(block), max(1, body["max_tokens"]))
    usage["output_tokens_details"] = {"thinking_tokens": min(thinking_tokens, usage["output_tokens"])}
    usage |= {"server_tool_use": None, "service_tier": "standard", "inference_geo": "global"}
    _script_usage(usage, rule)
    refusal = {"type": "refusal", "category": None, "explanation": None} if stop_reason == "refusal" else None
    return {
        "id": f"msg_{_id(seed, number, 'msg')}",
        "type": "message",
        "role": "assistant",
        "model": body["model"],
        "content": [] if stop_reason == "refusal" else content,
        "stop_reason": stop_reason,
        "stop_sequence": stop_sequence,
        "stop_details": refusal,
        "usage": usage,
    }


def request_id(seed: int, number: int) -> str:
    return f"req_{_id(seed, number, 'req')}"


def _id(seed: int, number: int, kind: str) -> str:
    return hashlib.sha256(f"{seed}:{number}:{kind}".encode()).hexdigest()[:24]


def _thinking(body: Body, random: Random) -> tuple[Body | None, int]:
    """The thinking block that opens an answer, and its tokens. Newer models leave the text out unless asked for it."""
    how = MODELS[body["model"]].thinking
    asked = body.get("thinking") or {}
    by_default = how in (Thinking.DEFAULT, Thinking.ALWAYS)
    if asked.get("type") == "disabled" or not (asked or by_default) or body["max_tokens"] == 0:
        return None, 0
    effort = (body.get("output_config") or {}).get("effort") or "medium"
    tokens = min(_THINKING_TOKENS[effort], body["max_tokens"])
    display = asked.get("display") or ("omitted" if by_default else "summarized")
    text = f"Simulated thought {random.randint(0, 9999)}." if display == "summarized" else ""
    return {"type": "thinking", "thinking": text, "signature": signature(body["model"], text)}, tokens


def _block(body: Body, rule: Rule, random: Random, number: int) -> tuple[Body, str]:
    """The answer's block and its natural stop reason."""
    text = reply_text(rule)
    form = (body.get("output_config") or {}).get("format")
    tool = _tool_to_call(body)
    if text is None and tool and not rule.invalid_json:
        called = {
            "type": "tool_use",
            "id": f"toolu_{_id(number, random.getrandbits(64), 'toolu')}",
            "name": tool["name"],
            "input": sample(tool.get("input_schema", {"type": "object"}), random),
            "caller": {"type": "direct"},
        }
        return called, "tool_use"
    if text is None and form:
        text = _json(sample(form["schema"], random))
    if text is None:
        text = f"This is a simulated answer, number {random.randint(0, 9999)}, to {len(user_text(body))} characters."
    return {"type": "text", "text": "{" + text if rule.invalid_json else text}, "end_turn"


def _tool_to_call(body: Body) -> Body | None:
    """The tool that a sampled answer calls: the chosen one, or the first; none once a tool's result has come back."""
    last = body["messages"][-1]["content"]
    if isinstance(last, list) and any(block["type"] == "tool_result" for block in last):
        return None
    choice = body.get("tool_choice") or {}
    tools: list[Body] = [tool for tool in body.get("tools") or () if "name" in tool]
    if not tools or choice.get("type") == "none":
        return None
    return next((tool for tool in tools if tool["name"] == choice.get("name")), tools[0])


def _stopped(block: Body, stop_reason: str, room: int, body: Body) -> tuple[Body | None, str, str | None]:
    """The block, cut where the model has to stop; the stop reason; the stop sequence."""
    if stop_reason == "max_tokens":
        room = min(room, _block_tokens(block) // 2)
    if block["type"] == "tool_use":
        return (block, stop_reason, None) if _block_tokens(block) <= room else (None, "max_tokens", None)
    text, found = block["text"], None
    for sequence in body.get("stop_sequences") or ():
        if sequence in text:
            text, found, stop_reason = text.split(sequence)[0], sequence, "stop_sequence"
    if _tokens(text) > room:
        text, found, stop_reason = text[: room * CHARS_A_TOKEN], None, "max_tokens"
    return ({"type": "text", "text": text} if text else None), stop_reason, found


def _script_usage(usage: Body, rule: Rule) -> None:
    given = rule.usage.model_dump(exclude_none=True)
    if "thinking_tokens" in given:
        usage["output_tokens_details"] = {"thinking_tokens": given.pop("thinking_tokens")}
    if "cache_creation_input_tokens" in given:
        usage["cache_creation"] = {
            "ephemeral_5m_input_tokens": given["cache_creation_input_tokens"],
            "ephemeral_1h_input_tokens": 0,
        }
    usage |= given


def _parts(body: Body) -> Iterator[tuple[str, Body | None]]:
    """The prompt in the order in which it is cached (tools, system, messages), each part with its `cache_control`."""
    blocks = [*(body.get("tools") or ()), *_as_blocks(body.get("system") or "")]
    for message in body["messages"]:
        blocks += _as_blocks(message["content"])
    for index, block in enumerate(blocks):
        last = index == len(blocks) - 1
        yield (
            _json(block.get("text") or block),
            block.get("cache_control") or (body.get("cache_control") if last else None),
        )


def _as_blocks(content: str | list[Body]) -> list[Body]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return content


def _text(content: str | list[Body]) -> str:
    """All text in some content, that of tools' results included."""
    texts = (block.get("text") or _text(block.get("content") or "") for block in _as_blocks(content))
    return "\n".join(text for text in texts if text)


def _tokens(text: str) -> int:
    return math.ceil(len(text) / CHARS_A_TOKEN)


def _block_tokens(block: Body | None) -> int:
    if block is None:
        return 0
    return _tokens(block["text"] if block["type"] == "text" else block["name"] + _json(block["input"]))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def events(message: Body) -> Iterator[Body]:
    """A Message as the events of its stream, in the real order (docs/en/build-with-claude/streaming)."""
    usage = message["usage"]
    opening = {**message, "content": [], "stop_reason": None, "stop_sequence": None, "stop_details": None}
    # What is not yet known when a stream opens: the output's figures.
    opening["usage"] = {**usage, "output_tokens": 1, "output_tokens_details": None}
    yield {"type": "message_start", "message": opening}
    for index, block in enumerate(message["content"]):
        yield {"type": "content_block_start", "index": index, "content_block": _emptied(block)}
        if index == 0:
            yield {"type": "ping"}
        for delta in _deltas(block):
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    delta = {key: message[key] for key in ("stop_reason", "stop_sequence", "stop_details")}
    names = (
        "input_tokens",
        "cache_creation_input_tokens",
        "cache_read_input_tokens",
        "output_tokens",
        "output_tokens_details",
    )
    yield {"type": "message_delta", "delta": delta, "usage": {name: usage[name] for name in names}}
    yield {"type": "message_stop"}


def _emptied(block: Body) -> Body:
    empty: dict[str, Body] = {
        "text": {"text": ""},
        "tool_use": {"input": {}},
        "thinking": {"thinking": "", "signature": ""},
    }
    return {**block, **empty[block["type"]]}


def _deltas(block: Body) -> Iterator[Body]:
    match block["type"]:
        case "thinking":
            if block["thinking"]:
                yield {"type": "thinking_delta", "thinking": block["thinking"]}
            yield {"type": "signature_delta", "signature": block["signature"]}
        case "text":
            for piece in _pieces(block["text"]):
                yield {"type": "text_delta", "text": piece}
        case _:
            for piece in _pieces(_json(block["input"])):
                yield {"type": "input_json_delta", "partial_json": piece}


def _pieces(text: str) -> Iterator[str]:
    for start in range(0, len(text), CHARS_A_DELTA):
        yield text[start : start + CHARS_A_DELTA]


def broken_off(stream: Iterator[Body], error: Body) -> Iterator[Body]:
    """The stream up to its first delta, then the error event that ends it."""
    for event in stream:
        yield event
        if event["type"] == "content_block_delta":
            break
    yield {"type": "error", "error": error}
