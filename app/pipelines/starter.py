"""Writes a starter skill, or what is missing beside a lone skill file. Never overwrites, and invents no effects.

What it makes up (schemas' fields, handlers that do nothing) is a place to begin. `simulator.yaml` has an answer for
each model whose schema was made up, chosen so that the gates hold: the skill then runs against the simulator.
"""

import itertools
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import yaml

from app.errors import AuthorMistake, Misuse, NotPossible
from app.pipelines import expressions, files, limits, loader, names, prompts, starter_texts, templates
from app.pipelines.definition import Allowed, Definition, Draft
from app.pipelines.model import Agent, Json
from app.pipelines.report import Report, Unreadable

_TRIES_MAX_COUNT = 5_000
_CANDIDATES_MAX_COUNT = 20

_Fields = dict[templates.Path, object]  # path in a schema -> a value that it may take; None where nothing is known

# The field that every schema made up here has.
_SUMMARY = ("summary",)


def create(folder: Path, name: str) -> tuple[Path, ...]:
    """Writes a skill of three agents into a folder, made if need be; gives the files, the skill file first.

    Raises Misuse for a bad name, NotPossible where one of the files exists or cannot be written.
    """
    if not names.PIPELINE_NAME.fullmatch(name):
        raise Misuse(f"{name!r} is no name for a pipeline.", next_step="Use letters, digits, '-', '_' and '.'.")
    texts = {f"{name}{loader.SUFFIXES[0]}": starter_texts.SKILL.replace("NAME", name), **starter_texts.BESIDE}
    for relative in texts:
        if (folder / relative).exists():
            raise NotPossible(f"{folder / relative} exists already.", next_step="Choose another folder.")
    return _write(folder, texts)


def complete(skill: Path, *, aliases: Mapping[str, str], handler_modules: Collection[str]) -> tuple[Path, ...]:
    """Writes the prompts, schemas and handlers that a skill file names and that are missing; gives the files written.

    Raises InvalidFile for faults of the file itself, NotPossible where something cannot be written.
    """
    report = Report()
    file = loader.find(skill)
    definition = loader.read_definition(report, file, Allowed(aliases, handler_modules))
    if definition is None or report.has_errors:
        raise loader.invalid(file, report.faults)
    return _write(file.parent, _missing(file.parent, definition))


def _write(folder: Path, texts: Mapping[str, str]) -> tuple[Path, ...]:
    written = []
    for relative, text in texts.items():
        path = folder / relative
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.parent.resolve().is_relative_to(folder.resolve()):
                raise NotPossible(f"{path.parent} leads out of the skill's folder.", next_step="Remove the link.")
            with path.open("x", encoding="utf-8") as stream:
                stream.write(text)
        except OSError as error:
            raise NotPossible(f"{path} cannot be written: {error.strerror}.") from error
        written.append(path)
    return tuple(written)


def _missing(folder: Path, definition: Definition) -> dict[str, str]:
    """The texts to write, by path. What exists, as a file or a broken link, is left alone."""
    name = definition.fields["name"]
    agents = [draft.agent for draft in definition.drafts]
    fields = _fields(folder, definition)
    texts, rules = {}, []
    for agent in agents:
        if agent.model is not None and agent.output_schema:
            prompt = starter_texts.PROMPT.format(agent=agent.id, pipeline=name, schema=agent.output_schema)
            texts[f"prompts/{agent.id}.md"] = prompt
            if agent.output_schema in fields:
                first_line = _system(folder, agent.id) or prompts.parse(prompt).prompt.system.splitlines()[0]
                reply = _values({_SUMMARY: f"What {agent.id} would say.", **fields[agent.output_schema]})
                rules.append({"match": {"system": _literal(first_line[:200])}, "reply": reply})
    for schema, found in fields.items():
        known: _Fields = {} if schema == definition.input_schema else {_SUMMARY: None}
        texts[f"schemas/{schema}.json"] = json.dumps(_schema({**known, **found}), indent=2) + "\n"
    handlers = [agent for agent in agents if (agent.handler or "").startswith(f"{names.HANDLERS_MODULE}:")]
    if handlers:
        texts[f"{names.HANDLERS_MODULE}.py"] = _handlers(name, handlers, fields)
    if rules:
        texts["simulator.yaml"] = starter_texts.SIMULATOR + yaml.safe_dump({"rules": rules}, sort_keys=False, width=200)
    return {relative: text for relative, text in texts.items() if not _exists(folder / relative)}


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


# What a missing schema must hold: what gates, keys and prompts read, with values that let the gates hold.


def _fields(folder: Path, definition: Definition) -> dict[str, _Fields]:
    """The fields of each missing schema."""
    schema_of = {draft.agent.id: draft.agent.output_schema for draft in definition.drafts}
    schema_of["input"] = definition.input_schema
    found: dict[str, _Fields] = {
        name: {} for name in schema_of.values() if name and not _exists(folder / "schemas" / f"{name}.json")
    }
    read = [path for draft in definition.drafts for path in _read_by(folder, draft)]
    read += templates.paths(definition.fields.get("concurrency_parts", ()))
    values = _values_for([draft.agent.gate for draft in definition.drafts if draft.agent.gate])
    for path in read:
        schema = schema_of.get(path[0])
        if schema in found and len(path) > 1:
            found[schema].setdefault(path[1:], values.get(path))
    return found


