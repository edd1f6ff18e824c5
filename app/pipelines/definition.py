"""Reads the skill file itself, without what lies beside it: fields, defaults, dependencies."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.pipelines import dependencies, expressions, limits, names, plan, suppressions, templates
from app.pipelines.model import (
    DEFAULT_KEY,
    Agent,
    Backoff,
    Checkpointing,
    FailureMode,
    Json,
    OnRefused,
    Queue,
    RetryPolicy,
    Tracing,
)
from app.pipelines.report import Report, nearest
from app.pipelines.sections import Section, section_of
from app.pipelines.suppressions import Suppression
from app.pipelines.yaml_source import Node

TOP_FIELDS = (
    "name",
    "version",
    "description",
    "agents",
    "input_schema",
    "concurrency_key",
    "deadline_ms",
    "tracing",
    "checkpointing",
    "suppress",
)
AGENT_FIELDS = (
    "id",
    "model",
    "handler",
    "depends_on",
    "timeout_ms",
    "retry_policy",
    "failure_mode",
    "output_schema",
    "state_input",
    "gate",
    "on_refused",
    "requires_human_approval",
    "approval_timeout_ms",
    "idempotent",
    "idempotency_key",
    "key_inputs",
    "max_tokens",
    "effort",
    "queue",
)
RETRY_FIELDS = ("max_attempts", "backoff", "initial_ms", "max_ms", "jitter", "max_worker_losses")
ON_REFUSED_FIELDS = ("rerun", "max_rounds")
TRACING_FIELDS = ("enabled", "provider", "log_inputs", "log_outputs", "sample_rate")
CHECKPOINTING_FIELDS = ("enabled", "store", "ttl_minutes")


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the settings admit: `aliases` of retired models, and the modules that may hold handlers."""

    aliases: Mapping[str, str]
    handler_modules: Collection[str]


@dataclass(frozen=True, slots=True)
class Draft:
    """An agent as the file says it, and where."""

    agent: Agent
    section: Section


@dataclass(frozen=True, slots=True)
class Definition:
    """What the skill file alone says. `drafts` are the agents that have an id, dependencies first.

    `doubles` are those whose id stood before: an error, and checked like the others.
    """

    top: Section
    fields: dict[str, Any]
    input_schema: str | None
    drafts: tuple[Draft, ...]
    doubles: tuple[Draft, ...]
    accepted: tuple[Suppression, ...]

    @property
    def depends_on(self) -> dict[str, tuple[str, ...]]:
        return {draft.agent.id: draft.agent.depends_on for draft in self.drafts}


def read(report: Report, file: Path, node: Node, allowed: Allowed) -> Definition | None:
    """The definition, with defaults for what is wrong; None where there is nothing to go on."""
    top = section_of(report, file, node, TOP_FIELDS, "a skill file")
    if top is None:
        return None
    for key in ("name", "version", "agents"):
        top.require(key)
    fields = _given(
        name=top.name("name", names.PIPELINE_NAME),
        version=top.name("version", names.VERSION),
        description=top.text("description", limits.DESCRIPTION_MAX_CHARS),
        **_concurrency(top),
        deadline_ms=top.integer("deadline_ms", limits.DEADLINE_MS),
        tracing=_tracing(top),
        checkpointing=_checkpointing(top),
    )
    drafts: dict[str, Draft] = {}
    doubles = []
    for section in top.sections("agents", AGENT_FIELDS, limits.AGENTS_MAX_COUNT):
        agent = _agent(section, allowed)
        if agent and agent.id in drafts:
            section.error("id", f"the agent {agent.id!r} stands here twice.")
            doubles.append(Draft(agent, section))
        elif agent:
            drafts[agent.id] = Draft(agent, section)
    return Definition(
        top,
        fields,
        top.name("input_schema", names.SCHEMA_NAME),
        _ordered(drafts),
        _doubled(doubles, drafts),
        suppressions.read(top, drafts),
    )


def _tracing(top: Section) -> Tracing | None:
    section = top.section("tracing", TRACING_FIELDS)
    if section is None:
        return None
    given = _given(
        enabled=section.boolean("enabled"),
        provider=section.choice("provider", names.TRACING_PROVIDERS),
        log_inputs=section.boolean("log_inputs"),
        log_outputs=section.boolean("log_outputs"),
        sample_rate=section.number("sample_rate", limits.SAMPLE_SHARE),
    )
    return Tracing(**given)


