"""What the rules of the audit's checklist look for. Each check yields what it found, and asks nothing but the files."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from app.pipelines import expressions, plan, schemas, templates
from app.pipelines.definition import Definition, Draft
from app.pipelines.handler_source import HandlerSource
from app.pipelines.model import Agent, FailureMode, Json, Pipeline
from app.pipelines.report import Place
from app.pipelines.yaml_source import Mapping as YamlMap
from app.pipelines.yaml_source import Scalar
from app.words import seconds

DEAD_LETTER_MAX_MS = 86_400_000

# Fields that name a moment or a number drawn at random.
_CHANGING = re.compile(r"(^|_)(time|timestamp|datetime|now|ts|epoch|nonce|random|rand|uuid|guid)($|_)|_at$", re.ASCII)
_CHANGING_FORMATS = frozenset({"date-time", "time", "uuid"})


class Found(NamedTuple):
    """What a rule found. `agent` is None where the whole file is meant; `file` None where it is the skill file."""

    agent: str | None
    place: Place
    message: str
    file: Path | None = None


@dataclass(frozen=True)
class Subject:
    """What is audited. `pipeline` is None where the file has errors: then its schemas are not asked.

    `sources` has an entry for each agent with a handler: None where its source was not found.
    """

    definition: Definition
    pipeline: Pipeline | None
    sources: Mapping[str, HandlerSource | None]

    @cached_property
    def drafts(self) -> dict[str, Draft]:
        return {draft.agent.id: draft for draft in self.definition.drafts}

    @cached_property
    def dependents(self) -> dict[str, list[str]]:
        return {name: [o for o, d in self.drafts.items() if name in d.agent.depends_on] for name in self.drafts}

    def upstream(self, agent_id: str) -> frozenset[str]:
        return plan.ancestors(self.definition.depends_on, agent_id) - {agent_id}

    def schema(self, name: str) -> Json | None:
        """The schema of the input or of an agent's output; None where there is none, or none that can be read."""
        if self.pipeline is None:
            return None
        return self.pipeline.input_schema if name == "input" else self.pipeline.by_id[name].schema

    def acts(self, agent: Agent) -> str | None:
        """What of a handler may have an effect outside; None where nothing has, or it is a model."""
        if agent.handler is None:
            return None
        source = self.sources.get(agent.id)
        return source.acts if source else "code that cannot be read here"


# The questions of any distributed system.


def consistency(subject: Subject) -> Iterator[Found]:
    for name, draft in subject.drafts.items():
        for item in draft.section.nodes("depends_on"):
            other = item.entries.get("agent", (None, None))[1] if isinstance(item, YamlMap) else item
            declared = isinstance(item, YamlMap) and "consistency" in item.entries
            if isinstance(other, Scalar) and not declared:
                message = f"{name} depends on {other.text} without a word on which state of it is good enough"
                yield Found(name, item.place, f"{message}: the exact one is taken.")


def failure_boundary(subject: Subject) -> Iterator[Found]:
    for name, draft in subject.drafts.items():
        agent = draft.agent
        if agent.gate or agent.requires_human_approval:
            continue
        may_lack = [o for o in agent.depends_on if _mode(subject, o) == FailureMode.CONTINUE]
        models = [o for o in subject.upstream(name) if subject.drafts[o].agent.model is not None]
        if may_lack:
            listed = _and(may_lack)
            yield Found(
                name, draft.section.place("depends_on"), f"{name} goes on where {listed} failed, without a gate."
            )
        elif agent.depends_on and not models and (acts := subject.acts(agent)):
            before = _and(agent.depends_on)
            yield Found(
                name, draft.section.place("id"), f"{name} acts ({acts}) on whatever {before} put out: it has no gate."
            )


def failure_mode_undeclared(subject: Subject) -> Iterator[Found]:
    for name, draft in subject.drafts.items():
        after = subject.dependents[name]
        into_join = any(len(subject.drafts[other].agent.depends_on) > 1 for other in after)
        if after and not into_join and "failure_mode" not in draft.section:
            yield Found(
                name, draft.section.place("id"), f"{name} does not say what follows when it fails: the run halts."
            )


