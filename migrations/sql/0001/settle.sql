-- What follows from a change of one step for the rest of its run. Every function here is called with the run's row locked by
-- an earlier statement, so that it sees every sibling's commit.

-- Makes available whatever waits only for what is completed, for what failed under `continue`, or for a newer output than the
-- snapshot that it may read. `p_send`: the caller is about to send the messages of those that are `sent`: all but those that
-- must wait behind what is not sent yet.
create function stepfast.release_steps(p_run uuid, p_send boolean, p_now timestamptz)
returns table (agent text, item text, sent boolean) language plpgsql volatile as $$
#variable_conflict use_column
begin
    return query
    with free as (
        select s.agent, s.item, p_send and not coalesce((
            select u.priority > s.priority or (u.priority = s.priority and u.created_at < s.created_at) from stepfast.steps u
            where u.queue = s.queue and u.state = 'available' and u.sent_at is null
            order by u.priority desc, u.created_at limit 1), false) as sent
        from stepfast.steps s
        where s.run_id = p_run and s.state = 'pending'
          and not exists (select from stepfast.steps u
                          where u.run_id = p_run and u.agent = any (s.depends_on) and u.state <> 'completed'
                            and not (u.failure_mode = 'continue' and u.state in ('discarded', 'cancelled'))
                            and not (s.snapshots ? u.agent and stepfast.snapshot_serves(u, s.snapshots->u.agent, p_now))))
    update stepfast.steps s
    set state = 'available', sent_at = case when f.sent then p_now end, sends = s.sends + f.sent::int
    from free f where s.run_id = p_run and s.agent = f.agent and s.item = f.item
    returning s.agent, s.item, f.sent;
end $$;

-- Agents of a run whose effect may or may not have happened. Only a person has them done again.
create function stepfast.unknown_agents(p_run uuid) returns text[] language sql stable as $$
    select coalesce(array_agg(s.agent order by s.agent), '{}')
    from stepfast.steps s join stepfast.attempts a on a.run_id = s.run_id and a.id = s.attempt_id
    where s.run_id = p_run and s.state = 'discarded' and a.error->>'code' = 'outcome_unknown'
$$;

-- Those of some agents that in their generation had an effect, or may have had one, and may not be repeated. Whoever overrides
-- a step begins a generation, and does nothing again: what was done in the one before it counts on. What stands in ctx.once may
-- be attempted again, and not done again: its record, which makes the difference, is of one generation.
create function stepfast.done_agents(p_run uuid, p_agents text[]) returns text[] language sql stable as $$
    select coalesce(array_agg(distinct s.agent), '{}')
    from stepfast.steps s join stepfast.attempts a on a.run_id = s.run_id and a.agent = s.agent
    where s.run_id = p_run and s.agent = any (p_agents)
      and a.generation >= (select max(g) from generate_series(1, s.generation) g where not exists (
          select from stepfast.attempts o
          where o.run_id = s.run_id and o.agent = s.agent and o.generation = g and o.decided_by is not null))
      and (a.error->>'code' = 'outcome_unknown'
           or (not a.repeatable and a.reused_from is null and a.state in ('executing', 'completed'))
           or (exists (select from stepfast.effects e
                       where e.run_id = s.run_id and e.agent = s.agent and e.item = s.item and e.generation = a.generation)
               and not exists (select from stepfast.runs r join stepfast.pipeline_agents d on d.pipeline_hash = r.pipeline_hash
                               where r.id = p_run and d.agent = s.agent and d.idempotent)))
$$;

-- Those of some agents that are executing, and whose attempt nobody may interrupt: its outcome would be unknown.
create function stepfast.busy_agents(p_run uuid, p_agents text[]) returns text[] language sql stable as $$
    select coalesce(array_agg(s.agent order by s.agent), '{}')
    from stepfast.steps s join stepfast.attempts a on a.run_id = s.run_id and a.id = s.attempt_id
    where s.run_id = p_run and s.agent = any (p_agents) and s.state = 'executing' and not a.repeatable
$$;