def _checkpointing(top: Section) -> Checkpointing | None:
    section = top.section("checkpointing", CHECKPOINTING_FIELDS)
    if section is None:
        return None
    if section.boolean("enabled") is False:
        message = "checkpointing cannot be switched off: without checkpoints no run could be resumed."
        section.error("enabled", message, "no-resume")
    given = _given(
        store=section.choice("store", names.CHECKPOINT_STORES),
        ttl_minutes=section.integer("ttl_minutes", limits.TTL_MINUTES),
    )
    return Checkpointing(**given)


def _agent(section: Section, allowed: Allowed) -> Agent | None:
    section.require("id")
    agent_id = section.name("id", names.AGENT_ID)
    if agent_id in names.RESERVED_IDS:
        section.error("id", f"the id {agent_id!r} is reserved.")
        agent_id = None
    depends_on, declared = dependencies.read(section)
    fields = _given(
        depends_on=depends_on,
        declared=declared,
        timeout_ms=section.integer("timeout_ms", limits.TIMEOUT_MS),
        retry_policy=_retry_policy(section),
        failure_mode=_failure_mode(section),
        output_schema=section.name("output_schema", names.SCHEMA_NAME),
        state_input=section.name("state_input", names.SCHEMA_NAME),
        gate=_gate(section),
        on_refused=_on_refused(section),
        **_approval(section),
        idempotent=section.boolean("idempotent"),
        **_key(section),
        key_inputs=_key_inputs(section),
        max_tokens=section.integer("max_tokens", limits.OUTPUT_TOKENS),
        effort=section.choice("effort", names.EFFORTS),
        **_worker(section, agent_id or "", allowed),
    )
    return Agent(id=agent_id, **fields) if agent_id else None


def _worker(section: Section, agent_id: str, allowed: Allowed) -> dict[str, str | None]:
    """The fields `model`, `handler` and `queue`."""
    model = section.text("model", 100)
    handler = section.name("handler", names.HANDLER)
    queue = section.name("queue", names.QUEUE_NAME)
    if "model" in section:
        if "handler" in section:
            section.error("handler", "an agent has a model or a handler, not both.")
        if "output_schema" not in section:
            section.error("model", "an agent with a model needs an output_schema, which shapes its answer.")
        if model is not None:
            _check_model(section, model, allowed.aliases)
        return {"model": model or "", "handler": None, "queue": queue or Queue.AGENTS}
    for key in ("max_tokens", "effort"):
        if key in section:
            section.error(key, f"{key} belongs to an agent with a model.")
    if handler is not None:
        _check_module(section, handler, allowed.handler_modules)
    return {
        "model": None,
        "handler": handler or f"{names.HANDLERS_MODULE}:{agent_id}",
        "queue": queue or Queue.HANDLERS,
    }


def _check_model(section: Section, model: str, aliases: Mapping[str, str]) -> None:
    if model in aliases:
        if aliases[model] != model:
            section.warn("model", f"{model} is retired; its alias {aliases[model]} runs in its place.", "retired-model")
    elif model not in names.MODELS:
        section.error(
            "model",
            f"{model!r} is no known model.{nearest(model, [*names.MODELS, *aliases])}"
            " STEPFAST_MODEL_ALIASES admits others, as old=new.",
        )


def _check_module(section: Section, handler: str, modules: Collection[str]) -> None:
    module = handler.partition(":")[0]
    if module == names.HANDLERS_MODULE:
        return
    if not any(module == known or module.startswith(f"{known}.") for known in modules):
        hint = nearest(module, [*modules, names.HANDLERS_MODULE])
        section.error("handler", f"the module {module!r} is not among STEPFAST_HANDLER_MODULES.{hint}")


def _retry_policy(agent: Section) -> RetryPolicy | None:
    section = agent.section("retry_policy", RETRY_FIELDS)
    if section is None:
        return None
    backoff = section.choice("backoff", tuple(Backoff))
    given = _given(
        max_attempts=section.integer("max_attempts", limits.ATTEMPTS_COUNT),
        backoff=Backoff(backoff) if backoff else None,
        initial_ms=section.integer("initial_ms", limits.RETRY_DELAY_MS),
        max_ms=section.integer("max_ms", limits.RETRY_DELAY_MS),
        jitter=section.number("jitter", limits.JITTER_SHARE),
        max_worker_losses=section.integer("max_worker_losses", limits.WORKER_LOSSES_COUNT),
    )
    policy = RetryPolicy(**given)
    if policy.initial_ms > policy.max_ms:
        section.error("initial_ms", f"initial_ms is {policy.initial_ms}, above max_ms, which is {policy.max_ms}.")
    return policy