def join(subject: Subject) -> Iterator[Found]:
    for name, draft in subject.drafts.items():
        if len(draft.agent.depends_on) < 2:
            continue
        silent = [
            o for o in draft.agent.depends_on if o in subject.drafts and "failure_mode" not in subject.drafts[o].section
        ]
        if silent:
            listed = _and(silent)
            message = f"{name} joins {len(draft.agent.depends_on)} branches, and {listed} has no failure_mode"
            yield Found(name, draft.section.place("depends_on"), f"{message}: one that fails halts the others, too.")


def not_idempotent(subject: Subject) -> Iterator[Found]:
    for name, draft in subject.drafts.items():
        source = subject.sources.get(name)
        if draft.agent.repeatable or (source and source.declares_once):
            continue
        tries = draft.agent.retry_policy.max_attempts
        again = f", and an exception in it runs it again, up to {tries} times" if tries > 1 else ""
        message = (
            f"{name} does not say that it may be done twice: a worker that dies under it leaves an unknown outcome"
        )
        yield Found(name, draft.section.place("id"), f"{message}{again}.")


def no_trace(subject: Subject) -> Iterator[Found]:
    top = subject.definition.top
    tracing = subject.definition.fields.get("tracing")
    if tracing is None or not tracing.enabled:
        yield Found(
            None, top.place("tracing" if "tracing" in top else "name"), "No trace is kept of this pipeline's runs."
        )


def no_dead_letter(subject: Subject) -> Iterator[Found]:
    if "deadline_ms" in subject.definition.fields:
        return
    for name, draft in subject.drafts.items():
        worst_ms = _worst_ms(draft.agent)
        if worst_ms > DEAD_LETTER_MAX_MS:
            place = draft.section.place("retry_policy" if "retry_policy" in draft.section else "id")
            yield Found(name, place, f"{name} may fail for {_span(worst_ms)} before it becomes a dead letter.")


# What experience adds.


def beyond_deadline(subject: Subject) -> Iterator[Found]:
    deadline_ms = subject.definition.fields.get("deadline_ms")
    if deadline_ms is None:
        return
    longest: dict[str, tuple[int, tuple[str, ...]]] = {}
    for name, draft in subject.drafts.items():  # dependencies first
        before = max((longest[o] for o in draft.agent.depends_on if o in longest), default=(0, ()))
        waits_ms = draft.agent.approval_timeout_ms or 0
        longest[name] = (before[0] + _worst_ms(draft.agent) + waits_ms, (*before[1], name))
    worst_ms, path = max(longest.values(), default=(0, ()))
    if worst_ms > deadline_ms:
        message = f"{' -> '.join(path)} may take {_span(worst_ms)} with every retry and approval"
        place = subject.definition.top.place("deadline_ms")
        yield Found(None, place, f"{message}; the deadline comes after {_span(deadline_ms)}.")


def key_without_run(subject: Subject) -> Iterator[Found]:
    for name, draft in subject.drafts.items():
        paths = templates.paths(draft.agent.key_parts)
        if not paths or ("run_id",) in paths or draft.agent.key_inputs:  # the loader warns of a key without any
            continue
        shared = [path for path in paths if len(path) > 1]
        of = f"the same {' and '.join('.'.join(path) for path in shared)}" if shared else "this pipeline"
        message = f"the key of {name} does not name its run: any run with {of} takes its output"
        yield Found(name, draft.section.place("idempotency_key"), f"{message}, or is refused for another input.")


def key_not_stable(subject: Subject) -> Iterator[Found]:
    for name, draft in subject.drafts.items():
        for path in templates.paths(draft.agent.key_parts):
            if len(path) > 1 and (_CHANGING.search(path[-1]) or _format(subject, path) in _CHANGING_FORMATS):
                message = f"{'.'.join(path)} in the key of {name} is a moment or a random number: no key comes twice."
                yield Found(name, draft.section.place("idempotency_key"), message)
        source = subject.sources.get(name)
        for once in source.onces if source else ():
            if once.unstable:
                message = (
                    f"the key of this ctx.once depends on {once.unstable}, so that a second attempt does it again."
                )
                yield Found(name, once.place, message, source.file if source else None)


