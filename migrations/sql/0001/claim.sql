-- Takes a step for one attempt, and hands over everything that it needs: one round trip.
-- Returns {"outcome": …} and
--   claimed       input, outputs (of p_reads; where p_lean none, but reads: their attempts and hashes), stale (of these, what was
--                 superseded or is too old), observed (what its strong ancestors saw of the world), generation, number, failures,
--                 waits, rounds, feedback, approved (the digest)
--   reuse         likewise, with output and reused_from: the key was completed by another run; complete with that
--   bad_key       likewise, with problem: the key cannot be rendered, or belongs to other inputs; fail the attempt
--   too_old       likewise, with problem and stale: a snapshot is older than it may be (refresh_snapshots); fail the attempt
--   deferred      nothing was claimed: another run holds the key, and the step is retried later; or (stale_input) what it reads is
--                 done again first
--   alone         nothing was claimed: workers died under it, so it may run only where it has no neighbours (p_alone)
--   stale         nothing was claimed: state and run_state say why
-- and, where steps of the queue wait to be sent, next: those that take this one's place, for the caller to send (send_next).
-- Called again by the same attempt (its reply was lost), it answers the same.
create function stepfast.claim_v1(
    p_run uuid, p_agent text, p_item text, p_pipeline_hash text, p_attempt uuid, p_worker bigint,
    p_timeout_ms integer, p_repeatable boolean, p_code_hash text, p_reads text[], p_key_parts jsonb, p_key_inputs jsonb, p_wait_ms integer,
    p_alone boolean, p_lean boolean
) returns jsonb language plpgsql volatile set plan_cache_mode = force_generic_plan as $$
declare
    v_now timestamptz;
    r stepfast.runs;
    s stepfast.steps;
    k stepfast.keys;
    v_mine text;  -- the key that this attempt recorded at its first claim
    v_outputs jsonb;
    v_reads jsonb;
    v_snapshots boolean;
    v_stale jsonb;  -- of what it reads, what was superseded or is too old
    v_refresh jsonb;
    v_context jsonb;
    v_ended boolean;
    v_approved text;
    v_next boolean;
    v_key text;
    v_absent text;  -- what the key names, and has no value
    v_generation integer;  -- of the key
    v_hash text;
    v_answer jsonb;
