"""JSON Schemas beside a skill file: read, checked, and made fit for Claude's structured outputs.

A model's answer is shaped by its schema, so each object in it must be closed. A schema that says nothing gets
`additionalProperties: false`; one that says otherwise is refused. References stay inside the file, and a model's schema
may not be recursive. Limits such as `minimum` or `pattern` stay in the schema: they are checked when the answer is
there, and whoever builds the request leaves out what the API does not take.
"""

import copy
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.pipelines import plan, yaml_source
from app.pipelines.limits import NESTING_MAX_LEVELS, SCHEMA_VALUES_MAX_COUNT
from app.pipelines.model import Json
from app.pipelines.report import Place, Report, Unreadable, cut, nearest, place_of

Pointer = tuple[str | int, ...]

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLES = (
    "items",
    "additionalProperties",
    "contains",
    "propertyNames",
    "not",
    "if",
    "then",
    "else",
    "unevaluatedItems",
    "unevaluatedProperties",
)
_REFUSED = ("$dynamicRef", "$recursiveRef", "$dynamicAnchor", "$recursiveAnchor", "$anchor")
# The keywords whose schemas go to the API.
_SENT = ("properties", "$defs", "items", "anyOf", "oneOf", "allOf")
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_DEFS = "#/$defs/"


@dataclass(frozen=True, slots=True)
class Schema:
    """A schema and where its parts stand. `tree` is None where YAML cannot read what JSON can."""

    file: Path
    value: Json
    tree: yaml_source.Node | None

    def place(self, pointer: Sequence[str | int]) -> Place:
        """Where a part stands, or the nearest part around it."""
        node, place = self.tree, (1, 1)
        for name in pointer:
            if isinstance(node, yaml_source.Mapping) and name in node.entries:
                key, node = node.entries[str(name)]
                place = key.place
            elif isinstance(node, yaml_source.Sequence) and isinstance(name, int) and name < len(node.items):
                node = node.items[name]
                place = node.place
            else:
                break
        return place


def read(report: Report, file: Path, text: str) -> Schema | None:
    """A schema without faults; None where there are any, which are then reported. Raises Unreadable."""
    value = _parse(text)
    try:
        tree = yaml_source.parse(text)
    except Unreadable:
        tree = None
    schema = Schema(file, value, tree)
    problems = list(_metaschema_problems(value)) or list(_problems(value))
    for pointer, message in problems:
        report.error(file, schema.place(pointer), message)
    return None if problems else schema


def for_model(report: Report, schema: Schema) -> Json:
    """The schema with every object closed. What structured outputs cannot do is reported."""
    for pointer, message in _model_problems(schema.value):
        report.error(schema.file, schema.place(pointer), message)
    closed = copy.deepcopy(schema.value)
    for _, part in _parts(closed):
        if part.get("type") == "object":
            part["additionalProperties"] = False
    return closed


@dataclass(frozen=True, slots=True)
class Found:
    """What a schema says of a path: whether it is there, and always. `known` are the fields where it was not."""

    there: bool
    always: bool
    known: tuple[str, ...] = ()


def find(schema: Json, path: Sequence[str]) -> Found:
    """Whether the values of a schema have a field at a path of field names."""
    always = True
    part: object = schema
    for name in path:
        fields = _fields(part, schema, set())
        if name not in fields:
            return Found(there=False, always=False, known=tuple(fields))
        part, required = fields[name]
        always = always and required
    return Found(there=True, always=always)


def unbounded(schema: Json) -> tuple[str, ...]:
    """The texts and lists, by their path, to whose length a schema sets no limit."""
    limits = {"string": ("maxLength", "enum", "const", "format"), "array": ("maxItems", "enum", "const")}
    found = []
    for pointer, part in _parts(schema):
        known = limits.get(str(part.get("type")), ())
        if known and not any(keyword in part for keyword in known):
            names = [str(name) for name in pointer if name not in _MAPS and not isinstance(name, int)]
            found.append(".".join(name for name in names if name not in (*_SINGLES, *_LISTS)) or "it")
    return tuple(dict.fromkeys(found))


def _fields(part: object, root: Json, seen: set[int]) -> dict[str, tuple[object, bool]]:
    """Field name -> its schema, and whether it must be present. References and alternatives are followed, each once."""
    if not isinstance(part, dict) or id(part) in seen:
        return {}
    seen.add(id(part))
    required = part.get("required", [])
    fields = {name: (sub, name in required) for name, sub in part.get("properties", {}).items()}
    if "$ref" in part:
        fields |= _fields(_resolve(root, part["$ref"]), root, seen)
    for keyword in ("allOf", "anyOf", "oneOf"):
        for sub in part.get(keyword, ()):
            for name, (schema, always) in _fields(sub, root, seen).items():
                fields.setdefault(name, (schema, always and keyword == "allOf"))
    return fields


def _parse(text: str) -> Json:
    duplicates: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> Json:
        found: Json = {}
        for key, value in pairs:
            if key in found:
                duplicates.append(key)
            found[key] = value
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise Unreadable((error.lineno, error.colno), f"is not JSON: {error.msg}.") from error
    except (ValueError, RecursionError) as error:
        raise Unreadable((1, 1), f"is not JSON that can be stored: {error}.") from error
    if duplicates:
        place = place_of(text, max(0, text.rfind(json.dumps(duplicates[0]))))
        raise Unreadable(place, f"has the key {cut(duplicates[0])} twice in one object.")
    if not isinstance(value, dict):
        raise Unreadable((1, 1), "is no JSON object.")
    _check_values(value)
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _check_values(root: object) -> None:
    waiting = [(root, 1)]
    for count in itertools.count(1):
        if not waiting:
            return
        value, level = waiting.pop()
        if level > NESTING_MAX_LEVELS or count > SCHEMA_VALUES_MAX_COUNT:
            limits = f"{NESTING_MAX_LEVELS} levels and {SCHEMA_VALUES_MAX_COUNT} values"
            raise Unreadable((1, 1), f"is larger than {limits}.")
        if isinstance(value, str) and yaml_source.unstorable(value) is not None:
            raise Unreadable((1, 1), "holds a NUL or half of a surrogate pair, which cannot be stored.")
        if isinstance(value, dict):
            waiting += [(key, level) for key in value]
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(child, level + 1) for child in children]