-- The lock of a concurrency key. Whoever ends a run that may not have begun takes it before it touches a step: the run before
-- it may be releasing those steps, under this lock.
create function stepfast.lock_concurrency_key(p_tenant text, p_pipeline text, p_key text) returns void
language sql volatile as $$
    select pg_advisory_xact_lock(7084, hashtext(concat_ws('|', p_tenant, p_pipeline, p_key))) where p_key is not null
$$;

-- Locks a run and its concurrency key without waiting; null where somebody else holds one of them. For whoever works through
-- many runs: an application's transaction that enqueues for a key holds it until its own commit, however long that takes, and
-- a run's row is then held by whoever waits for the key.
create function stepfast.try_run(p_run uuid) returns stepfast.runs language plpgsql volatile as $$
declare
    r stepfast.runs;
begin
    select * into r from stepfast.runs where id = p_run for no key update skip locked;
    if r.concurrency_key is not null
       and not pg_try_advisory_xact_lock(7084, hashtext(concat_ws('|', r.tenant, r.pipeline, r.concurrency_key))) then
        return null;
    end if;
    return r;
end $$;

-- The run of a concurrency key that is under way: something of it may be claimed, executes, or waits for a time or a person.
-- One that failed is under way for as long as something of it still executes.
create function stepfast.run_under_way(p_tenant text, p_pipeline text, p_key text) returns uuid language sql stable as $$
    select r.id from stepfast.runs r
    where r.tenant = p_tenant and r.pipeline = p_pipeline and r.concurrency_key = p_key
      and r.state in ('pending', 'running', 'suspended')
      and exists (select from stepfast.steps s
                  where s.run_id = r.id and s.state in ('available', 'executing', 'retryable', 'suspended'))
    union all
    select r.id from stepfast.attempts a join stepfast.runs r on r.id = a.run_id
    where a.state = 'executing' and r.state = 'failed'
      and r.tenant = p_tenant and r.pipeline = p_pipeline and r.concurrency_key = p_key
    limit 1
$$;

-- Lets the next run of a concurrency key begin, once nothing of another one is under way.
create function stepfast.release_next_run(r stepfast.runs, p_now timestamptz) returns void language plpgsql volatile as $$
declare
    v_next uuid;
begin
    if r.concurrency_key is null then
        return;
    end if;
    perform stepfast.lock_concurrency_key(r.tenant, r.pipeline, r.concurrency_key);
    if stepfast.run_under_way(r.tenant, r.pipeline, r.concurrency_key) is null then
        select id into v_next from stepfast.runs
        where tenant = r.tenant and pipeline = r.pipeline and concurrency_key = r.concurrency_key and state = 'pending'
        order by created_at, id limit 1;
        perform stepfast.release_steps(v_next, false, p_now);
    end if;
end $$;

-- Whether something of a run was done without an output that came later: that of an agent that had failed under `continue`.
create function stepfast.has_gap(p_run uuid) returns boolean language plpgsql stable as $$
begin
    return exists (
        select from stepfast.steps u join stepfast.steps s on s.run_id = u.run_id and u.agent = any (s.depends_on)
        join stepfast.attempts a on a.run_id = s.run_id and a.id = s.attempt_id
        where u.run_id = p_run and u.failure_mode = 'continue' and a.started_at < u.ended_at and a.decided_by is null
          and not (s.snapshots ? u.agent and a.reads ? u.agent));
end $$;

-- Decides what a run does after its steps changed: skips what depends on what failed, releases what may start, and gives the
-- run its state. Writes the run's row, with its last sequence number. `ready` are the steps that it made available.
create function stepfast.settle_run(
    r stepfast.runs, p_seq bigint, p_sent boolean, p_now timestamptz, out run_state text, out ready jsonb
) language plpgsql volatile as $$
declare
    v_seq bigint := p_seq;
    v_halts boolean;
    v_skips boolean;
    v_active boolean;
    v_suspended boolean;
    v_partial boolean := r.partial;