def effect_without_check(subject: Subject) -> Iterator[Found]:
    for name, source in subject.sources.items():
        for once in source.onces if source else ():
            if not once.has_check:
                message = f"this effect of {name} has no check: a death in its midst waits for a person."
                yield Found(name, once.place, message, source.file if source else None)


def approval(subject: Subject) -> Iterator[Found]:
    if "deadline_ms" in subject.definition.fields:
        return
    for name, draft in subject.drafts.items():
        if draft.agent.requires_human_approval and draft.agent.approval_timeout_ms is None:
            yield Found(name, draft.section.place("requires_human_approval"), f"{name} waits for a person without end.")


def schema_lacks(subject: Subject) -> Iterator[Found]:
    """What a handler reads. Gates, keys and prompts are the loader's."""
    for name, source in subject.sources.items():
        if source is None or subject.pipeline is None:
            continue
        upstream = subject.upstream(name)
        for read in source.reads:
            root, fields = read.path[0], read.path[1:]
            problem = None
            if root != "input" and root not in upstream:
                problem = f"{root} is not upstream of {name}"
            elif root != "input" and _mode(subject, root) == FailureMode.CONTINUE:
                problem = f"{root} may end without an output, under continue: use ctx.inputs.get({root!r})"
            elif fields:
                problem = _lacking(subject, root, fields)
            if problem:
                yield Found(name, read.place, f"{name} reads {'.'.join(read.path)}, and {problem}.", source.file)


def _lacking(subject: Subject, root: str, fields: tuple[str, ...]) -> str | None:
    schema = subject.schema(root)
    if schema is None:
        return f"{'no input_schema' if root == 'input' else f'no output_schema of {root}'} promises it"
    found = schemas.find(schema, fields)
    if not found.there:
        return f"the schema of {root} has no such field"
    return None if found.always else f"the schema of {root} does not require it"


def unbounded_output(subject: Subject) -> Iterator[Found]:
    for name, draft in subject.drafts.items():
        agent, place = draft.agent, draft.section.place("output_schema" if "output_schema" in draft.section else "id")
        if agent.model is None:
            if agent.output_schema is None and subject.dependents[name]:
                yield Found(name, place, f"{name} has no output_schema: its dependents may get anything, of any size.")
            continue
        unbounded = schemas.unbounded(subject.schema(name) or {})
        if unbounded and "max_tokens" not in draft.section:
            listed = ", ".join(unbounded[:3]) + (", …" if len(unbounded) > 3 else "")
            yield Found(name, place, f"{listed} of {name} may be as long as its {agent.max_tokens:,} tokens allow.")


def untrusted(subject: Subject) -> Iterator[Found]:
    for name, draft in subject.drafts.items():
        agent = draft.agent
        models = [
            o for o in subject.drafts if o in subject.upstream(name) and subject.drafts[o].agent.model is not None
        ]
        acts = subject.acts(agent)
        if not models or not acts or agent.requires_human_approval:
            continue
        read = {path[0] for path in expressions.parse(agent.gate).references} if agent.gate else set()
        if not read - set(models):
            gate = "its gate asks only models" if agent.gate else "it has no gate"
            message = f"{name} acts ({acts}) on what {_and(models)} wrote: {gate}, and no person approves it."
            yield Found(name, draft.section.place("gate" if agent.gate else "id"), message)


def _and(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), *names[-1:]])


def _mode(subject: Subject, agent_id: str) -> FailureMode | None:
    return subject.drafts[agent_id].agent.failure_mode if agent_id in subject.drafts else None


def _format(subject: Subject, path: templates.Path) -> object:
    schema = subject.schema(path[0]) if path[0] == "input" or path[0] in subject.drafts else None
    for name in path[1:]:
        schema = (schema or {}).get("properties", {}).get(name)
    return schema.get("format") if isinstance(schema, dict) else None


def _worst_ms(agent: Agent) -> int:
    """The longest that an agent may take until it is completed or given up, its waits for a key or a 429 apart."""
    policy = agent.retry_policy
    return policy.max_attempts * agent.timeout_ms + sum(map(policy.delay_ms, range(1, policy.max_attempts)))


def _span(span_ms: int) -> str:
    return seconds(span_ms / 1000)
