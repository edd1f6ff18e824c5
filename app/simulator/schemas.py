"""JSON Schemas: the subset that structured outputs accept, and sample values that fit a schema."""

import base64
import math
import re
from collections.abc import Iterator
from random import Random
from typing import Any

Schema = dict[str, Any]

# All rules below: platform.claude.com/docs/en/build-with-claude/structured-outputs, "JSON Schema limitations".
OPTIONAL_MAX = 24
UNIONS_MAX = 16
_ANYWHERE = {
    "type",
    "title",
    "description",
    "default",
    "enum",
    "const",
    "anyOf",
    "allOf",
    "$ref",
    "$defs",
    "definitions",
}
_OF_TYPE: dict[str, set[str]] = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems"},
    "string": {"format", "pattern"},
    "integer": set(),
    "number": set(),
    "boolean": set(),
    "null": set(),
}
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid"}
# Look-around, back-references and word boundaries cannot become a grammar.
_PATTERN_UNSUPPORTED = re.compile(r"\(\?[=!<P]|\\[bB1-9]")

DEPTH_MAX = 12


def unsupported(schema: Schema) -> str | None:
    """Why structured outputs would refuse the schema; None if they accept it."""
    nodes = list(_nodes(schema))
    for node in nodes:
        if fault := _node_fault(node, schema):
            return fault
    if _recursive(schema):
        return "Recursive schemas are not supported"
    optional = sum(len(set(node.get("properties", {})) - set(node.get("required", ()))) for node in nodes)
    if optional > OPTIONAL_MAX:
        return f"Schemas contain too many optional parameters ({optional}; limit: {OPTIONAL_MAX})"
    unions = sum("anyOf" in node or isinstance(node.get("type"), list) for node in nodes)
    if unions > UNIONS_MAX:
        return f"Schemas contain too many parameters with union types ({unions}; limit: {UNIONS_MAX})"
    return None


def _nodes(schema: object, depth: int = 0) -> Iterator[Schema]:
    """The schema and every schema inside it. What is no mapping is wrapped, so that it is found to be a fault."""
    if not isinstance(schema, dict) or depth > 100:
        yield {"type": schema}
        return
    yield schema
    for children in _children(schema):
        yield from _nodes(children, depth + 1)


def _children(schema: Schema) -> list[object]:
    children: list[object] = [schema["items"]] if "items" in schema else []
    for key in ("properties", "$defs", "definitions"):
        if isinstance(schema.get(key), dict):
            children += schema[key].values()
    for key in ("anyOf", "allOf"):
        if isinstance(schema.get(key), list):
            children += schema[key]
    return children


def _node_fault(node: Schema, root: Schema) -> str | None:
    types = node.get("type", [])
    types = types if isinstance(types, list) else [types]
    if not all(isinstance(kind, str) and kind in _OF_TYPE for kind in types):
        return f"Invalid type: {node.get('type')!r}"
    for key in sorted(node.keys() - _ANYWHERE):
        if not any(key in _OF_TYPE[kind] for kind in types):
            return f"For '{types[0] if types else 'any'}' type, property '{key}' is not supported"
    if not (types or node.keys() & {"enum", "const", "anyOf", "allOf", "$ref"}):
        return "Schema type is required"
    if "object" in types and node.get("additionalProperties") is not False:
        return "For 'object' type, 'additionalProperties' must be explicitly set to false"
    if "$ref" in node and _target(node, root) is None:
        return f"'$ref' must name a definition of this schema, not {node['$ref']!r}"
    if not all(_primitive(value) for value in [*node.get("enum", []), node.get("const")]):
        return "'enum' and 'const' must be strings, numbers, booleans or null"
    return _value_fault(node)


def _value_fault(node: Schema) -> str | None:
    if node.get("minItems", 0) not in (0, 1):
        return "For 'array' type, 'minItems' values other than 0 or 1 are not supported"
    if "format" in node and node["format"] not in _FORMATS:
        return f"For 'string' type, format {node['format']!r} is not supported"
    if _PATTERN_UNSUPPORTED.search(str(node.get("pattern", ""))):
        return "For 'string' type, 'pattern' must have no look-around, back-reference or word boundary"
    if any("$ref" in part for part in node.get("allOf", ()) if isinstance(part, dict)):
        return "'allOf' with '$ref' is not supported"
    return None