begin
    -- The run's lock first, in a statement of its own: every later statement then sees what others committed.
    select * into r from stepfast.runs where id = p_run for no key update;
    select * into s from stepfast.steps where run_id = p_run and agent = p_agent and item = p_item;
    -- In one statement, because each costs more than what it looks up. v_next: whether, once this step is claimed, the queue has
    -- a place at the broker and a step for it.
    select clock_timestamp() + m.clock_offset,
           exists (select from stepfast.workers where id = p_worker and ended_at is not null),
           (select digest from stepfast.approvals
            where run_id = p_run and agent = p_agent and item = p_item and state = 'approved'),
           exists (select from stepfast.steps where queue = s.queue and state = 'available' and sent_at is null)
           and stepfast.dispatched_max() >= (select count(*) from (
               select from stepfast.steps where queue = s.queue and state = 'available' and sent_at is not null
               limit stepfast.dispatched_max() + 1) w)
    into v_now, v_ended, v_approved, v_next from stepfast.meta m;
    if s.run_id is null or r.pipeline_hash <> p_pipeline_hash or r.state not in ('pending', 'running')
       or not (s.state = 'available' or (s.state = 'executing' and s.attempt_id = p_attempt)) then
        return jsonb_build_object('outcome', 'stale', 'state', s.state, 'run_state', r.state);
    end if;
    -- A worker that was taken for dead would lose the step again at once: it must register anew first.
    if v_ended then
        return jsonb_build_object('outcome', 'stale', 'state', 'worker_ended', 'run_state', r.state);
    end if;
    -- One loss may be anybody's fault. At the second it is taken for the cause, and must not take its neighbours along.
    if s.worker_losses >= 2 and not p_alone then
        return jsonb_build_object('outcome', 'alone', 'state', s.state, 'run_state', r.state);
    end if;

    if s.state = 'executing' then -- what it pinned: a snapshot may have been superseded since
        select coalesce(jsonb_object_agg(a.agent, a.output), '{}'), coalesce(jsonb_object_agg(pin.key, pin.value), '{}')
        into v_outputs, v_reads
        from stepfast.attempts mine, jsonb_each(mine.reads) pin
            join stepfast.attempts a on a.run_id = p_run and a.id = (pin.value->>'attempt')::uuid
        where mine.run_id = p_run and mine.id = p_attempt;
    else
        select coalesce(jsonb_object_agg(u.agent, a.output), '{}'),
               coalesce(jsonb_object_agg(u.agent, jsonb_build_object('attempt', a.id, 'hash', a.output_hash)), '{}'),
               count(*) < cardinality(p_reads) or s.snapshots <> '{}'
        into v_outputs, v_reads, v_snapshots
        from stepfast.steps u join stepfast.attempts a on a.run_id = u.run_id and a.id = u.attempt_id
        where u.run_id = p_run and u.agent = any (p_reads) and u.state = 'completed';
        if v_snapshots then
            v_refresh := stepfast.await_snapshots(r, s, v_now);
            if v_refresh is not null then
                return v_refresh;
            end if;
            select f.outputs, f.pins, f.stale into v_outputs, v_reads, v_stale
            from stepfast.read_snapshots(s, p_reads, v_now, v_outputs, v_reads) f;
            v_refresh := stepfast.refresh_snapshots(r, s, v_stale, v_now);
            if v_refresh->>'outcome' = 'deferred' then
                return v_refresh;
            end if;
        end if;
    end if;
    v_answer := jsonb_build_object('outcome', 'claimed', 'tenant', r.tenant, 'pipeline', r.pipeline, 'input', r.input,
        'outputs', case when p_lean then '{}' else v_outputs end, 'reads', case when p_lean then v_reads else '{}' end,
        'stale', v_stale, 'generation', s.generation, 'number', s.attempts + 1, 'failures', s.failures,
        'waits', s.waits, 'rounds', s.rounds, 'feedback', s.feedback,
        'approved', v_approved);
    if r.observes then
        v_answer := v_answer || jsonb_build_object('observed', (
            select coalesce(jsonb_agg(o || jsonb_build_object('agent', u.agent) order by u.agent, o->>'name'), '[]')
            from stepfast.steps u join stepfast.attempts a on a.run_id = u.run_id and a.id = u.attempt_id,
                 jsonb_array_elements(a.observed) o
            where u.run_id = p_run and u.agent = any (stepfast.strong_ancestors(p_run, p_agent)) and u.state = 'completed'));
    end if;
    if s.state = 'executing' then
        update stepfast.attempts set deadline_at = v_now + p_timeout_ms * interval '1 ms'
        where run_id = p_run and id = p_attempt returning key, stale_reads into v_mine, v_stale;
        select * into k from stepfast.keys
        where tenant = r.tenant and pipeline = r.pipeline and agent = p_agent and key = v_mine
          and (attempt_id = p_attempt or state = 'completed')
        order by attempt_id = p_attempt desc, generation desc limit 1;
        return v_answer || jsonb_build_object('number', s.attempts, 'stale', v_stale) || case
            when stepfast.refused_reads(v_stale) then jsonb_build_object('outcome', 'too_old', 'problem',
                'what it reads is too old', 'stale', v_stale)
            when v_mine is null then jsonb_build_object('outcome', 'bad_key', 'problem', 'the idempotency key was refused')
            when k.attempt_id <> p_attempt then jsonb_build_object('outcome', 'reuse', 'reused_from', k.attempt_id, 'output', stepfast.key_output(k))
            else '{}' end;
    end if;

    v_context := v_outputs || jsonb_build_object('run_id', p_run, 'agent', p_agent, 'pipeline', r.pipeline,
                                                 'input', r.input);
    -- The same key with other inputs is another question. Inputs are the run's, or the paths that the agent names.
    v_hash := case when jsonb_array_length(p_key_inputs) = 0 then r.input_hash else
        stepfast.hash((select jsonb_agg(v_context #> array(select jsonb_array_elements_text(path)))
                       from jsonb_array_elements(p_key_inputs) path)) end;
    select coalesce(string_agg(p.value, '' order by p.number), ''), min(p.path) filter (where p.value is null) into v_key, v_absent
    from (select number, array_to_string(path, '.') as path, coalesce(part->>'text', v_context #>> path) as value
          from jsonb_array_elements(p_key_parts) with ordinality k (part, number),
               lateral (select array(select jsonb_array_elements_text(part->'path')) as path) l) p;
    if v_absent is not null then
        v_answer := v_answer || jsonb_build_object('outcome', 'bad_key', 'problem',
            format('the idempotency key names %s, which has no value', v_absent));
        v_key := null;
    end if;
    if v_refresh is not null then
        v_answer := v_answer || v_refresh;
        v_key := null;
    end if;
    if octet_length(v_key) > 1000 then -- what fits into an index
        v_answer := v_answer || jsonb_build_object('outcome', 'bad_key', 'problem',
            'the idempotency key is longer than 1,000 bytes');
        v_key := null;
    end if;

    if v_key is not null then
        -- The newest generation of the key counts. What is done again on purpose begins the next, once that is completed.
        select generation + (s.repeats and state = 'completed')::int into v_generation from stepfast.keys
        where tenant = r.tenant and pipeline = r.pipeline and agent = p_agent and key = v_key
        order by generation desc limit 1;
        v_generation := coalesce(v_generation, 1);
        insert into stepfast.keys (tenant, pipeline, agent, key, generation, state, inputs_hash, run_id, attempt_id,
                                   reserved_at)
        values (r.tenant, r.pipeline, p_agent, v_key, v_generation, 'reserved', v_hash, p_run, p_attempt, v_now)
        on conflict (tenant, pipeline, agent, key, generation) do nothing;
        if not found then
            select * into k from stepfast.keys
            where tenant = r.tenant and pipeline = r.pipeline and agent = p_agent and key = v_key
              and generation = v_generation for update;
            -- Freed, or completed, between the statements: the next message finds it so.
            if k.key is null or s.repeats or (k.state <> 'completed' and k.inputs_hash = v_hash) then
                update stepfast.steps
                set state = 'retryable', waits = waits + 1,
                    scheduled_at = v_now + p_wait_ms * power(2, least(waits, 5)) * interval '1 ms'
                where run_id = p_run and agent = p_agent and item = p_item;
                update stepfast.runs set event_seq = event_seq + 1 where id = p_run;
                insert into stepfast.events (run_id, seq, name, at, agent, item, generation, data)
                values (p_run, r.event_seq + 1, 'step.deferred', v_now, p_agent, p_item, s.generation,
                        jsonb_build_object('reason', 'key_' || coalesce(nullif(k.state, 'completed'), 'freed'), 'held_by', k.run_id));
                return jsonb_build_object('outcome', 'deferred', 'reason', 'key_' || coalesce(nullif(k.state, 'completed'), 'freed'),
                                          'held_by', k.run_id);
            elsif k.inputs_hash <> v_hash then
                v_answer := v_answer || jsonb_build_object('outcome', 'bad_key', 'problem',
                    format('the idempotency key belongs to run %s with inputs %s, not %s',
                           k.run_id, k.inputs_hash, v_hash));
                v_key := null;
            else
                v_answer := v_answer || jsonb_build_object('outcome', 'reuse', 'reused_from', k.attempt_id, 'output', stepfast.key_output(k));
            end if;
        end if;
    end if;

    update stepfast.steps set state = 'executing', attempt_id = p_attempt, attempts = attempts + 1
    where run_id = p_run and agent = p_agent and item = p_item;
    insert into stepfast.attempts (run_id, id, agent, item, generation, number, state, worker_id, repeatable, code_hash,
                                   key, inputs_hash, reads, stale_reads, started_at, deadline_at)
    values (p_run, p_attempt, p_agent, p_item, s.generation, s.attempts + 1, 'executing', p_worker, p_repeatable,
            p_code_hash, v_key, v_hash, v_reads, v_stale, v_now, v_now + p_timeout_ms * interval '1 ms');
    if r.state = 'running' then
        update stepfast.runs set event_seq = event_seq + 1 where id = p_run;
    else
        update stepfast.runs
        set event_seq = event_seq + 1, state = 'running', started_at = coalesce(started_at, v_now) where id = p_run;
    end if;
    insert into stepfast.events (run_id, seq, name, at, agent, item, generation, attempt_id, data)
    values (p_run, r.event_seq + 1, 'step.claimed', v_now, p_agent, p_item, s.generation, p_attempt,
            jsonb_build_object('worker', p_worker, 'number', s.attempts + 1, 'reads', v_reads));
    if v_stale is not null then
        update stepfast.runs set event_seq = event_seq + 1 where id = p_run;
        insert into stepfast.events (run_id, seq, name, at, agent, item, generation, attempt_id, data)
        values (p_run, r.event_seq + 2, 'step.stale_read', v_now, p_agent, p_item, s.generation, p_attempt,
                jsonb_build_object('reads', v_stale));
    end if;
    -- Last, because nothing may be waited for after it: these steps are other runs'. Claims at once do not see one another, so
    -- each looks after the place that it leaves.
    if v_next then
        v_answer := v_answer || jsonb_build_object('next', (
            select coalesce(jsonb_agg(to_jsonb(n)), '[]')
            from stepfast.send_next(s.queue, stepfast.dispatched_max() - 1, stepfast.dispatched_max()) n));
    end if;
    return v_answer;
end $$;

-- A worker that lacks a step's handler puts the step off: it never fails it. Returns whether the step was put off.
create function stepfast.defer_v1(p_run uuid, p_agent text, p_item text, p_delay_ms integer, p_reason text)
returns boolean language plpgsql volatile as $$
declare
    v_now timestamptz;
    r stepfast.runs;
    v_generation integer;
begin
    select * into r from stepfast.runs where id = p_run for no key update;
    v_now := stepfast.now();
    if r.id is null or r.state not in ('pending', 'running') then
        return false;
    end if;
    update stepfast.steps set state = 'retryable', scheduled_at = v_now + p_delay_ms * interval '1 ms', waits = waits + 1
    where run_id = p_run and agent = p_agent and item = p_item and state = 'available'
    returning generation into v_generation;
    if not found then
        return false;
    end if;
    update stepfast.runs set event_seq = event_seq + 1 where id = p_run;
    insert into stepfast.events (run_id, seq, name, at, agent, item, generation, data)
    values (p_run, r.event_seq + 1, 'step.deferred', v_now, p_agent, p_item, v_generation,
            jsonb_build_object('reason', p_reason));
    return true;
end $$;