begin
    run_state := r.state;
    ready := '[]';
    if r.state in ('pending', 'running', 'suspended') then
        select bool_or(state in ('discarded', 'cancelled') and failure_mode = 'halt_pipeline'),
               bool_or(state = 'skipped' or (state in ('discarded', 'cancelled') and failure_mode = 'skip_dependents'))
        into v_halts, v_skips from stepfast.steps where run_id = r.id;
        if v_halts then
            -- halt_pipeline: nothing new starts; executing steps finish and are recorded; the rest stay pending.
            update stepfast.approvals set state = 'void', decided_at = p_now, void_reason = 'the run failed'
            where run_id = r.id and state = 'requested';
            update stepfast.steps set state = 'pending', scheduled_at = null, sent_at = null
            where run_id = r.id and state in ('available', 'retryable', 'suspended');
            run_state := 'failed';
        else
            while v_skips loop
                update stepfast.steps s set state = 'skipped', ended_at = p_now
                where s.run_id = r.id and s.state = 'pending' and exists (
                    select from stepfast.steps u where u.run_id = r.id and u.agent = any (s.depends_on) and (u.state = 'skipped'
                        or (u.state in ('discarded', 'cancelled') and u.failure_mode = 'skip_dependents')));
                v_skips := found;
            end loop;
            select coalesce(jsonb_agg(jsonb_build_object('agent', agent, 'item', item)) filter (where sent), '[]'), count(*) > 0
            into ready, v_active from stepfast.release_steps(r.id, p_sent, p_now);
            if not v_active then
                select bool_or(state in ('available', 'executing', 'retryable')), bool_or(state = 'suspended'),
                       not bool_and(state = 'completed')
                into v_active, v_suspended, v_partial from stepfast.steps where run_id = r.id;
            end if;
            run_state := case when v_active then case r.state when 'pending' then 'pending' else 'running' end
                              when v_suspended then 'suspended' else 'completed' end;
        end if;
        v_partial := run_state = 'completed' and (v_partial or stepfast.has_gap(r.id));
        if run_state in ('completed', 'failed') or (run_state = 'suspended') <> (r.state = 'suspended') then
            v_seq := v_seq + 1;
            insert into stepfast.events (run_id, seq, name, at, data)
            values (r.id, v_seq, case run_state when 'running' then 'run.continued' else 'run.' || run_state end, p_now,
                    case when run_state = 'completed' then jsonb_build_object('partial', v_partial) else '{}' end);
        end if;
    end if;
    -- A run may end before anything of it was claimed: then it was never running, and goes through it here.
    if r.state = 'pending' and run_state in ('completed', 'suspended') then
        update stepfast.runs set state = 'running', started_at = p_now where id = r.id;
    end if;
    if r.state = 'running' and run_state = 'running' then
        update stepfast.runs set event_seq = v_seq where id = r.id;
    else
        update stepfast.runs
        set event_seq = v_seq, state = run_state, partial = v_partial,
            started_at = case when run_state = 'pending' then started_at else coalesce(started_at, p_now) end,
            ended_at = case when run_state in ('completed', 'failed') then coalesce(ended_at, p_now) else ended_at end
        where id = r.id;
    end if;
    -- Also when the last step ends that still executed after the run had failed.
    if run_state in ('completed', 'failed') then
        perform stepfast.release_next_run(r, p_now);
    end if;
end $$;

-- Frees the key that an attempt reserved, or keeps it for a person where the outcome is unknown.
create function stepfast.free_key(r stepfast.runs, s stepfast.steps, p_unknown boolean, p_now timestamptz)
returns void language plpgsql volatile as $$
declare
    v_key text := (select key from stepfast.attempts where run_id = s.run_id and id = s.attempt_id);
begin
    if p_unknown then
        update stepfast.keys set state = 'unknown', ended_at = p_now
        where tenant = r.tenant and pipeline = r.pipeline and agent = s.agent and key = v_key
          and attempt_id = s.attempt_id and state = 'reserved';
    else
        delete from stepfast.keys
        where tenant = r.tenant and pipeline = r.pipeline and agent = s.agent and key = v_key
          and attempt_id = s.attempt_id and state = 'reserved';
    end if;
