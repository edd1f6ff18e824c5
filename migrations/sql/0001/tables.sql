-- The whole data model. Columns that a later capability fills are here from the start, because they are costly to add.
-- app/runs/tables.py declares the same columns for queries; a test compares the two. What else holds of a row of runs, steps,
-- attempts and keys stands in guards.sql.

create schema if not exists stepfast;

-- One row. `min_code_version`: code below it must not work on this database. `clock_offset` moves stepfast.now() in tests.
create table stepfast.meta (
    only_row boolean primary key default true check (only_row),
    min_code_version integer not null default 1,
    clock_offset interval not null default '0'
);
insert into stepfast.meta default values;

-- A definition (skill file, prompts and schemas, with every default filled in), immutable by content hash.
create table stepfast.pipelines (
    hash text primary key check (hash ~ '^[0-9a-f]{64}$'),
    name text not null,
    version text not null,
    definition jsonb not null,
    -- What starting a run needs of it, which is thereby neither decompressed nor parsed for each.
    concurrency_parts jsonb generated always as (definition->'concurrency_parts') stored,
    deadline_ms bigint generated always as ((definition->>'deadline_ms')::bigint) stored,
    traced_by text generated always as (  -- the provider, where it is not the logs
        case when definition->'tracing'->'enabled' = 'true' then nullif(definition->'tracing'->>'provider', 'logs') end) stored,
    published_at timestamptz not null,
    unique (name, version)
);

-- Likewise of its agents: what a step of a new run begins with.
create table stepfast.pipeline_agents (
    pipeline_hash text not null references stepfast.pipelines (hash) on delete cascade,
    agent text not null,
    depends_on text[] not null,
    snapshots jsonb not null,
    failure_mode text not null,
    queue text not null,
    max_worker_losses integer not null,
    idempotent boolean not null,
    primary key (pipeline_hash, agent)
);

-- A name points to the definition that new runs take; publishing moves it.
create table stepfast.pipeline_names (
    name text primary key,
    hash text not null references stepfast.pipelines (hash),
    moved_at timestamptz not null
);

create table stepfast.runs (
    id uuid primary key,                -- also the trace id
    tenant text not null,
    pipeline text not null,             -- the pipeline's name
    pipeline_hash text not null references stepfast.pipelines (hash),
    state text not null,                -- pending, running, suspended, completed, failed or cancelled
    partial boolean not null default false,
    input jsonb not null,
    input_hash text not null,
    key text,                           -- starting twice with one key gives one run
    labels jsonb not null default '{}',
    priority smallint not null default 0, -- 0 to 9
    concurrency_key text,
    deadline_at timestamptz,
    parent_run_id uuid,
    forked_from_run_id uuid,
    observes boolean not null default false, -- a handler recorded what it saw of the world: dependents look again
    event_seq bigint not null default 0, -- the last sequence number given in `events`, under this row's lock
    created_at timestamptz not null,
    started_at timestamptz,
    ended_at timestamptz
) with (fillfactor = 70);               -- claim and complete update it in place
create unique index runs_key on stepfast.runs (tenant, pipeline, key) where key is not null;
-- One at a time for a concurrency key: the others wait, in the order of their creation.
create index runs_concurrency on stepfast.runs (tenant, pipeline, concurrency_key, created_at)
    where concurrency_key is not null and state in ('pending', 'running', 'suspended');
create index runs_deadline on stepfast.runs (deadline_at)
    where deadline_at is not null and state in ('pending', 'running', 'suspended');
create index runs_created on stepfast.runs (created_at desc);
create index runs_definition on stepfast.runs (pipeline_hash); -- whether a definition is used
create index runs_ended on stepfast.runs (ended_at, id) where ended_at is not null; -- in the order of pruning
create index runs_unfinished on stepfast.runs (state, created_at)
    where state in ('pending', 'running', 'suspended', 'failed') or partial;

