import copy
import json
import time
import uuid
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.redaction import DEPTH_MAX, REDACTED, capped, redact, redact_text

SECRET = "hunter2planted"
MEGABYTE = 1_000_000

KNOWN = [
    "sk-ant-api03-abcDEF_123-xyz",
    "sk-proj-abcdefgh12345678",
    "AKIAIOSFODNN7EXAMPLE",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "github_pat_11ABCDEFG0abcdefghijkl_mnopqrst",
    "xoxb-123456789012-abcdefghijkl",
    "glpat-abcdefghijklmnopqrst",
    "sk_live_abcdefghijklmnop",
    "AIzaSyA1234567890abcdefghijklmnopqrstuv",
    "hf_abcdefghijklmnopqrstuvwxyz01234567",
    "npm_abcdefghijklmnopqrstuvwxyz0123456789",
    "pypi-AgEIcHlwaS5vcmcCJDAwMDAw",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIEow+/abc==\n-----END RSA PRIVATE KEY-----",
    "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXk",
]
NAMES = [
    *(
        "password",
        "DB_PASSWORD",
        "dbPasswd",
        "passphrase",
        "PGPWD",
        "SMTP_PASS",
        "secret",
        "client_secret",
        "clientSecret",
    ),
    *("api_key", "apiKey", "x-api-key", "ANTHROPIC_API_KEY", "access_key", "account_key", "auth_key", "encryption_key"),
    *(
        "master_key",
        "private_key",
        "signing_key",
        "ssh_key",
        "authorization",
        "Proxy-Authorization",
        "cookie",
        "Set-Cookie",
    ),
    *("credentials", "bearer", "jwt", "session_id", "basic_auth", "token", "access_token", "accessToken"),
]
HARMLESS = [
    "input_tokens=5, max_tokens: 16000, output_tokens",
    '{"cache_read_tokens": 12}',
    "idempotency_key=run:coder",
    "the secretary: Bob",
    "a basic implementation of task-management-system-design",
    "redis://localhost:6379/0",
    "postgresql://stepfast@localhost:5432/stepfast",
    "4f9c0a52-8a2e-4a51-9c1e-0b8f3f9b7a21",
    "someone@example.com: see http://example.com:80/a?page=2",
]


@pytest.mark.parametrize("secret", KNOWN)
@pytest.mark.parametrize("frame", ["{}", "before {} after", 'x="{}"', "line\\n{}", "https://host/?q={}", "[{}]"])
def test_known_secrets_are_hidden_in_any_text(secret, frame):
    """What looks like a known kind of secret is hidden, wherever it stands in a text."""
    shown = redact_text(frame.format(secret))
    assert secret not in shown
    assert secret[-12:] not in shown
    assert REDACTED in shown


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "frame",
    [
        "{n}={s} after",
        "{n}: {s}\nafter",
        '{{"{n}": "{s}", "x": "after"}}',
        "{{'{n}': '{s}', 'x': 'after'}}",
        r"{{\"{n}\": \"{s}\", \"x\": \"after\"}}",
        "{n} = 'two words {s}' after",
        '"{n}": "quote \\" {s}", "after"',
        "--{n} {s} after",
        "[('{n}', '{s}'), 'after']",
        "(b'{n}', b'{s}'), after",
        "http://host/?{n}={s}&x=after",
    ],
)
def test_named_secrets_are_hidden_in_any_text(name, frame):
    """What a text gives a secret's name is hidden, in every usual notation; what comes after stays."""
    shown = redact_text(frame.format(n=name, s=SECRET))
    assert SECRET not in shown
    takes_the_line = any(word in name.lower() for word in ("authorization", "cookie")) and frame[0] in "{h"
    assert "after" in shown or takes_the_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"postgresql+psycopg://stepfast:{SECRET}@db:5432/x", f"postgresql+psycopg://stepfast:{REDACTED}@db:5432/x"),
        (f"redis://:p@{SECRET}:x@host/0", f"redis://:{REDACTED}@host/0"),
        (f"Authorization: Bearer {SECRET}\nAccept: x", f"Authorization: {REDACTED}\nAccept: x"),
        ("Authorization: Basic dXNlcjpwYXNz", f"Authorization: {REDACTED}"),
        (f"sent Bearer {SECRET}.", f"sent Bearer {REDACTED}"),
        ("sent Basic dXNlcjpwYXNzdw==", f"sent Basic {REDACTED}"),
        (f"Cookie: a=b; session={SECRET}\nnext", f"Cookie: {REDACTED}\nnext"),
        (f"GET /login?code={SECRET}&state=1", f"GET /login?code={REDACTED}&state=1"),
        ('password="open', f'password="{REDACTED}'),
    ],
)
def test_urls_and_headers_keep_all_but_the_secret(text, shown):
    """A URL loses its password only, and a header its value only."""
    assert redact_text(text) == shown


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_texts_stay_as_they_are(text):
    """Numbers of tokens, keys that are no secrets, URLs without a password and prose are shown."""
    assert redact_text(text) == text


