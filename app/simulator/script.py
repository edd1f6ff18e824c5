r"""The script: what the simulator answers, where it should not just sample an answer.

A script is a small YAML file (JSON is YAML; tests give the same as a dict). Its only key, `rules`, is a list. Rules are
tried in order for each `POST /v1/messages` that the real API would accept; the first that applies decides. Without
one, the answer is sampled: JSON that fits `output_config.format`, else a call of the first tool, else plain text.

A rule's keys, all optional (unknown keys are refused):

    match             which calls; every condition given must hold. Text is a regular expression, searched for.
      model             the model's name
      system            the system prompt
      user              the text of all user turns, tool results included
      header            {name: regular expression}; the API key is seen here too (`authorization: Bearer sk-revoked`)
      nth               only the nth call (from 1) for which the other conditions hold; or a list of such numbers

    times             the rule decides this many calls, and then no more
    reply             the answer: text, or a mapping or list, which is written as JSON
    reply_file        the answer's text is in this file, inside the script's own folder
    invalid_json      true: the answer's text is no JSON
    stop_reason       end_turn, max_tokens (cuts the answer in half), stop_sequence, pause_turn, refusal (no content),
                      model_context_window_exceeded
    usage             replaces counted figures: input_tokens, output_tokens, cache_creation_input_tokens,
                      cache_read_input_tokens, thinking_tokens

    status            fails with this HTTP status: 400 401 402 403 404 408 409 413 429 500 503 504 529
    error             {type, message, code}; each has a default that fits the status. `code` is `details.error_code`
                      (`enforced_spend_limit_reached` makes a 429 a spend limit)
    retry_after_s     the `retry-after` header, in seconds

    delay_ms          waits before the first byte of the answer
    drip_headers_ms   waits after every byte of the headers
    drip_ms           waits after every event of a stream, and after every byte of any other body
    fail_midstream    true: a stream breaks off with an `error` event (`error` says which; overloaded_error by
                      default). A call that does not stream fails with that error's status instead.
    truncate          true: the connection is dropped after half of the body

An example: the coder is overloaded twice, then answers from a file; the reviewer's first call hangs for a minute.

    rules:
      - match: {system: "You are the coder"}
        times: 2
        status: 529
        retry_after_s: 1
      - match: {system: "You are the coder"}
        reply_file: replies/coder.json
      - match: {system: reviewer, user: "confidence.*0\.9", nth: 1}
        delay_ms: 60000
        reply: {verdict: approved, score: 0.97}
        usage: {cache_read_input_tokens: 1200}
"""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from app.errors import InvalidFile

SCRIPT_MAX_BYTES = 1_000_000
WAIT_MAX_MS = 3_600_000

# The type that goes with each status (platform.claude.com/docs/en/api/errors).
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}


