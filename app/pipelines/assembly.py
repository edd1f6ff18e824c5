"""Joins a definition with the prompts, schemas and handlers beside it, and checks what each says of the others."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar

from app.pipelines import files, handlers, limits, plan, prompts, schemas, templates
from app.pipelines.definition import Definition, Draft, may_be_missing
from app.pipelines.model import Agent, FailureMode, Json, Pipeline, canonical_json
from app.pipelines.names import FIELD, HANDLERS_MODULE, RUN_NAMES
from app.pipelines.report import WHOLE_FILE, Place, Report, Unreadable, nearest
from app.redaction import hides

_T = TypeVar("_T")
_User = Literal["gate", "idempotency_key", "key_inputs", "prompt"]


def assemble(report: Report, file: Path, definition: Definition) -> Pipeline | None:
    """The whole pipeline; None where there are errors, which are then reported."""
    return _Assembly(report, file, definition).pipeline()


class _Assembly:
    def __init__(self, report: Report, file: Path, definition: Definition) -> None:
        self._report = report
        self._file = file
        self._definition = definition
        self._drafts = {draft.agent.id: draft for draft in definition.drafts}
        self._schemas: dict[str, schemas.Schema | None] = {}

    def pipeline(self) -> Pipeline | None:
        top, input_schema = self._definition.top, self._definition.input_schema
        if input_schema:
            self._read_schema(input_schema, top.place("input_schema"))
        every = (*self._drafts.values(), *self._definition.doubles)
        for draft in every:
            if draft.agent.output_schema:
                self._read_schema(draft.agent.output_schema, draft.section.place("output_schema"))
        self._check_handlers(every)
        self._check_concurrency_key()
        agents = tuple(self._agent(draft) for draft in every)
        if self._report.has_errors:
            return None
        source = self._schemas[input_schema] if input_schema else None
        pipeline = Pipeline(**self._definition.fields, agents=agents, input_schema=source.value if source else None)
        size_bytes = len(canonical_json(pipeline.as_json()).encode())
        if size_bytes > limits.DEFINITION_MAX_BYTES:
            what = f"the definition with its prompts and schemas has {size_bytes} bytes"
            self._report.error(self._file, WHOLE_FILE, f"{what}; the most is {limits.DEFINITION_MAX_BYTES}.")
        return pipeline

    def _agent(self, draft: Draft) -> Agent:
        agent = draft.agent
        upstream = plan.ancestors({**self._definition.depends_on, agent.id: agent.depends_on}, agent.id) - {agent.id}
        prompt = self._prompt(draft) if agent.model is not None else None
        used = set(agent.inputs)
        for user, path, file, place in self._references(draft, prompt):
            problem, rule = self._problem(user, path, agent, upstream)
            if problem:
                name = ".".join(path)
                shown = name if user == "key_inputs" else f"{{{{{name}}}}}"
                self._report.error(file, place, f"{shown}: {problem}", rule)
            elif path[0] in upstream:
                used.add(path[0])
            if user == "idempotency_key":
                self._warn_of_secret(path, place)
        reads = used if agent.model is not None else upstream
        return replace(
            agent,
            prompt=prompt.prompt if prompt else None,
            schema=self._output_schema(agent),
            reads=tuple(name for name in self._drafts if name in reads),
        )

    # What lies beside the file.

    def _beside(self, relative: str, max_bytes: int, place: Place, parse: Callable[[str], _T]) -> _T | None:
        """What `parse` makes of a file. `place` is where the skill file asks for it."""
        try:
            return parse(files.read_inside(self._file.parent, relative, max_bytes))
        except Unreadable as error:
            if error.place == WHOLE_FILE:
                self._report.error(self._file, place, f"{relative} {error}")
            else:
                self._report.error(self._file.parent / relative, error.place, f"the file {error}")
            return None

    def _read_schema(self, name: str, place: Place) -> None:
        if name not in self._schemas:
            relative = f"schemas/{name}.json"
            self._schemas[name] = self._beside(
                relative,
                limits.SCHEMA_MAX_BYTES,
                place,
                lambda text: schemas.read(self._report, self._file.parent / relative, text),
            )

    def _output_schema(self, agent: Agent) -> Json | None:
        schema = self._schemas[agent.output_schema] if agent.output_schema else None
        if schema is None:
            return None
        return schemas.for_model(self._report, schema) if agent.model is not None else schema.value

    def _prompt_file(self, agent: Agent) -> Path:
        return self._file.parent / "prompts" / f"{agent.id}.md"

    def _prompt(self, draft: Draft) -> prompts.PromptText | None:
        place = draft.section.place("model")
        return self._beside(f"prompts/{draft.agent.id}.md", limits.PROMPT_MAX_BYTES, place, prompts.parse)

    def _check_handlers(self, drafts: Collection[Draft]) -> None:
        wanted = []
        for draft in drafts:
            module, _, function = (draft.agent.handler or "").partition(":")
            if module == HANDLERS_MODULE:
                wanted.append((function, draft.section.place("handler" if "handler" in draft.section else "id")))
        if not wanted:
            return
        relative = f"{HANDLERS_MODULE}.py"
        place = wanted[0][1]
        found = self._beside(relative, limits.HANDLERS_MAX_BYTES, place, handlers.functions)
        if found is None:
            return
        for function, place in wanted:
            if function not in found:
                hint = nearest(function, found)
                self._report.error(self._file, place, f"{relative} has no function {function!r}.{hint}")
            elif (problem := found[function][1]) is not None:
                self._report.error(self._file.parent / relative, found[function][0], problem)

    # What a gate, a key or a prompt reads.

    def _references(
        self, draft: Draft, prompt: prompts.PromptText | None
    ) -> Iterator[tuple[_User, templates.Path, Path, Place]]:
        """What an agent names, and where. A prompt that cannot be parsed is reported."""
        agent, section = draft.agent, draft.section
        for start, _, path in templates.variables(agent.idempotency_key):
            yield "idempotency_key", path, self._file, section.place_in("idempotency_key", start)
        for start, _, path in templates.variables(agent.gate or ""):
            yield "gate", path, self._file, section.place_in("gate", start)
        for item in section.names("key_inputs", FIELD, limits.KEY_INPUTS_MAX_COUNT) or ():
            yield "key_inputs", tuple(item.text.split(".")), self._file, item.place
        if prompt:
            try:
                for start, _, path in templates.variables(prompt.prompt.user):
                    yield "prompt", path, self._prompt_file(agent), prompt.place(start)
            except templates.BadText as error:
                self._report.error(self._prompt_file(agent), prompt.place(error.offset), str(error))

    def _problem(
        self, user: _User, path: templates.Path, agent: Agent, upstream: frozenset[str]
    ) -> tuple[str | None, str]:
        """What is wrong with a reference, and the audit's rule for it; None where nothing is."""
        root, fields = path[0], path[1:]
        if root in RUN_NAMES and user != "gate":
            return (f"{root} has no fields." if fields else None), ""
        if root != "input" and root not in upstream:
            if root in self._drafts:
                return f"{root} is not upstream of {agent.id}: add it to depends_on.", ""
            return f"{root!r} is neither an agent upstream nor 'input'.{nearest(root, [*upstream, 'input'])}", ""
        # A missing output counts as null among the key's inputs; whatever else reads one would fail there.
        optional = root in upstream and self._drafts[root].agent.failure_mode == FailureMode.CONTINUE
        if optional and user != "key_inputs":
            return may_be_missing(root), ""
        return None if user == "prompt" and not fields else self._field_problem(root, fields), "schema-lacks-field"

    def _check_concurrency_key(self) -> None:
        top = self._definition.top
        for start, _, path in templates.variables(self._definition.fields.get("concurrency_key", "")):
            before = "only the input is known before a run starts: name one of its fields."
            problem = self._field_problem("input", path[1:]) if path[0] == "input" else before
            place = top.place_in("concurrency_key", start)
            if problem:
                self._report.error(self._file, place, f"{{{{{'.'.join(path)}}}}}: {problem}")
            self._warn_of_secret(path, place)

    def _warn_of_secret(self, path: templates.Path, place: Place) -> None:
        """A key is stored, indexed and compared as it is rendered."""
        name = self._definition.input_schema if path[0] == "input" else None
        if path[0] in self._drafts:
            name = self._drafts[path[0]].agent.output_schema
        schema = self._schemas[name] if name else None
        if hides(path[1:], schema.value if schema else None):
            shown = ".".join(path)
            self._report.warn(self._file, place, f"{{{{{shown}}}}} is a secret: a key should name something else.")

    def _field_problem(self, root: str, fields: templates.Path) -> str | None:
        if not fields:
            return f"name one of its fields, such as {{{{{root}.field}}}}."
        name = self._definition.input_schema if root == "input" else self._drafts[root].agent.output_schema
        if name is None:
            return None if root == "input" else f"{root} has no output_schema, so its fields are unknown."
        schema = self._schemas[name]
        found = schemas.find(schema.value, fields) if schema else None
        if not found or (found.there and found.always):
            return None
        if found.there:
            return f"the schema {name} does not require it, so it may be missing: add it to 'required'."
        return f"the schema {name} has no such field.{nearest(fields[-1], found.known)}"
