"""The names that a skill file may use, beside those that it defines itself."""

import re

# What `{{…}}` may begin with that is no agent; agents cannot take these names.
RUN_NAMES = frozenset({"run_id", "agent", "pipeline"})
RESERVED_IDS = RUN_NAMES | {"task_id", "input"}

AGENT_ID = re.compile(r"[a-z][a-z0-9_]{0,63}")
PIPELINE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
SCHEMA_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")
# A field of the input or of an agent's output, as `key_inputs` names it.
FIELD = re.compile(r"[a-z][a-z0-9_]{0,63}(\.[\w-]{1,64}){1,9}", re.ASCII)
QUEUE_NAME = re.compile(r"[a-z][a-z0-9_.-]{0,63}")
HANDLER = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*){0,9}:[A-Za-z_]\w*", re.ASCII)

# How each is written, for whoever wrote it otherwise.
WRITTEN = {
    AGENT_ID: "lower-case letters, digits and '_', beginning with a letter, at most 64",
    PIPELINE_NAME: "letters, digits, '_', '.' and '-', beginning with a letter or a digit, at most 100",
    VERSION: "letters, digits, '_', '.', '+' and '-', such as 1.0.0, at most 64",
    SCHEMA_NAME: "letters, digits, '_' and '-', at most 64: the file's name in schemas/, without .json",
    FIELD: "agent.field or input.field",
    QUEUE_NAME: "lower-case letters, digits, '_', '.' and '-', beginning with a letter, at most 64",
    HANDLER: "module:function, such as handlers:deploy",
}

# The module that lies beside the skill file.
HANDLERS_MODULE = "handlers"

# The rules of the audit's checklist (audit_rules.py), as a suppression names them.
AUDIT_RULES = (
    "consistency-undeclared",
    "no-failure-boundary",
    "failure-mode-undeclared",
    "join-without-failure-mode",
    "not-idempotent",
    "effect-without-check",
    "key-without-run",
    "key-not-stable",
    "no-trace",
    "no-resume",
    "no-dead-letter",
    "retries-beyond-deadline",
    "approval-without-expiry",
    "schema-lacks-field",
    "unbounded-output",
    "untrusted-output",
    "retired-model",
)

EFFORTS = ("low", "medium", "high", "xhigh", "max")
TRACING_PROVIDERS = ("logs", "langfuse", "langsmith", "otlp")
CHECKPOINT_STORES = ("postgres", "redis")

# The names in the SDK's `anthropic.types.ModelParam` (a test compares them). An alias in the settings admits others.
MODELS = (
    "claude-fable-5",
    "claude-fable-5-1",
    "claude-fable-5-2",
    "claude-haiku-4-5",
    "claude-haiku-4-5-20251001",
    "claude-haiku-5-5",
    "claude-mythos-5",
    "claude-mythos-5-1",
    "claude-mythos-5-2",
    "claude-mythos-preview",
    "claude-opus-4-5",
    "claude-opus-4-5-20251101",
    "claude-opus-4-6",
    "claude-opus-4-7",
    "claude-opus-4-8",
    "claude-opus-5",
    "claude-opus-5-5",
    "claude-sonnet-4-5",
    "claude-sonnet-4-5-20250929",
    "claude-sonnet-4-6",
    "claude-sonnet-5",
    "claude-sonnet-5-5",
)