def _metaschema_problems(value: Json) -> Iterator[tuple[Pointer, str]]:
    from jsonschema import Draft202012Validator

    dialect = value.get("$schema", _DIALECT)
    if dialect != _DIALECT:
        yield ("$schema",), f"the dialect {cut(str(dialect))} is not read: remove the line, or write {_DIALECT}."
        return
    validator = Draft202012Validator(
        Draft202012Validator.META_SCHEMA, format_checker=Draft202012Validator.FORMAT_CHECKER
    )
    for error in validator.iter_errors(value):
        at = ".".join(str(name) for name in error.absolute_path) or "the schema"
        yield tuple(error.absolute_path), f"{at} is no JSON Schema: {cut(error.message)}."


def _problems(value: Json) -> Iterator[tuple[Pointer, str]]:
    """What the metaschema lets pass. It did pass, so every keyword has its type."""
    if value.get("type") != "object":
        yield (), "the schema must say type: object, since an output has named fields."
    for pointer, part in _parts(value):
        for keyword in _REFUSED:
            if keyword in part:
                yield (*pointer, keyword), f"{keyword} is not supported: use $ref and $defs."
        if pointer and "$id" in part:
            yield (*pointer, "$id"), "$id is supported at the top only."
        reference = part.get("$ref")
        if reference is not None and not reference.startswith("#"):
            yield (*pointer, "$ref"), f"$ref {cut(reference)} leads out of this file: copy it to $defs."
        elif reference is not None and _resolve(value, reference) is None:
            hint = nearest(reference, [_DEFS + name for name in value.get("$defs", {})])
            yield (*pointer, "$ref"), f"$ref {cut(reference)} leads nowhere.{hint}"


def _model_problems(value: Json) -> Iterator[tuple[Pointer, str]]:
    """What structured outputs cannot do, in a schema without other problems."""
    for pointer, part in _parts(value):
        untyped = [below for below, child in _children(part) if isinstance(child, bool) and below[0] in _SENT]
        for below in untyped if _is_typed(part) else [(), *untyped]:
            yield (*pointer, *below), "a model's answer needs a type here."
        if any("$ref" in child for child in part.get("allOf", ()) if isinstance(child, dict)):
            yield (*pointer, "allOf"), "a model's schema has no $ref in allOf: write its fields out."
        if isinstance(part.get("type"), list):
            yield (*pointer, "type"), "a model's answer has one type: write anyOf for several."
        if part.get("type") == "object" and part.get("additionalProperties", False) is not False:
            yield (*pointer, "additionalProperties"), "a model's answer has no further fields: write false."
        if not part.get("$ref", _DEFS).startswith(_DEFS):
            yield (*pointer, "$ref"), f"a model's schema refers to {_DEFS}<name> only."
    for name in _recursive(value):
        yield ("$defs", name), f"a model's schema may not be recursive, as {name!r} is."


def _recursive(value: Json) -> list[str]:
    """The definitions that lead back to themselves, one for each cycle."""
    uses: dict[str, list[str]] = {name: [] for name in value.get("$defs", {})}
    for pointer, part in _parts(value):
        if pointer[:1] == ("$defs",) and "$ref" in part:
            uses[str(pointer[1])].append(part["$ref"].removeprefix(_DEFS).split("/")[0])
    return [cycle[0] for cycle in plan.order(uses)[1]]


def _is_typed(part: Json) -> bool:
    values = [*part.get("enum", ()), *([part["const"]] if "const" in part else ())]
    by_values = bool(values) and not any(isinstance(value, dict | list) for value in values)
    return by_values or any(keyword in part for keyword in ("type", "anyOf", "oneOf", "allOf", "$ref"))


def _parts(value: object, pointer: Pointer = ()) -> Iterator[tuple[Pointer, Json]]:
    """Every schema inside a schema, itself first. `true` and `false` are left out."""
    if isinstance(value, dict):
        yield pointer, value
        for below, child in _children(value):
            yield from _parts(child, (*pointer, *below))


def _children(part: Json) -> Iterator[tuple[Pointer, object]]:
    """The schemas right below a schema."""
    for keyword in _SINGLES:
        if keyword in part:
            yield (keyword,), part[keyword]
    for keyword in _MAPS:
        yield from (((keyword, name), child) for name, child in part.get(keyword, {}).items())
    for keyword in _LISTS:
        yield from (((keyword, index), child) for index, child in enumerate(part.get(keyword, ())))


def _resolve(root: Json, reference: str) -> object:
    """What a reference inside a file leads to; None for nothing."""
    part: object = root
    for name in reference.removeprefix("#").removeprefix("/").split("/") if reference != "#" else ():
        key = name.replace("~1", "/").replace("~0", "~")
        if isinstance(part, list) and key.isascii() and key.isdigit() and int(key[:6]) < len(part):
            part = part[int(key[:6])]
        elif isinstance(part, dict) and key in part:
            part = part[key]
        else:
            return None
    return part