def _failure_mode(section: Section) -> FailureMode | None:
    mode = section.choice("failure_mode", tuple(FailureMode))
    return FailureMode(mode) if mode else None


def _approval(section: Section) -> dict[str, int | None]:
    """The fields `requires_human_approval` and `approval_timeout_ms`."""
    required = section.boolean("requires_human_approval")
    timeout_ms = section.integer("approval_timeout_ms", limits.APPROVAL_TIMEOUT_MS)
    if timeout_ms is not None and not required:
        section.error("approval_timeout_ms", "approval_timeout_ms needs requires_human_approval: true.")
    return {"requires_human_approval": required, "approval_timeout_ms": timeout_ms}


def _gate(section: Section) -> str | None:
    text = section.text("gate", limits.GATE_MAX_CHARS)
    if text is None:
        return None
    try:
        gate = expressions.parse(text)
    except templates.BadText as error:
        section.error_at(section.place_in("gate", error.offset), f"gate: {error}")
        return None
    if not gate.references:
        section.error("gate", "the gate reads nothing: it needs a reference such as {{agent.field}}.")
    return text


def _on_refused(agent: Section) -> OnRefused | None:
    section = agent.section("on_refused", ON_REFUSED_FIELDS)
    if section is None:
        return None
    section.require("rerun")
    if "gate" not in agent:
        agent.error("on_refused", "on_refused needs a gate that may refuse.")
    rerun = section.name("rerun", names.AGENT_ID)
    given = _given(max_rounds=section.integer("max_rounds", limits.ROUNDS_COUNT))
    return OnRefused(rerun, **given) if rerun else None


def _key(section: Section) -> dict[str, Any]:
    """The fields `idempotency_key` and `key_parts`."""
    given = section.text("idempotency_key", limits.KEY_MAX_CHARS)
    text = DEFAULT_KEY if given is None else given
    parts = _parts(section, "idempotency_key", text)
    if parts is None:
        return {}
    if not templates.paths(parts):
        same = "the key is the same for every run: a second run takes the first one's output."
        section.warn("idempotency_key", same, "key-without-run")
    return {"idempotency_key": text, "key_parts": parts}


def _concurrency(top: Section) -> dict[str, Any]:
    """The fields `concurrency_key` and `concurrency_parts`."""
    text = top.text("concurrency_key", limits.KEY_MAX_CHARS)
    parts = None if text is None else _parts(top, "concurrency_key", text)
    return {"concurrency_key": text, "concurrency_parts": parts} if parts else {}


def _parts(section: Section, key: str, text: str) -> tuple[Json, ...] | None:
    """The parts of a template; None, with a fault, where it has none."""
    try:
        parts = templates.parse(text)
    except templates.BadText as error:
        section.error_at(section.place_in(key, error.offset), f"{key}: {error}")
        return None
    if not text.strip():
        section.error(key, f"{key} is empty.")
        return None
    return parts


def _key_inputs(section: Section) -> tuple[templates.Path, ...]:
    found = section.names("key_inputs", names.FIELD, limits.KEY_INPUTS_MAX_COUNT) or ()
    return tuple(tuple(item.text.split(".")) for item in found)


def _ordered(drafts: dict[str, Draft]) -> tuple[Draft, ...]:
    """The drafts, dependencies first, with their `inputs`; faults for dependencies that cannot be."""
    for draft in drafts.values():
        _check_dependencies(draft, drafts)
    depends_on = {name: draft.agent.depends_on for name, draft in drafts.items()}
    order, cycles = plan.order(depends_on)
    for cycle in cycles:
        path = " -> ".join([*cycle, cycle[0]])
        drafts[cycle[0]].section.error("depends_on", f"the dependencies form a cycle: {path}.")
    on_cycles = [name for cycle in cycles for name in cycle]
    dependencies.check({name: (draft.agent, draft.section) for name, draft in drafts.items()})
    for draft in drafts.values():
        if draft.agent.on_refused:
            _check_loop(draft, draft.agent.on_refused, drafts, depends_on)
    return tuple(_with_inputs(drafts[name], drafts, depends_on) for name in (*order, *on_cycles))