@pytest.mark.parametrize("text", [*KNOWN, *HARMLESS, *(f"{name}: '{SECRET}' x" for name in NAMES)])
def test_redacting_twice_changes_nothing_more(text):
    """Redaction may meet what was redacted before: it leaves that alone."""
    once = redact_text(text)
    assert redact_text(once) == once


@pytest.mark.parametrize("name", [*NAMES, "auth", "pass", "db-pass"])
@pytest.mark.parametrize("value", [SECRET, 12345, 1.5, [SECRET], {"a": {"b": SECRET}}, SECRET.encode()])
def test_secret_keys_hide_their_whole_value(name, value):
    """A secret's name hides its value, of any type and depth."""
    assert redact({"outer": [{name: value}]}) == {"outer": [{name: REDACTED}]}


@pytest.mark.parametrize(
    "name", ["input_tokens", "max_tokens", "output_tokens", "key", "idempotency_key", "author", "path"]
)
def test_other_keys_show_their_value(name):
    """Counts of tokens and other keys are no secrets."""
    assert redact({name: 5}) == {name: 5}


def test_an_absent_secret_is_shown_as_absent():
    """None and a truth value reveal nothing, and an operator needs them."""
    assert redact({"password": None, "requires_secret": True}) == {"password": None, "requires_secret": True}


def test_listed_pairs_are_read_as_names_and_values():
    """Environments and headers, listed as name and value, hide by name too."""
    headers = [("x-api-key", SECRET), (b"authorization", SECRET.encode())]
    environment = [{"name": "DB_PASSWORD", "value": SECRET}]
    assert SECRET not in json.dumps(redact([headers, environment]))


def test_secrets_are_found_in_every_kind_of_value():
    """Texts inside bytes, sets, exceptions, keys and foreign objects are searched as well."""
    secret = KNOWN[0]

    class Foreign:
        def __repr__(self):
            return f"<Foreign token='{SECRET}'>"

    planted = {
        "bytes": secret.encode(),
        "bytearray": bytearray(secret, "ascii"),
        "set": {secret},
        "tuple": (1, secret),
        "error": ValueError(f"password={SECRET}"),
        secret: "key",
        "foreign": Foreign(),
        "values": {"a": secret}.values(),
    }
    shown = json.dumps(redact(planted))
    assert secret not in shown
    assert SECRET not in shown
    assert '"type": "ValueError"' in shown


def test_the_original_is_not_touched():
    """Redaction copies: what the agents work with keeps its secrets."""
    value = {"password": SECRET, "list": [{"token": SECRET}]}
    before = copy.deepcopy(value)
    redact(value, {"x-sensitive": True})
    assert value == before


SENSITIVE = {"type": "string", "x-sensitive": True}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (SENSITIVE, SECRET),
        ({"properties": {"a": SENSITIVE}}, {"a": SECRET}),
        ({"properties": {"a": {"properties": {"b": SENSITIVE}}}}, {"a": {"b": SECRET}}),
        ({"items": SENSITIVE}, ["x", SECRET]),
        ({"items": [{}, SENSITIVE]}, ["x", SECRET]),
        ({"prefixItems": [{}, SENSITIVE]}, ["x", SECRET]),
        ({"prefixItems": [{}], "items": SENSITIVE}, ["x", SECRET]),
        ({"items": {"properties": {"a": {"items": SENSITIVE}}}}, [{"a": [SECRET]}]),
        ({"additionalProperties": SENSITIVE, "properties": {"x": {}}}, {"x": 1, "a": SECRET}),
        ({"patternProperties": {"^a": SENSITIVE}}, {"abc": SECRET}),
        ({"properties": {"a": {"$ref": "#/$defs/s"}}, "$defs": {"s": SENSITIVE}}, {"a": SECRET}),
        ({"properties": {"a": {"$ref": "#/$defs/x~1y%25"}}, "$defs": {"x/y%": SENSITIVE}}, {"a": SECRET}),
        ({"$ref": "#/$defs/node", "$defs": {"node": {"properties": {"next": {"$ref": "#/$defs/node"}, "s": SENSITIVE}}}}, {"next": {"next": {"s": SECRET}}}),
        ({"properties": {"next": {"$ref": "#"}, "s": SENSITIVE}}, {"next": {"next": {"s": SECRET}}}),
        ({"anyOf": [{"type": "null"}, SENSITIVE]}, SECRET),
        ({"allOf": [{"oneOf": [{"properties": {"a": SENSITIVE}}]}]}, {"a": SECRET}),
        ({"if": {}, "then": {"properties": {"a": SENSITIVE}}}, {"a": SECRET}),
        ({"properties": {"a": {"$ref": "#/nowhere"}}}, {"a": SECRET}),
        ({"properties": {"a": {"$ref": "other.json"}}}, {"a": SECRET}),
        ({"properties": {"a": {"$ref": "#anchor"}}}, {"a": SECRET}),
    ],
)  # fmt: skip
def test_a_schema_hides_what_it_calls_sensitive(schema, value):
    """`x-sensitive` hides a value at any depth, in arrays, under any branch, through references; an unclear one too."""
    shown = json.dumps(redact(value, schema))
    assert SECRET not in shown
    assert REDACTED in shown