def _read_by(folder: Path, draft: Draft) -> list[templates.Path]:
    """What an agent's gate, key, key's inputs and, where it exists, prompt read."""
    texts = [draft.agent.gate or "", draft.agent.idempotency_key]
    read = [*draft.agent.key_inputs, *(path for text in texts for _, _, path in templates.variables(text))]
    try:
        prompt = prompts.parse(files.read_inside(folder, f"prompts/{draft.agent.id}.md", limits.PROMPT_MAX_BYTES))
        return [*read, *(path for _, _, path in templates.variables(prompt.prompt.user))]
    except (Unreadable, templates.BadText):  # the audit says what is wrong with an existing prompt
        return read


def _values_for(gates: list[str]) -> dict[templates.Path, object]:
    """For each reference a value, such that the gates hold one after the other; nothing where none is found."""
    chosen: dict[templates.Path, object] = {}
    for gate in map(expressions.parse, gates):
        free = [path for path in gate.references if path not in chosen]
        tries = itertools.product(_candidates(gate), repeat=len(free))
        for values in itertools.islice(tries, _TRIES_MAX_COUNT):
            tried = {**chosen, **dict(zip(free, values, strict=True))}
            if _holds(gate, tried):
                chosen = tried
                break
    return chosen


def _candidates(gate: expressions.Gate) -> list[object]:
    numbers = [value for value in gate.literals if isinstance(value, int | float)]
    texts = [value for value in gate.literals if isinstance(value, str)]
    near = [number + step for number in numbers for step in (1, -1)]
    candidates: list[object] = [True, 1, *numbers, *texts, *near, *([text] for text in texts), False, "text"]
    return candidates[:_CANDIDATES_MAX_COUNT]


def _holds(gate: expressions.Gate, values: Mapping[templates.Path, object]) -> bool:
    try:
        return gate.evaluate(_values({path: values[path] for path in gate.references})).held
    except AuthorMistake:
        return False


def _values(fields: _Fields) -> Json:
    """The object that has a value at each path; a text where nothing is known."""
    made: Json = {}
    for path, value in _leaves(fields).items():
        inside = made
        for name in path[:-1]:
            inside = inside.setdefault(name, {})
        inside[path[-1]] = "text" if value is None else value
    return made


def _schema(fields: _Fields) -> Json:
    """The schema of such an object, which needs every field."""
    made: Json = {**_OBJECT, "properties": {}}
    for path, value in _leaves(fields).items():
        inside = made
        for name in path[:-1]:
            inside = inside["properties"].setdefault(name, {**_OBJECT, "properties": {}})
        inside["properties"][path[-1]] = _type(value)
    _require(made)
    return made


_OBJECT = {"type": "object", "additionalProperties": False}


def _require(schema: Json) -> None:
    for part in schema["properties"].values():
        if "properties" in part:
            _require(part)
    schema["required"] = list(schema["properties"])


def _type(value: object) -> Json:
    match value:
        case None:
            return {"type": "string"}
        case bool():
            return {"type": "boolean", "examples": [value]}
        case int() | float():
            bounds = {"minimum": 0, "maximum": 1} if 0 <= value <= 1 else {}
            return {"type": "number", **bounds, "examples": [value]}
        case list():
            return {"type": "array", "items": {"type": "string"}, "examples": [value]}
        case _:
            return {"type": "string", "examples": [value]}


def _leaves(fields: _Fields) -> _Fields:
    """The paths that no other path goes through."""
    return {
        path: value
        for path, value in fields.items()
        if not any(len(other) > len(path) and other[: len(path)] == path for other in fields)
    }


# Texts.


def _system(folder: Path, agent_id: str) -> str | None:
    """The first line of an existing prompt's system part; None where there is none."""
    try:
        prompt = prompts.parse(files.read_inside(folder, f"prompts/{agent_id}.md", limits.PROMPT_MAX_BYTES))
    except Unreadable:
        return None
    return prompt.prompt.system.splitlines()[0]


def _literal(text: str) -> str:
    """A regular expression that finds exactly this text."""
    return re.sub(r"([\\.^$*+?{}\[\]|()])", r"\\\1", text)


def _handlers(name: str, agents: list[Agent], fields: Mapping[str, _Fields]) -> str:
    stubs = {}
    for agent in agents:
        function = (agent.handler or "").partition(":")[2]
        made_up = fields.get(agent.output_schema or "")
        output = {} if made_up is None else _values({_SUMMARY: None, **made_up})
        stubs[function] = starter_texts.HANDLER.format(function=function, output=output)
    return starter_texts.HANDLERS.format(pipeline=name) + "".join(stubs.values())