Figure = Annotated[int, Field(ge=0)]
Milliseconds = Annotated[int, Field(ge=0, le=WAIT_MAX_MS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Match(_Strict):
    model: re.Pattern[str] | None = None
    system: re.Pattern[str] | None = None
    user: re.Pattern[str] | None = None
    header: dict[str, re.Pattern[str]] = {}
    nth: int | list[int] | None = None


class Error(_Strict):
    type: str | None = None
    message: str | None = None
    code: str | None = None


class Usage(_Strict):
    input_tokens: Figure | None = None
    output_tokens: Figure | None = None
    cache_creation_input_tokens: Figure | None = None
    cache_read_input_tokens: Figure | None = None
    thinking_tokens: Figure | None = None


class Rule(_Strict):
    """One rule; the module's docstring explains each key."""

    match: Match = Match()
    times: Annotated[int, Field(ge=1)] | None = None
    reply: JsonValue = None
    reply_file: str | None = None
    invalid_json: bool = False
    stop_reason: (
        Literal["end_turn", "max_tokens", "stop_sequence", "pause_turn", "refusal", "model_context_window_exceeded"]
        | None
    ) = None
    usage: Usage = Usage()
    status: Literal[400, 401, 402, 403, 404, 408, 409, 413, 429, 500, 503, 504, 529] | None = None
    error: Error = Error()
    retry_after_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    delay_ms: Milliseconds = 0
    drip_headers_ms: Milliseconds = 0
    drip_ms: Milliseconds = 0
    fail_midstream: bool = False
    truncate: bool = False

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.reply is not None and self.reply_file is not None:
            raise ValueError("reply and reply_file exclude each other")
        if self.status and (self.reply is not None or self.reply_file or self.fail_midstream or self.stop_reason):
            raise ValueError("a rule with status has no answer: it takes no reply, stop_reason or fail_midstream")
        if self.retry_after_s is not None and not self.status:
            raise ValueError("retry_after_s needs a status")
        return self


class Script(_Strict):
    rules: list[Rule] = []


_OWNERS: dict[int | str, type[_Strict]] = {"match": Match, "error": Error, "usage": Usage}


@dataclass(frozen=True, slots=True)
class Call:
    """What rules can look at. Headers' names are in lower case."""

    model: str
    system: str
    user: str
    headers: Mapping[str, str]


@dataclass(slots=True)
class Count:
    """How often a rule's conditions held (`nth` and `times` aside), and how often the rule decided the answer."""

    matched: int = 0
    applied: int = 0


def choose(script: Script, call: Call, counts: list[Count]) -> Rule | None:
    """The first rule that applies to the call, counted in `counts` (one for each rule); None if there is none."""
    assert len(counts) == len(script.rules)
    chosen = None
    for rule, count in zip(script.rules, counts, strict=True):
        if not _holds(rule.match, call):
            continue
        count.matched += 1  # also where an earlier rule decides: `nth` counts calls, not this rule's turns
        wanted = rule.match.nth
        nth_holds = wanted is None or count.matched in ([wanted] if isinstance(wanted, int) else wanted)
        if chosen is None and nth_holds and (rule.times is None or count.applied < rule.times):
            count.applied += 1
            chosen = rule
    return chosen


def _holds(match: Match, call: Call) -> bool:
    pairs = [(match.model, call.model), (match.system, call.system), (match.user, call.user)]
    pairs += [(pattern, call.headers.get(name.lower(), "")) for name, pattern in match.header.items()]
    return all(pattern is None or pattern.search(text) for pattern, text in pairs)


def load(path: Path) -> Script:
    """Reads a script file. Raises InvalidFile naming every fault."""
    return parse(_read(path, str(path)), folder=path.parent, name=str(path))


def parse(source: str | Mapping[str, Any], *, folder: Path | None = None, name: str = "the script") -> Script:
    """A script from YAML text or a dict. `reply_file` is looked up in `folder`. Raises InvalidFile."""
    data = _yaml(source, name) if isinstance(source, str) else source
    try:
        script = Script.model_validate(data)
    except ValidationError as error:
        faults = "; ".join(_fault(entry["loc"], entry) for entry in error.errors(include_url=False)[:20])
        raise InvalidFile(f"{name}: {faults}.") from None
    return Script(rules=[_with_reply(rule, folder, name) for rule in script.rules])


def _yaml(text: str, name: str) -> object:
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise InvalidFile(f"{name}: YAML aliases are not allowed.")  # a few lines of them can fill the memory
        return yaml.safe_load(text) or {}
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InvalidFile(f"{name} is no valid YAML: {' '.join(str(error).split())}.") from None


def _fault(place: tuple[int | str, ...], entry: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in place) or "the whole"
    if entry["type"] != "extra_forbidden":
        return f"{where}: {entry['msg'].removeprefix('Value error, ')}"
    owner = Script if len(place) == 1 else _OWNERS.get(place[-2], Rule)
    near = difflib.get_close_matches(str(place[-1]), owner.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(owner.model_fields)}"
    return f"{where} is unknown: {hint}"


def _with_reply(rule: Rule, folder: Path | None, name: str) -> Rule:
    """The rule with its `reply_file` read. The file must lie within the script's folder, links followed."""
    if rule.reply_file is None:
        return rule
    if folder is None:
        raise InvalidFile(f"{name}: reply_file needs a script that is itself a file.")
    path = (folder / rule.reply_file).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise InvalidFile(f"{name}: reply_file {rule.reply_file!r} is outside the script's folder.")
    return rule.model_copy(update={"reply": _read(path, f"{name}: reply_file {rule.reply_file!r}"), "reply_file": None})


def _read(path: Path, name: str) -> str:
    try:
        if not path.is_file():
            raise InvalidFile(f"{name} is no file.")
        with path.open("rb") as stream:
            content = stream.read(SCRIPT_MAX_BYTES + 1)
        if len(content) > SCRIPT_MAX_BYTES:
            raise InvalidFile(f"{name} is larger than {SCRIPT_MAX_BYTES} bytes.")
        return content.decode()
    except UnicodeDecodeError:
        raise InvalidFile(f"{name} is not UTF-8.") from None
    except (OSError, ValueError) as error:
        raise InvalidFile(f"{name} cannot be read: {error}.") from None


def reply_text(rule: Rule) -> str | None:
    """The scripted answer as text; None if the rule has none."""
    if rule.reply is None or isinstance(rule.reply, str):
        return rule.reply
    return json.dumps(rule.reply, ensure_ascii=False)