def _doubled(doubles: Collection[Draft], drafts: Mapping[str, Draft]) -> tuple[Draft, ...]:
    """Agents whose id stood before, with their `inputs`, each as if it stood in the other one's place."""
    found = []
    for draft in doubles:
        _check_dependencies(draft, drafts)
        others = {**drafts, draft.agent.id: draft}
        depends_on = {name: other.agent.depends_on for name, other in others.items()}
        if draft.agent.on_refused:
            _check_loop(draft, draft.agent.on_refused, others, depends_on)
        found.append(_with_inputs(draft, others, depends_on))
    return tuple(found)


def _check_dependencies(draft: Draft, drafts: Collection[str]) -> None:
    seen = set()
    for item, _ in dependencies.entries(draft.section):
        if item.text in seen:
            draft.section.error_at(item.place, f"depends_on names {item.text!r} twice.")
        seen.add(item.text)
        if item.text not in drafts:
            hint = nearest(item.text, drafts)
            draft.section.error_at(item.place, f"depends_on names {item.text!r}, which is no agent.{hint}")


def _with_inputs(draft: Draft, drafts: Mapping[str, Draft], depends_on: plan.Dependencies) -> Draft:
    wanted = draft.agent.state_input
    if wanted is None:
        return replace(draft, agent=replace(draft.agent, inputs=draft.agent.depends_on))
    upstream = plan.ancestors(depends_on, draft.agent.id) - {draft.agent.id}
    schemas = {name: drafts[name].agent.output_schema for name in upstream}
    found = sorted(name for name, schema in schemas.items() if schema == wanted)
    if not found:
        hint = nearest(wanted, {schema for schema in schemas.values() if schema})
        draft.section.error("state_input", f"no agent upstream has the output_schema {wanted!r}.{hint}")
    elif len(found) > 1:
        draft.section.error("state_input", f"{' and '.join(found)} have the output_schema {wanted!r}: one must.")
    elif drafts[found[0]].agent.failure_mode == FailureMode.CONTINUE:
        draft.section.error("state_input", may_be_missing(found[0]))
    return replace(draft, agent=replace(draft.agent, inputs=tuple(found)))


def may_be_missing(agent_id: str) -> str:
    """What is wrong with naming an output of an agent whose failure mode is `continue`."""
    return (
        f"{agent_id} may end without an output, since its failure_mode is continue:"
        " give it skip_dependents, or do not name it here."
    )


def _check_loop(draft: Draft, loop: OnRefused, drafts: Mapping[str, Draft], depends_on: plan.Dependencies) -> None:
    """Reports a review loop that could not begin, would change nothing, or would repeat an effect."""
    gated, section = draft.agent, draft.section.section("on_refused", ON_REFUSED_FIELDS)
    assert section is not None
    upstream = {name: plan.ancestors(depends_on, name) - {name} for name in drafts}
    if loop.rerun not in upstream[gated.id]:
        hint = nearest(loop.rerun, upstream[gated.id])
        section.error("rerun", f"{loop.rerun!r} is not upstream of {gated.id}, so its work cannot be done again.{hint}")
        return
    # All of these are done again. What depends on the gated agent has begun only if that was given up before.
    strong = dependencies.strong_only(other.agent for other in drafts.values())
    again = [name for name in drafts if loop.rerun in (name, *plan.ancestors(strong, name))]
    if gated.id not in again:
        section.error("rerun", f"{gated.id} reads {loop.rerun} as a snapshot, and would not wait for its new output.")
        return
    begun = [name for name in again if gated.id not in (name, *upstream[name])]
    for name in again:
        if name == gated.id or drafts[name].agent.repeatable:
            continue
        if name in begun:
            elsewhere = "" if name in upstream[gated.id] else f", or let it depend on {gated.id}"
            section.error(
                "rerun",
                f"{name} would be done again, and is a handler that may not be: give it idempotent: true{elsewhere}.",
            )
        elif gated.failure_mode == FailureMode.CONTINUE:
            section.warn(
                "rerun",
                f"{name} may have run without {gated.id}, whose failure_mode is continue, and may not be done again: "
                "the loop ends then. Give it idempotent: true.",
            )
    if gated.gate and not {path[0] for path in expressions.parse(gated.gate).references} & set(begun):
        section.error("rerun", f"the gate reads nothing of {' or '.join(begun)}: doing that again changes nothing.")


def _given(**fields: Any) -> dict[str, Any]:  # noqa: ANN401  # fields of several types
    """The fields that the file gives: the defaults of the others stand in the model."""
    return {name: value for name, value in fields.items() if value is not None}
