"""How large a definition may be, in one place. A pair is the smallest and the largest value that a field takes."""

# Files.
FILE_MAX_BYTES = 262_144
PROMPT_MAX_BYTES = 131_072
SCHEMA_MAX_BYTES = 65_536
HANDLERS_MAX_BYTES = 1_048_576
# As Python parses it: how deep, and how much. Whoever reads it looks at each part a few times.
HANDLERS_MAX_LEVELS = 200
HANDLERS_MAX_NODES = 100_000
# A whole definition, prompts and schemas included, as it is stored.
DEFINITION_MAX_BYTES = 2_000_000

# YAML and JSON. Aliases count as often as they are used, so that a small file cannot unfold into a large one.
NESTING_MAX_LEVELS = 24
NODES_MAX_COUNT = 10_000
SCHEMA_VALUES_MAX_COUNT = 5_000
FAULTS_MAX_COUNT = 200

# Fields of a skill file.
AGENTS_MAX_COUNT = 100
DESCRIPTION_MAX_CHARS = 2_000
KEY_MAX_CHARS = 200
SUPPRESSIONS_MAX_COUNT = 100
REASON_MAX_CHARS = 500
KEY_INPUTS_MAX_COUNT = 20
GATE_MAX_CHARS = 500
GATE_MAX_LEVELS = 24
TIMEOUT_MS = (100, 3_600_000)
ATTEMPTS_COUNT = (1, 100)
WORKER_LOSSES_COUNT = (1, 100)
RETRY_DELAY_MS = (1, 3_600_000)
JITTER_SHARE = (0.0, 1.0)
SAMPLE_SHARE = (0.0, 1.0)
OUTPUT_TOKENS = (1, 128_000)
TTL_MINUTES = (1, 525_600)
ROUNDS_COUNT = (1, 10)
# How old a snapshot may be: up to a year.
STALENESS_MS = (1, 31_536_000_000)
# Of a person, and of a whole run: 1 s to 30 days.
APPROVAL_TIMEOUT_MS = (1_000, 2_592_000_000)
DEADLINE_MS = (1_000, 2_592_000_000)