create table stepfast.steps (
    run_id uuid not null references stepfast.runs (id) on delete cascade,
    agent text not null,
    item text not null default '',      -- kept for dynamic fan-out
    state text not null, -- pending, available, executing, retryable, suspended, completed, skipped, discarded or cancelled
    generation integer not null default 1,
    depends_on text[] not null,
    snapshots jsonb not null default '{}', -- of depends_on: {agent: {"max_staleness_ms", "on_stale"}}
    failure_mode text not null,         -- halt_pipeline, skip_dependents or continue
    queue text not null,
    max_worker_losses integer not null,
    priority smallint not null,         -- its run's; with the run's created_at the order in which steps are sent
    created_at timestamptz not null,    -- its run's
    attempt_id uuid,                    -- the attempt that holds the claim, or whose output counts
    attempts integer not null default 0,       -- ever begun: numbers them
    failures integer not null default 0,       -- of the agent, in this generation, since the last resume
    worker_losses integer not null default 0,  -- workers that died under it, likewise
    waits integer not null default 0,          -- 429s, reserved keys, missing handlers: count against nothing
    rounds integer not null default 0,         -- how often its refused gate had an earlier agent run again
    stale_reruns integer not null default 0,   -- how often a dependent had it done again, since the last resume
    feedback jsonb,                            -- what such a gate read, for the agent that runs again
    repeats boolean not null default false,    -- done again on purpose: opens a new generation of its key
    scheduled_at timestamptz,
    sent_at timestamptz,                -- when its message was last sent; null while available: nobody has sent it
    sends integer not null default 0,
    ended_at timestamptz,
    primary key (run_id, agent, item)
-- What waits is looked for at the beginning of an index, behind the entries of all that waited since the last vacuum: some 600 of
-- them are a page that each claim passes. So it is vacuumed by what changed, and not by what stands in it: at 20 % of 4,000,000
-- steps a claim would pass 450 pages. And with its indexes, which vacuum spares where less than 2 % of the pages changed.
) with (fillfactor = 70, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_scale_factor = 0.005, vacuum_index_cleanup = on);
create index steps_due on stepfast.steps (scheduled_at) where state = 'retryable';
create index steps_unsent on stepfast.steps (queue, priority desc, created_at, run_id, agent) where state = 'available' and sent_at is null;
create index steps_sent on stepfast.steps (queue, sent_at) where state = 'available' and sent_at is not null;

create table stepfast.attempts (
    run_id uuid not null references stepfast.runs (id) on delete cascade,
    id uuid not null,                   -- random: the fencing token
    agent text not null,
    item text not null default '',
    generation integer not null,
    number integer not null,
    state text not null,                -- executing, completed, failed, lost or suspended
    worker_id bigint,                   -- null where a person did it (an override)
    decided_by text,
    repeatable boolean not null,        -- dying under it is harmless
    code_hash text,                     -- of the handler's module
    key text,
    inputs_hash text not null,
    reads jsonb not null,               -- {agent: {"attempt": id, "hash": of its output}}: what it was given
    stale_reads jsonb,                  -- what of that was superseded or too old: {agent: {"attempt", "age_ms", …}}
    started_at timestamptz not null,
    deadline_at timestamptz not null,
    overstayed_at timestamptz,          -- when it was first seen past its deadline
    ended_at timestamptz,
    output jsonb,
    output_hash text,
    observed jsonb,                     -- [{"name", "value", "probe"}]: what it saw of the world when it made the output
    reused_from uuid,                   -- the attempt whose output a completed key gave
    model text,
    request_id text,
    usage jsonb,
    cost_usd numeric,
    error jsonb,                        -- {"code", "who", "message", "next_step", "details"}
    error_fingerprint text,
    primary key (run_id, id)
-- A row doubles when it gets its output, and a full page has no room for that: new rows would go into the gaps of all old pages,
-- and dirty one each. So a page is left once it is so full that a new row does not fit again.
-- Vacuumed as the steps are: sweeps look for what executes, likewise.
) with (fillfactor = 80, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_scale_factor = 0.005, vacuum_index_cleanup = on);
create index attempts_executing on stepfast.attempts (worker_id) where state = 'executing';
-- What began in a while, for reports; like events_at.
create index attempts_started on stepfast.attempts using brin (started_at) with (autosummarize = on);
create index attempts_deadline on stepfast.attempts (deadline_at) where state = 'executing';

-- An attempt that is `suspended` found that a person must approve first; the approved step is claimed by another attempt.

-- Idempotency: reserved by a claim; freed by a failure; completed with the attempt's output; or unknown, for a person. The
-- newest generation of a key counts, whichever run it is of; the next one begins after it was completed, and on purpose.
create table stepfast.keys (
    tenant text not null,
    pipeline text not null,
    agent text not null,
    key text not null,
    generation integer not null,
    state text not null,                -- reserved, completed or unknown
    inputs_hash text not null,
    run_id uuid not null,
    attempt_id uuid not null,
    reserved_at timestamptz not null,
    ended_at timestamptz,
    output jsonb,                       -- the attempt's, once its run was pruned; likewise its hash, and what it observed
    output_hash text,
    observed jsonb,
    -- The key before the agent: those of one run begin with its id, and stand on one page of the index, not on one an agent.
    primary key (tenant, pipeline, key, agent, generation)
) with (fillfactor = 70);

-- What handlers did by ctx.once: begun before the effect, happened after it. Begun and never ended: look outside first.
create table stepfast.effects (
    run_id uuid not null references stepfast.runs (id) on delete cascade,
    agent text not null,
    item text not null default '',
    generation integer not null,        -- of what is only begun: the newest, which must look for it
    key text not null,
    state text not null check (state in ('begun', 'happened')),
    attempt_id uuid not null,
    output jsonb,
    begun_at timestamptz not null,
    ended_at timestamptz,
    primary key (run_id, agent, item, generation, key),
    check ((state = 'happened') = (ended_at is not null)),
    check ((state = 'happened') = (output is not null))
);

