"""What may leave the process: every log line, dead letter, page and printed value passes through here first.

A secret is known by its name (`password`, `api_key`), by its looks (`sk-ant-…`, a JWT, a password in a URL) or by
`"x-sensitive": true` in a JSON schema. Where in doubt, it is hidden. Nothing here raises, whatever it is given.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

Json = dict[str, Any]

REDACTED = "[redacted]"
DEPTH_MAX = 64
# Characters that one value may show; each of its items counts as one more. The payloads' own limits are lower.
SIZE_MAX_CHARS = 8_000_000
KEY_MAX_CHARS = 1_000
INTEGER_MAX_BITS = 1_024

# Names that mean a secret wherever they stand in a longer name. `token` does only at its end: `max_tokens` is a number.
_NAME = (
    r"(?:passw(?:or)?d|pass[-_ ]?phrase|pwd|secret(?!ar)|credential|authorization|cookie|bearer|jwt|session[-_ ]?id"
    r"|basic[-_]?auth|(?:access|account|api|auth|encryption|master|private|secret|signing|ssh)[-_ ]?key)"
)
_SECRET_KEY = re.compile(rf"{_NAME}|token\d{{0,2}}$|(?:^|[-_])pass$|^auth$", re.IGNORECASE)

# The expressions for text are linear, also on text made to be slow: what repeats without a bound is possessive, and is
# followed by nothing that can fail, or stops at a character with which the next match would begin. The lookaheads for
# a first character only save time: they must name every character with which a match may begin.
_TEXT_NAME = rf"(?i:{_NAME}(?:s|[-_\d][\w-]{{0,20}})?|token\d{{0,2}}|[-_]pass)"
_ASSIGN = r"""\\{0,7}["']?[ \t]{0,4}(?:=>|:=|==?|:)[ \t]{0,4}"""
_OPEN_QUOTE = r"""(?:b?(?P<quote>\\{0,7}["']))?"""
_IN_QUOTES = r"""(?:(?!(?P=quote))(?:\\+.|[^\\]))*+"""
_TEXT_PATTERNS = (
    re.compile(  # a private key, also one that was cut off
        r"(?P<keep>)-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"
        r"[^-]*+(?:-(?!----)[^-]*+)*+(?:-----END [A-Z0-9 ]{0,60}-----)?"
    ),
    re.compile(  # the headers whose value has several words
        rf"""(?P<keep>(?i:authorization|cookies?){_ASSIGN}{_OPEN_QUOTE})(?(quote){_IN_QUOTES}|[^\r\n"']++)""", re.DOTALL
    ),
    re.compile(  # password = …; "password": …; --db-password …; ('x-api-key', …)
        rf"""(?P<keep>(?=[abcejmpstABCEJMPST_(-])(?:{_TEXT_NAME}{_ASSIGN}"""
        rf"""|(?<![\w-])--[\w-]{{0,40}}?{_TEXT_NAME}[ \t]{{1,4}}"""
        rf"""|\(b?["'][\w-]{{0,40}}?{_TEXT_NAME}["'],[ ]?)"""
        rf"""{_OPEN_QUOTE})(?(quote){_IN_QUOTES}|[^\s"'&]++)""",
        re.DOTALL,
    ),
    re.compile(r"""(?P<keep>://[^\s/:@"'<>]*+:)[^\s/"'<>]*(?=@)"""),
    re.compile(r"""(?P<keep>[?&](?i:code|key|sig|signature)=)[^\s&"'<>]++"""),
    re.compile(r"(?P<keep>(?i:bearer)[ \t]{1,4})[\w.~+/-]{8,}+=*+"),
    re.compile(r"(?P<keep>(?i:basic)[ \t]{1,4})[A-Za-z0-9+/]{8,}+=++"),
    re.compile(
        r"(?P<keep>)(?=[Aeghnprsx])(?:"
        r"sk-ant-[\w-]{4,}+|(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))sk-[\w-]{16,}+"  # Anthropic; OpenAI and its like
        r"|[rs]k_(?:live|test)_\w{8,}+|AIza[\w-]{20,}+|(?:AKIA|ASIA)[A-Z0-9]{16}"  # Stripe, Google, Amazon
        r"|gh[oprsu]_[A-Za-z0-9]{16,}+|github_pat_\w{16,}+|glpat-[\w-]{16,}+"
        r"|xox[a-z]-[\w-]{8,}+|xapp-[\w-]{8,}+"  # Slack
        r"|(?:hf|npm)_[A-Za-z0-9]{30,}+|pypi-AgE[\w-]{16,}+"
        r"|eyJ[\w=.+/-]{16,}+"  # a JWT, or other JSON in base64
        r")"
    ),
)
_HEXADECIMAL = re.compile(r"[0-9a-f-]*+")  # ids and hashes, of which most lines have several
# Neither Postgres' jsonb nor UTF-8 can hold these.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def redact_text(text: str) -> str:
    """The text with every secret in it replaced by "[redacted]"; NULs and lone surrogates become U+FFFD.

    A text of more than SIZE_MAX_CHARS is cut. The time is linear in the text's length.
    """
    if _HEXADECIMAL.fullmatch(text):
        return _cut(text, SIZE_MAX_CHARS)
    return _redact_short(text) if len(text) <= _SHORT_MAX_CHARS else _redact_text(text)


def _redact_text(text: str) -> str:
    text = _UNSTORABLE.sub("\ufffd", _cut(text, SIZE_MAX_CHARS))
    for pattern in _TEXT_PATTERNS:
        text = pattern.sub(rf"\g<keep>{REDACTED}", text)
    return text


# Names of agents, pipelines and events, of which all lines have the same few.
_SHORT_MAX_CHARS = 60
_redact_short = lru_cache(maxsize=2_000)(_redact_text)


def redact(value: object, schema: Json | None = None) -> object:
    """A deep copy of JSON types only, with every secret replaced by "[redacted]".

    `schema` is a JSON schema whose `"x-sensitive": true` hides what it describes, under any branch and any local $ref.
    An exception becomes {"type", "message"}; other foreign values become text. What lies deeper than DEPTH_MAX, beyond
    SIZE_MAX_CHARS, or inside itself is replaced by a note.
    """
    return _Copy(schema or {}).of(value, (schema,) if schema else (), depth=0)


def hides(path: Sequence[str], schema: Json | None) -> bool:
    """Whether `redact` hides what stands at a path of a value that the schema describes."""
    value: object = ""
    for name in reversed(path):
        value = {name: value}
    copy = redact(value, schema)
    for name in path:
        if not isinstance(copy, dict):
            break
        copy = copy.get(name)
    return copy != ""


def capped(value: object, max_bytes: int) -> object:
    """`redact(value)`, at most `max_bytes` of it: see `cut_json`."""
    return cut_json(redact(value), max_bytes)


def cut_json(value: object, max_bytes: int) -> object:
    """A value of JSON types, or, where it takes more than `max_bytes` as JSON in ASCII, its beginning as a text.

    The text ends with a note of the original size, and is within `max_bytes` too if the note is.
    """
    if type(value) in _PLAIN and not isinstance(value, int) and _JSON_MAX_BYTES * len(str(value)) + 2 <= max_bytes:
        return value  # it fits for certain
    size_bytes = len(json.dumps(value))
    if size_bytes <= max_bytes:
        return value
    text = value if isinstance(value, str) else json.dumps(value)
    note = f"... [cut: {size_bytes} bytes]"
    head = text[: max(0, max_bytes - len(note) - 2)]
    while head and len(json.dumps(head + note)) > max_bytes:
        head = head[: len(head) * 3 // 4]
    return head + note


# What holds nothing else, and whose reading runs no foreign code.
_PLAIN = {str, int, float, bool, type(None)}
# A character in JSON in ASCII: two escapes of a surrogate pair.
_JSON_MAX_BYTES = 12


class _Copy:
    """One deep copy: what it has left to show, and the containers that it is inside of."""

    def __init__(self, root: Json) -> None:
        self.root = root
        self.left_chars = SIZE_MAX_CHARS
        self.inside: set[int] = set()

    def of(self, value: object, schemas: Sequence[object], *, depth: int) -> object:
        """The copy of a value to which all of `schemas` may apply."""
        self.left_chars -= 1
        if self.left_chars < 0:
            return "[cut]"
        if depth > DEPTH_MAX:
            return "[too deep]"
        if not schemas and type(value) in _PLAIN:
            return self._of_kind(value, (), depth + 1)
        if id(value) in self.inside:
            return "[circular]"
        self.inside.add(id(value))
        try:
            applying = tuple(_branches(schemas, self.root))
            sensitive = any(schema.get("x-sensitive") for schema in applying)
            return REDACTED if sensitive else self._of_kind(value, applying, depth + 1)
        except Exception as error:  # noqa: BLE001  # foreign __str__ and __iter__ may raise anything
            return f"[unreadable: {type(error).__name__}]"
        finally:
            self.inside.discard(id(value))

    def _of_kind(self, value: object, schemas: tuple[Json, ...], depth: int) -> object:
        match value:
            case None | bool():
                return value
            case int() | float():
                return _number(value)
            case Mapping():
                return self._mapping(value, schemas, depth)
            case list() | tuple() | AbstractSet():
                return self._items(value, schemas, depth)
            case BaseException():
                return {"type": type(value).__name__, "message": self._text(str(value))}
            case str():
                text = str.__str__(value)
            case bytes() | bytearray() | memoryview():
                text = bytes(value).decode("utf-8", "replace")
            case _:
                text = str(value)
        return self._text(text)

    def _text(self, text: str) -> str:
        safe = redact_text(_cut(text, self.left_chars))
        self.left_chars -= len(text)
        return safe

    def _mapping(self, value: Mapping[object, object], schemas: tuple[Json, ...], depth: int) -> Json:
        copy: Json = {}
        # {"name": "DB_PASSWORD", "value": …}, as environments and headers are often listed.
        names_secret = "value" in value and any(_is_secret(value.get(key)) for key in ("name", "key"))
        for key, item in value.items():
            if self.left_chars < 0:
                copy["[cut]"] = "[cut]"
                break
            name = str(key)
            shown_name, secret = _shown_key(name[:KEY_MAX_CHARS])
            self.left_chars -= len(name)
            hide = (secret or (names_secret and name == "value")) and not (item is None or isinstance(item, bool))
            copy[shown_name] = REDACTED if hide else self.of(item, _of_property(schemas, name), depth=depth)
        return copy

    def _items(self, value: Iterable[object], schemas: tuple[Json, ...], depth: int) -> list[object]:
        if isinstance(value, tuple) and len(value) == 2 and _is_secret(value[0]):  # a header
            return [self.of(value[0], (), depth=depth), REDACTED]
        copy: list[object] = []
        for index, item in enumerate(value):
            if self.left_chars < 0:
                copy.append("[cut]")
                break
            copy.append(self.of(item, _of_item(schemas, index), depth=depth))
        return copy


def _cut(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    return f"{text[: max(0, max_chars)]}... [cut: {len(text)} characters]"


@lru_cache(maxsize=1_024)
def _shown_key(name: str) -> tuple[str, bool]:
    """A key's redacted name, and whether its value is a secret. The same few keys stand in every line."""
    return redact_text(name), _is_secret(name)


def _number(value: float) -> int | float | str:
    if isinstance(value, int):
        bits = value.bit_length()
        return int(value) if bits <= INTEGER_MAX_BITS else f"[integer of {bits} bits]"
    return float(value) if math.isfinite(value) else str(value)  # JSON has neither infinity nor NaN


def _is_secret(name: object) -> bool:
    if isinstance(name, bytes):
        name = name.decode("latin-1")
    return isinstance(name, str) and _SECRET_KEY.search(name) is not None


def _branches(schemas: Iterable[object], root: Json) -> Iterable[Json]:
    """The schemas, and those that they refer to or combine: whichever branch holds, the value is described by it."""
    waiting = list(schemas)
    seen: set[int] = set()
    while waiting:
        schema = waiting.pop()
        if not isinstance(schema, dict) or id(schema) in seen:
            continue
        seen.add(id(schema))
        yield schema
        for combined in ("allOf", "anyOf", "oneOf"):
            waiting += schema.get(combined, ())
        waiting += [schema.get("then"), schema.get("else"), *schema.get("dependentSchemas", {}).values()]
        waiting += [_referred(schema[ref], root) for ref in ("$ref", "$dynamicRef") if ref in schema]


def _referred(ref: object, root: Json) -> object:
    """What a local reference names. One that cannot be followed counts as sensitive."""
    found: object = root
    try:
        place, _, pointer = str(ref).partition("#")
        if place or pointer[:1] not in ("", "/"):
            return {"x-sensitive": True}
        for part in unquote(pointer).split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            found = found[int(name)] if isinstance(found, list) else found[name]  # type: ignore[index]
    except (LookupError, TypeError, ValueError):
        return {"x-sensitive": True}
    return found


def _of_property(schemas: tuple[Json, ...], name: str) -> list[object]:
    found: list[object] = []
    for schema in schemas:
        matching = [sub for pattern, sub in schema.get("patternProperties", {}).items() if re.search(pattern, name)]
        if name in schema.get("properties", {}):
            matching.append(schema["properties"][name])
        found += matching or [schema.get("additionalProperties"), schema.get("unevaluatedProperties")]
    return found


def _of_item(schemas: tuple[Json, ...], index: int) -> list[object]:
    found: list[object] = []
    for schema in schemas:
        items = schema.get("items")
        first = items if isinstance(items, list) else schema.get("prefixItems", ())
        found.append(first[index] if index < len(first) else items)
        found += [schema.get("contains"), schema.get("additionalItems"), schema.get("unevaluatedItems")]
    return found
