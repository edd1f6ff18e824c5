"""The checklist: what to ask of a pipeline before it runs, each rule with its severity, its reason and its mending.

The first questions are those that any distributed system is asked: which consistency, which failure boundary, what when
it is done twice, what can be seen, where it goes on, where failures end. The others come from running such pipelines.
A rule without a check is one whose findings the loader reports, since the file cannot run, or would run otherwise.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from app.pipelines import audit_checks
from app.pipelines.audit_checks import Found, Subject
from app.pipelines.names import AUDIT_RULES

Severity = Literal["error", "warning", "note"]

_Check = Callable[[Subject], Iterator[Found]]


@dataclass(frozen=True, slots=True)
class Rule:
    """`why` says what goes wrong in the night; `fix` what to write instead."""

    id: str
    severity: Severity
    title: str
    why: str
    fix: str
    check: _Check | None = None


_RULES = (
    Rule(
        "consistency-undeclared",
        "note",
        "A dependency does not say which consistency it needs.",
        "Whoever changes the agent before does not know what breaks when this one acts on what was true a while ago.",
        "Say it where it stands: `depends_on: [{agent: coder, consistency: strong}]`, or `snapshot` with an age.",
        audit_checks.consistency,
    ),
    Rule(
        "no-failure-boundary",
        "warning",
        "Nothing stands between a failure and the next agent.",
        "What goes on without what it needed, or acts on whatever came, hands a failure on as a result.",
        "Give it a `gate` on recorded outputs, or the agent before another `failure_mode`.",
        audit_checks.failure_boundary,
    ),
    Rule(
        "failure-mode-undeclared",
        "note",
        "An agent does not say what follows when it fails.",
        "The run then halts. That is safe, and nobody can tell whether it was meant.",
        "Write its `failure_mode`: halt_pipeline, skip_dependents or continue.",
        audit_checks.failure_mode_undeclared,
    ),
    Rule(
        "join-without-failure-mode",
        "warning",
        "A join does not say what becomes of it when a branch fails.",
        "One failed branch halts the others, whose work was paid for; perhaps the join was meant to go on.",
        "Write the `failure_mode` of each agent that the join depends on.",
        audit_checks.join,
    ),
    Rule(
        "not-idempotent",
        "warning",
        "A handler does not say that it may be done twice.",
        "A retry repeats its effects, and a worker's death under it leaves an outcome that a person must find out.",
        "Do its effects in `ctx.once(…, check=…)` and decorate it with `@effects_once`; or write `idempotent: true`.",
        audit_checks.not_idempotent,
    ),
    Rule(
        "effect-without-check",
        "warning",
        "An effect cannot be looked for in the outside world.",
        "Where a worker dies between the effect and its record, nobody but a person can say whether it happened.",
        "Give `ctx.once` a `check` that looks: Happened(output), NotHappened() or Unknown().",
        audit_checks.effect_without_check,
    ),
    Rule(
        "key-without-run",
        "warning",
        "An idempotency key does not name its run.",
        "Another run takes this one's output, or is refused, which looks like a run that did nothing.",
        "Begin the key with `{{run_id}}`; where runs shall share a result, name in `key_inputs` what must be equal.",
        audit_checks.key_without_run,
    ),
    Rule(
        "key-not-stable",
        "warning",
        "A key holds a moment or a random number.",
        "A key that never comes twice protects from nothing: the second attempt does the effect again.",
        "Make the key of what the work is about: the run, the order, the ticket.",
        audit_checks.key_not_stable,
    ),
    Rule(
        "no-trace",
        "warning",
        "No trace is kept.",
        "What each agent did, when, and on what, is asked for only when it is too late to switch it on.",
        "Write `tracing: {enabled: true}`, with `log_inputs` and `log_outputs` where the data may be logged.",
        audit_checks.no_trace,
    ),
    Rule(
        "no-resume",
        "error",
        "Checkpoints are switched off.",
        "A crash would begin everything anew, and pay for it again. Such a file is refused.",
        "Remove `checkpointing.enabled: false`.",
    ),
    Rule(
        "no-dead-letter",
        "warning",
        "A failure becomes a dead letter only after more than a day.",
        "Until the last attempt has failed nothing is dead, nobody is told, and the work is as good as dropped.",
        "Lower `max_attempts`, `timeout_ms` or `max_ms`, or give the pipeline a `deadline_ms`.",
        audit_checks.no_dead_letter,
    ),
    Rule(
        "retries-beyond-deadline",
        "warning",
        "Retries go beyond the run's deadline.",
        "Past the deadline nothing starts: the attempts that are left never come, and no dead letter says why.",
        "Raise `deadline_ms`, or lower `max_attempts`, `timeout_ms` and `approval_timeout_ms` along that path.",
        audit_checks.beyond_deadline,
    ),
    Rule(
        "approval-without-expiry",
        "warning",
        "An approval never expires.",
        "A question that nobody answers keeps its run, and every run behind it in its concurrency key, for ever.",
        "Write `approval_timeout_ms`, after which it counts as rejected; or `deadline_ms`.",
        audit_checks.approval,
    ),
    Rule(
        "schema-lacks-field",
        "warning",
        "A field is read that its schema does not promise.",
        "It works until the field is left out; then the agent that reads it fails, and not the one that wrote.",
        "Add the field to the schema's `properties` and `required`, or read it with `.get`.",
        audit_checks.schema_lacks,
    ),
    Rule(
        "unbounded-output",
        "note",
        "An output has no bound of its own.",
        "A model that runs on is paid for to its last token, and what it wrote goes into the next prompt.",
        "Write `max_tokens`, or `maxLength` and `maxItems` in the schema; give a handler an `output_schema`.",
        audit_checks.unbounded_output,
    ),
    Rule(
        "untrusted-output",
        "warning",
        "What a model wrote reaches an effect, and only models were asked.",
        "Whoever can write into what a model reads can have it approve. A gate on a model's word is no boundary.",
        "Write `requires_human_approval: true`, or a gate on what a handler found out, such as a test's result.",
        audit_checks.untrusted,
    ),
    Rule(
        "retired-model",
        "warning",
        "A model is retired, and another one runs in its place.",
        "Prompts, prices and answers were tried on another model than the one that runs.",
        "Write the model that runs, and try the prompts on it.",
    ),
)
CHECKLIST = {rule.id: rule for rule in _RULES}
assert CHECKLIST.keys() == set(AUDIT_RULES)

# What is said besides: neither can be accepted.
SKILL_FILE = Rule(
    "skill-file",
    "error",
    "The file, or what lies beside it, is not as a skill is written.",
    "It cannot be published, or would not do what it says.",
    "The message says what to write; docs/skill-files.md has every field.",
)
UNUSED = Rule(
    "unused-suppression",
    "warning",
    "A suppression accepts nothing.",
    "What it once accepted is gone, and it would silence the next finding of its rule.",
    "Remove it.",
)
RULES = {**CHECKLIST, SKILL_FILE.id: SKILL_FILE, UNUSED.id: UNUSED}