end $$;

-- Gives a step up: a dead letter, and an event. Whether the run goes on is for settle_run. Returns the new seq.
create function stepfast.discard_step(r stepfast.runs, s stepfast.steps, p_error jsonb, p_seq bigint, p_now timestamptz)
returns bigint language plpgsql volatile as $$
declare
    v_id uuid := gen_random_uuid();
    v_fingerprint text := stepfast.fingerprint(r.pipeline, s.agent, p_error);
begin
    update stepfast.steps
    set state = 'discarded', ended_at = p_now, scheduled_at = null,
        -- No agent of the run can work with such an input, whatever the failure mode.
        failure_mode = case when p_error->>'code' = 'invalid_input' then 'halt_pipeline' else failure_mode end
    where run_id = s.run_id and agent = s.agent and item = s.item;
    insert into stepfast.dead_letters (id, run_id, agent, item, generation, attempt_id, code, error_fingerprint, payload,
                                       created_at)
    values (v_id, s.run_id, s.agent, s.item, s.generation, s.attempt_id, p_error->>'code', v_fingerprint,
            p_error || jsonb_build_object('version', 1, 'id', v_id, 'tenant', r.tenant, 'run_id', s.run_id,
                'pipeline', r.pipeline, 'pipeline_hash', r.pipeline_hash, 'agent', s.agent, 'item', s.item,
                'generation', s.generation, 'attempt_id', s.attempt_id, 'attempts', s.attempts,
                'worker_losses', s.worker_losses, 'error_fingerprint', v_fingerprint, 'created_at', p_now), p_now);
    insert into stepfast.events (run_id, seq, name, at, agent, item, generation, attempt_id, data)
    values (s.run_id, p_seq + 1, 'step.discarded', p_now, s.agent, s.item, s.generation, s.attempt_id,
            jsonb_build_object('dead_letter', v_id, 'code', p_error->>'code', 'message', p_error->>'message',
                               'values', p_error #> '{details,values}'));
    return p_seq + 1;
end $$;

-- Takes an executing step away from its attempt, which is thereby fenced. `p_error` says why. Where dying under the attempt
-- is not harmless, its effect may have happened: that error is returned instead, for discard_step; else null.
create function stepfast.take_back(r stepfast.runs, s stepfast.steps, p_error jsonb, p_now timestamptz) returns jsonb
language plpgsql volatile as $$
declare
    v_repeatable boolean := (select repeatable from stepfast.attempts where run_id = s.run_id and id = s.attempt_id);
    v_error jsonb := p_error;
begin
    if not v_repeatable then
        v_error := p_error || jsonb_build_object('code', 'outcome_unknown', 'who', 'person',
            'message', rtrim(p_error->>'message', '.') || ', so its effect may or may not have happened.',
            'next_step', format('Look whether it happened. If it did: stepfast override %s %s --output FILE. '
                                'If not: stepfast resume %s --from %s.', s.run_id, s.agent, s.run_id, s.agent));
    end if;
    perform stepfast.free_key(r, s, not v_repeatable, p_now);
    update stepfast.attempts set state = 'lost', ended_at = p_now, error = v_error,
        error_fingerprint = stepfast.fingerprint(r.pipeline, s.agent, v_error)
    where run_id = s.run_id and id = s.attempt_id;
    return case when v_repeatable then null else v_error end;
end $$;

-- Opens a new generation of steps: they are done again, on purpose. What executes is taken back: whoever calls this has left
-- out what would leave an effect unknown. Returns the new seq.
create function stepfast.reopen_steps(r stepfast.runs, p_agents text[], p_reason text, p_seq bigint, p_now timestamptz)
returns bigint language plpgsql volatile as $$
declare
    s stepfast.steps;
    v_seq bigint := p_seq;
    v_unknown text[] := stepfast.unknown_agents(r.id);
begin
    for s in select * from stepfast.steps where run_id = r.id and agent = any (p_agents) order by agent, item loop
        if s.state = 'executing' then
            perform stepfast.take_back(r, s, jsonb_build_object('code', 'superseded', 'who', 'retry', 'next_step', '',
                'details', '{}'::jsonb, 'message', format('%s was started anew because %s.', s.agent, p_reason)), p_now);
        end if;
        -- An effect that was begun, and may have happened, is looked for first in the new generation, too. Where the outcome was
        -- unknown, a person says by this that it did not happen: whoever comes first takes the key, and the others take what
        -- that gives.
        update stepfast.effects set generation = generation + 1
        where run_id = r.id and agent = s.agent and item = s.item and generation = s.generation and state = 'begun'
          and s.agent <> all (v_unknown);
        delete from stepfast.keys k using stepfast.attempts a
        where a.run_id = s.run_id and a.id = s.attempt_id and k.tenant = r.tenant and k.pipeline = r.pipeline
          and k.agent = s.agent and k.key = a.key and k.attempt_id = s.attempt_id and k.state = 'unknown';
        update stepfast.dead_letters set resolved_at = p_now, resolution = 'resumed', resolved_by = p_reason
        where run_id = r.id and agent = s.agent and item = s.item and resolved_at is null;
        update stepfast.approvals set state = 'void', decided_at = coalesce(decided_at, p_now), void_reason = p_reason
        where run_id = r.id and agent = s.agent and item = s.item and state in ('requested', 'approved');
        update stepfast.steps
        set state = 'pending', generation = generation + 1, attempt_id = null, ended_at = null, scheduled_at = null,
            sent_at = null, failures = 0, worker_losses = 0, waits = 0, feedback = null,
            repeats = repeats or s.state = 'completed'
        where run_id = r.id and agent = s.agent and item = s.item;
        v_seq := v_seq + 1;
        insert into stepfast.events (run_id, seq, name, at, agent, item, generation, attempt_id, data)
        values (r.id, v_seq, 'step.reopened', p_now, s.agent, s.item, s.generation + 1,
                case when s.state = 'executing' then s.attempt_id end,
                jsonb_build_object('reason', p_reason, 'was', s.state));
    end loop;
    return v_seq;
end $$;

-- Takes back what executes and may not be repeated: what it reads is no more what stands there, and nobody knows whether it had
-- its effect. Returns the new seq.
create function stepfast.abandon_steps(r stepfast.runs, p_agents text[], p_reason text, p_seq bigint, p_now timestamptz)
returns bigint language plpgsql volatile as $$
declare
    s stepfast.steps;
    v_error jsonb;
    v_seq bigint := p_seq;
begin
    for s in select * from stepfast.steps where run_id = r.id and agent = any (p_agents) order by agent, item loop
        v_error := stepfast.take_back(r, s, jsonb_build_object('code', 'superseded', 'who', 'person', 'next_step', '',
            'details', '{}'::jsonb, 'message', format('%s was executing on an old input when %s.', s.agent, p_reason)), p_now);
        v_seq := stepfast.discard_step(r, s, v_error, v_seq, p_now);
    end loop;
    return v_seq;
end $$;

-- Notes that the fence refused what an attempt came with, which may have been paid for: once an attempt. Whoever calls this
-- holds the run's lock, and changes nothing else.
create function stepfast.note_fenced(
    r stepfast.runs, p_attempt uuid, p_code text, p_model text, p_usage jsonb, p_cost_usd double precision, p_now timestamptz
) returns void language plpgsql volatile as $$
begin
    insert into stepfast.events (run_id, seq, name, at, agent, item, generation, attempt_id, data)
    select a.run_id, r.event_seq + 1, 'step.fenced', p_now, a.agent, a.item, a.generation, a.id, jsonb_build_object(
        'code', p_code, 'model', p_model, 'usage', p_usage, 'cost_usd', p_cost_usd)
    from stepfast.attempts a
    where a.run_id = r.id and a.id = p_attempt and a.state = 'lost'
      and not exists (select from stepfast.events e
                      where e.run_id = r.id and e.attempt_id = a.id and e.name = 'step.fenced');
    if found then
        update stepfast.runs set event_seq = event_seq + 1 where id = r.id;
    end if;
end $$;