def test_a_schema_hides_nothing_else():
    """What a schema does not call sensitive is shown."""
    schema = {"properties": {"a": SENSITIVE, "b": {"$ref": "#/$defs/plain"}}, "$defs": {"plain": {"type": "string"}}}
    assert redact({"a": SECRET, "b": "shown", "c": ["shown"]}, schema) == {"a": REDACTED, "b": "shown", "c": ["shown"]}


@pytest.mark.parametrize(
    "schema", [{"properties": 5}, {"allOf": 5}, {"$ref": 5}, {"patternProperties": {"(": {}}}, {"items": 5}]
)
def test_a_malformed_schema_shows_no_secret_and_raises_nothing(schema):
    """A schema that is none never makes redaction fail."""
    assert SECRET not in json.dumps(redact({"a": {"password": SECRET}}, schema))


class Unprintable:
    def __str__(self):
        raise RuntimeError("no text")


def circular():
    inner: dict = {}
    inner["self"] = [inner]
    return inner


def deep():
    value: list = []
    for _ in range(10_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        circular(), deep(), Unprintable(), {Unprintable(): 1}, ValueError(Unprintable()), float("nan"), float("-inf"),
        10**5000, b"\xff\xfe", "\ud800 lone", "NUL\x00", {"\x00\ud800": 1}, {1, "a", None}, memoryview(b"abc"),
        uuid.uuid4(), PurePosixPath("/x"), object(), (i for i in ()), {1: 2, None: 3}, True, None, -1.5,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_awkward_values_become_json_that_everyone_can_store(value):
    """Whatever comes in, what goes out is strict JSON in UTF-8, without NULs, and nothing is raised."""
    shown = json.dumps(redact(value), allow_nan=False, ensure_ascii=False)
    assert "\x00" not in shown
    shown.encode("utf-8")


def test_plain_json_is_copied_exactly():
    """A value of JSON types without secrets comes out as it went in, with its types."""
    value = {"a": [1, 2.5, True, None, "text ✓", {"b": []}], "c": {}}
    assert redact(value) == value
    assert redact(True) is True


def test_depth_and_size_are_bounded():
    """What is too deep is noted, and a value that shares its parts a billion times over does not unfold."""
    assert json.dumps(redact(deep())).count("[") <= DEPTH_MAX + 2
    shared: object = "x" * 1_000
    for _ in range(30):
        shared = [shared, shared]
    assert len(json.dumps(redact(shared))) < 20_000_000


@pytest.mark.parametrize(
    "unit",
    ["a", "-", "eyJ", "://a:", "password=", 'password="', "\\", '\\"', "-----BEGIN PRIVATE KEY-----", "--a-", " --aaaaaaa", "('a", "('" + "a" * 40, "secret_", "Bearer ", "basic aaaaaaaaaa"],
)  # fmt: skip
def test_text_made_to_be_slow_takes_less_than_a_second(unit):
    """A megabyte made for backtracking takes a second of this process's time, or on a busy machine is linear."""
    text = (unit * MEGABYTE)[:MEGABYTE]
    whole_s = _cpu_s(text)
    # Twice as long for twice the text; what backtracks takes four times as long.
    assert whole_s < 1.0 or whole_s < 3 * _cpu_s(text[: MEGABYTE // 2])


def _cpu_s(text):
    began_s = time.process_time()
    redact_text(text)
    return time.process_time() - began_s


@pytest.mark.parametrize(
    "value",
    [
        "x" * MEGABYTE,
        "é" * MEGABYTE,
        "\x1b" * MEGABYTE,
        ["x" * 10] * (MEGABYTE // 10),
        {"a": {"b": "x" * MEGABYTE}},
        b"x" * MEGABYTE,
    ],
    ids=["text", "accents", "controls", "list", "nested", "bytes"],
)
def test_a_long_value_is_cut_to_its_limit_with_a_note(value):
    """A value above its limit becomes its beginning and a note of its size, together within the limit."""
    shown = capped(value, max_bytes=8_192)
    assert isinstance(shown, str)
    assert 4_096 < len(json.dumps(shown)) <= 8_192
    assert shown.endswith(" bytes]")


def test_a_short_value_is_not_cut():
    """A value within its limit keeps its type, and loses its secrets."""
    assert capped({"a": [1], "token": SECRET}, max_bytes=100) == {"a": [1], "token": REDACTED}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


@given(value=JSON, max_bytes=st.integers(min_value=60, max_value=500))
@settings(max_examples=150, deadline=None)
def test_any_value_is_redacted_and_capped_without_an_error(value, max_bytes):
    """No value raises, and every result is strict JSON within its limit."""
    assert len(json.dumps(capped(value, max_bytes), allow_nan=False)) <= max_bytes


@given(value=JSON, secret=st.sampled_from(KNOWN[:12]), name=st.sampled_from(NAMES))
@settings(max_examples=150, deadline=None)
def test_a_secret_beside_any_value_is_hidden(value, secret, name):
    """What stands around a secret does not protect it."""
    shown = json.dumps(redact([{"x": value, name: SECRET}, [value, {"y": f"{value!r}: {secret}"}]]))
    assert SECRET not in shown
    assert secret not in shown