def _primitive(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


def _target(node: Schema, root: Schema) -> Schema | None:
    """The definition that `$ref` names: `#/$defs/x` or `#/definitions/x`."""
    match = re.fullmatch(r"#/(\$defs|definitions)/([^/]+)", str(node["$ref"]))
    found = root.get(match[1], {}).get(match[2]) if match else None
    return found if isinstance(found, dict) else None


def _recursive(schema: Schema) -> bool:
    """Whether a definition leads back to itself: what is left once all that lead to an end are taken away."""
    definitions = {
        f"#/{room}/{name}": {str(node["$ref"]) for node in _nodes(inside) if "$ref" in node}
        for room in ("$defs", "definitions")
        for name, inside in schema.get(room, {}).items()
    }
    while ends := {name for name, refers_to in definitions.items() if not refers_to & definitions.keys()}:
        definitions = {name: refers_to for name, refers_to in definitions.items() if name not in ends}
    return bool(definitions)


def sample(schema: Schema, random: Random) -> object:
    """A value that fits the schema, decided by `random` alone.

    Heeded: type, enum, const, anyOf, oneOf, allOf, $ref, required, the bounds of numbers, strings and arrays, and
    strings' formats. `pattern`, `not` and `if` are not: script such an answer. Bounds also count where the SDK's schema
    transformation has moved them to, the end of a description (`{minimum: 0, maximum: 1}`), as a model would heed them.
    """
    return _sample(schema, schema, random, "value", 0)


def _sample(node: Schema, root: Schema, random: Random, name: str, depth: int) -> object:
    if "$ref" in node:
        return _sample(_target(node, root) or {}, root, random, name, depth + 1)
    if choices := [node["const"]] if "const" in node else node.get("enum"):
        return random.choice(choices)
    for part in node.get("allOf", ()):
        node = _merged(node, part)
    if variants := node.get("anyOf") or node.get("oneOf"):
        # The deeper, the plainer: what may refer to itself has to end.
        variant = random.choice(variants) if depth < DEPTH_MAX else min(variants, key=lambda one: len(str(one)))
        rest = {key: value for key, value in node.items() if key not in ("anyOf", "oneOf", "allOf")}
        return _sample(_merged(rest, variant), root, random, name, depth + 1)
    node = {**_hints(str(node.get("description", ""))), **node}
    kind = node.get("type", "object" if "properties" in node else "string")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        return _object(node, root, random, depth)
    if kind == "array":
        return _array(node, root, random, name, depth)
    if kind in ("integer", "number"):
        return _number(node, random, whole=kind == "integer")
    if kind == "boolean":
        return random.random() < 0.5
    return None if kind == "null" else _string(node, random, name)


def _merged(one: Schema, other: Schema) -> Schema:
    merged = {**one, **other}
    if "properties" in one and "properties" in other:
        merged["properties"] = {**one["properties"], **other["properties"]}
    if "required" in one and "required" in other:
        merged["required"] = [*one["required"], *other["required"]]
    return merged


def _hints(description: str) -> dict[str, float]:
    names = "minimum|maximum|exclusiveMinimum|exclusiveMaximum|multipleOf|minLength|maxLength|minItems|maxItems"
    return {key: float(value) for key, value in re.findall(rf"\b({names}): (-?\d+(?:\.\d+)?)", description)}


def _object(node: Schema, root: Schema, random: Random, depth: int) -> dict[str, object]:
    properties = node.get("properties", {})
    required = node.get("required") or []
    names = [name for name in properties if depth < DEPTH_MAX or name in required]
    return {name: _sample(properties[name], root, random, name, depth + 1) for name in names}


def _array(node: Schema, root: Schema, random: Random, name: str, depth: int) -> list[object]:
    least = int(node.get("minItems", 0))
    most = int(node.get("maxItems", max(least, 2)))
    wanted = random.randint(max(least, min(1, most)), most) if depth < DEPTH_MAX else least
    values: list[object] = []
    for _ in range(wanted * 20):  # bounded: a small enum may not have enough different values
        value = _sample(node.get("items") or {"type": "string"}, root, random, name, depth + 1)
        if len(values) < wanted and not (node.get("uniqueItems") and value in values):
            values.append(value)
    return values


def _number(node: Schema, random: Random, *, whole: bool) -> float:
    """A multiple of `multipleOf` (else of 1, or 0.01) within the bounds; without bounds, 0 to 100, or 0 to 1."""
    step: float = node.get("multipleOf", 1 if whole else 0.01)
    low: float = node.get("minimum", -math.inf)
    high: float = node.get("maximum", math.inf)
    if "exclusiveMinimum" in node:
        low = max(low, math.nextafter(node["exclusiveMinimum"], math.inf))
    if "exclusiveMaximum" in node:
        high = min(high, math.nextafter(node["exclusiveMaximum"], -math.inf))
    span = 100 * step
    if low == -math.inf:
        low = min(0, high - span)
    if high == math.inf:
        high = low + span
    first, last = math.ceil(low / step), math.floor(high / step)
    if first > last:  # the bounds are closer together than a step
        return (low + high) / 2
    value = random.randint(first, last) * step
    return int(value) if whole else min(max(round(value, 6), low), high)


_WORDS = [
    "steady",
    "careful",
    "plain",
    "tested",
    "small",
    "clear",
    "honest",
    "measured",
    "quiet",
    "exact",
    "simple",
    "sound",
]


def _string(node: Schema, random: Random, name: str) -> str:
    if "format" in node:
        return _formatted(node["format"], random)
    text = f"{name.replace('_', ' ')}: {random.choice(_WORDS)} {random.choice(_WORDS)}"
    while len(text) < node.get("minLength", 0):
        text += " " + random.choice(_WORDS)
    return text[: int(node.get("maxLength", len(text)))]


def _formatted(form: str, random: Random) -> str:
    day, hour, number = random.randint(1, 28), random.randint(0, 23), random.randint(1, 250)
    uuid = f"{random.getrandbits(32):08x}-{number:04x}-4{number:03x}-8{number:03x}-{random.getrandbits(48):012x}"
    return {
        "date-time": f"2026-01-{day:02}T{hour:02}:00:00Z",
        "date": f"2026-01-{day:02}",
        "time": f"{hour:02}:00:00Z",
        "duration": f"PT{number}M",
        "email": f"person{number}@example.com",
        "hostname": f"host{number}.example.com",
        "uri": f"https://example.com/{number}",
        "ipv4": f"192.0.2.{number}",
        "ipv6": f"2001:db8::{number:x}",
        "uuid": uuid,
        "byte": base64.b64encode(uuid.encode()).decode(),
    }.get(form, f"{form} {number}")