create table stepfast.approvals (
    id uuid primary key,
    run_id uuid not null references stepfast.runs (id) on delete cascade,
    agent text not null,
    item text not null default '',
    generation integer not null,
    subject text not null check (subject in ('step', 'tool_call')),
    digest text not null,               -- of the inputs, arguments and definition that are approved
    attempt_id uuid not null,           -- the attempt that asked
    shown jsonb not null,               -- what was about to be done, redacted: what the person is shown
    state text not null check (state in ('requested', 'approved', 'rejected', 'expired', 'void')),
    requested_at timestamptz not null,
    expires_at timestamptz,
    decided_at timestamptz,
    decided_by text,
    reason text,                        -- of whoever decided
    void_reason text,                   -- why the request, or what was decided, holds no more
    check ((state = 'requested') = (decided_at is null)),
    check ((state = 'void') = (void_reason is not null))
);
create unique index approvals_open on stepfast.approvals (run_id, agent, item) where state in ('requested', 'approved');
create index approvals_run on stepfast.approvals (run_id);
create index approvals_expiring on stepfast.approvals (expires_at) where state = 'requested' and expires_at is not null;

create table stepfast.dead_letters (
    id uuid primary key,
    run_id uuid not null references stepfast.runs (id) on delete cascade,
    agent text not null,
    item text not null default '',
    generation integer not null,
    attempt_id uuid,
    code text not null,
    error_fingerprint text not null,
    payload jsonb not null,             -- the message of the dead-letter queue, versioned
    created_at timestamptz not null,
    published_at timestamptz,
    resolved_at timestamptz,
    resolution text check (resolution in ('resumed', 'overridden', 'discarded', 'settled')),
    resolved_by text,
    check ((resolved_at is null) = (resolution is null))
);
create unique index dead_letters_open on stepfast.dead_letters (run_id, agent, item) where resolved_at is null;
create index dead_letters_run on stepfast.dead_letters (run_id);
create index dead_letters_unpublished on stepfast.dead_letters (created_at) where published_at is null;
create index dead_letters_created on stepfast.dead_letters (created_at desc);

create table stepfast.events (
    run_id uuid not null references stepfast.runs (id) on delete cascade,
    seq bigint not null,
    name text not null,
    at timestamptz not null,
    agent text,
    item text,
    generation integer,
    attempt_id uuid,
    data jsonb not null default '{}',
    primary key (run_id, seq)
)
-- Vacuum tells of the room that is left on pages, where small events then go. Done often it is room on new pages, and events_at
-- finds what is new there; without dead rows it reads no index.
with (autovacuum_vacuum_insert_threshold = 50000, autovacuum_vacuum_insert_scale_factor = 0.01);

-- One row a run that a provider shows (`tracing` in its file): the outbox of its spans of runs, steps and attempts, which are
-- made of what is recorded (app/execution/tracing.py).
create table stepfast.traces (
    run_id uuid primary key references stepfast.runs (id) on delete cascade,
    provider text not null,             -- only workers that reach it take the run
    traceparent text,                   -- of the host's span in which the run was started (W3C), for a link
    due_at timestamptz,                 -- since when something is to be exported; or until when somebody is at it
    sent text[] not null default '{}'   -- ids of the spans that were exported
) with (fillfactor = 70);
create index traces_due on stepfast.traces (provider, due_at) where due_at is not null;

-- What happened in a while is found without reading what happened before. BRIN costs an insert next to nothing.
create index events_at on stepfast.events using brin (at) with (autosummarize = on);

-- Counts of events up to `counted_until`, for metrics: they outlive the runs they were counted of.
create table stepfast.metric_position (
    only_row boolean primary key default true check (only_row),
    counted_until timestamptz not null
);
insert into stepfast.metric_position (counted_until) values (clock_timestamp());
create table stepfast.metric_totals (
    metric text not null,
    pipeline text not null,
    agent text not null,
    label text not null,                -- a state, a code, a model
    total double precision not null,
    primary key (metric, pipeline, agent, label)
);

-- One row a process that executes steps. It holds the advisory lock (7083, id) on a session of its own, so that its death is
-- seen at once; the lease is for what no socket reports. Behind a pooler no session is its own: then the lease alone counts.
create table stepfast.workers (
    id bigint generated always as identity primary key,
    host text not null,
    pid integer not null,
    code_version integer not null,
    started_at timestamptz not null,
    lease_until timestamptz not null,
    parent_id bigint,                   -- the worker that started it, sees its death, and vouches for it while it lives
    has_session boolean not null default true,
    suspect_since timestamptz,          -- its lock was first seen free, or its lease past, then
    ended_at timestamptz
) with (fillfactor = 50);
create index workers_alive on stepfast.workers (id) where ended_at is null;
create index workers_ended on stepfast.workers (ended_at) where ended_at is not null; -- in the order of pruning
create index workers_children on stepfast.workers (parent_id) where ended_at is null and parent_id is not null;

-- Since when this Postgres knows who is alive. Unlogged: a crash empties it, and so does the promotion of a standby, which
-- knows of no lock that workers held on the server before it.
create unlogged table stepfast.awake (
    only_row boolean primary key default true check (only_row),
    since timestamptz not null
);
insert into stepfast.awake (since) values (clock_timestamp());
