-- What a person does to a run. Each returns {"outcome": done | refused, …}; `refused` says why in run_state, state, unknown
-- (agents whose outcome a person must settle first) or busy (agents that execute, and may not be interrupted).

-- Continues a failed, cancelled or partial run from its last checkpoint: what is completed stays; what was discarded may be
-- claimed again, with a fresh budget of attempts, within its generation. The rounds of a review loop stay used up: they would
-- have done again what stays. Refuses where an outcome is unknown.
create function stepfast.resume_v1(p_run uuid, p_by text) returns jsonb language plpgsql volatile as $$
declare
    v_now timestamptz;
    r stepfast.runs;
    v_agents jsonb;
begin
    select * into r from stepfast.runs where id = p_run for no key update;
    v_now := stepfast.now();
    if not (r.state in ('failed', 'cancelled') or (r.state = 'completed' and r.partial)) then
        return jsonb_build_object('outcome', 'refused', 'run_state', r.state);
    end if;
    v_agents := to_jsonb(stepfast.unknown_agents(p_run));
    if v_agents <> '[]' then
        return jsonb_build_object('outcome', 'refused', 'run_state', r.state, 'unknown', v_agents);
    end if;

    with resumed as (
        update stepfast.steps
        set state = 'pending', ended_at = null, sent_at = null, failures = 0, worker_losses = 0, waits = 0
        where run_id = p_run and state in ('discarded', 'cancelled', 'skipped') returning agent)
    select coalesce(jsonb_agg(agent order by agent), '[]') into v_agents from resumed;
    update stepfast.dead_letters set resolved_at = v_now, resolution = 'resumed', resolved_by = p_by
    where run_id = p_run and resolved_at is null;
    update stepfast.steps set stale_reruns = 0 where run_id = p_run and stale_reruns > 0;
    perform stepfast.restart_run(r, jsonb_build_object('by', p_by, 'agents', v_agents), r.event_seq, v_now);
    return jsonb_build_object('outcome', 'done', 'agents', v_agents);
end $$;

-- Does an agent, and everything that depends on it strongly, again: a new generation, with new rounds of its review loops. What
-- executes is fenced; where that may not be repeated its outcome is unknown. The agent that is named is left to finish. Of
-- unknown outcomes it settles that of the agent that is named, and no other. In a run that had ended, other discarded steps are resumed
-- with it; in one that goes on, what depends on them under `continue` may have been claimed already.
create function stepfast.resume_from_v1(p_run uuid, p_agent text, p_by text) returns jsonb language plpgsql volatile as $$
declare
    v_now timestamptz;
    r stepfast.runs;
    v_reopened text[] := array[p_agent] || stepfast.strong_descendants(p_run, p_agent);
    v_reason text := p_by || ' resumed from ' || p_agent;
    v_busy text[];
    v_unknown text[];
    v_agents jsonb;
    v_seq bigint;
begin
    select * into r from stepfast.runs where id = p_run for no key update;
    v_now := stepfast.now();
    if r.id is null or r.state = 'pending' then
        return jsonb_build_object('outcome', 'refused', 'run_state', r.state);
    end if;
    v_unknown := stepfast.unknown_agents(p_run);
    if array_remove(v_unknown, p_agent) <> '{}' then
        return jsonb_build_object('outcome', 'refused', 'unknown', to_jsonb(array_remove(v_unknown, p_agent)));
    end if;
    v_busy := stepfast.busy_agents(p_run, v_reopened);
    if p_agent = any (v_busy) then
        return jsonb_build_object('outcome', 'refused', 'busy', jsonb_build_array(p_agent));
    end if;
    v_reopened := array(select a from unnest(v_reopened) a where a <> all (v_busy));
    v_seq := stepfast.reopen_steps(r, v_reopened, v_reason, r.event_seq, v_now);
    -- What a person names is done again, whatever another run has made of its key; but what did not happen is not a repetition.
    update stepfast.steps set rounds = 0, repeats = repeats or (agent = p_agent and v_unknown = '{}')
    where run_id = p_run and agent = any (v_reopened);
    with resumed as (
        update stepfast.steps
        set state = 'pending', ended_at = null, sent_at = null, failures = 0, worker_losses = 0, waits = 0
        where run_id = p_run and state in ('discarded', 'cancelled', 'skipped') and r.ended_at is not null
        returning agent)
    select jsonb_agg(agent order by agent) into v_agents
    from (select agent from resumed union select unnest(v_reopened)) again;
    update stepfast.dead_letters set resolved_at = v_now, resolution = 'resumed', resolved_by = p_by
    where run_id = p_run and resolved_at is null and r.ended_at is not null;
    update stepfast.steps set stale_reruns = 0 where run_id = p_run and stale_reruns > 0;
    v_seq := stepfast.abandon_steps(r, v_busy, v_reason, v_seq, v_now);
    v_seq := stepfast.tell_snapshots(r, v_reopened, v_reason, v_seq, v_now);
    perform stepfast.restart_run(r, jsonb_build_object('by', p_by, 'from', p_agent, 'agents', v_agents), v_seq, v_now);
    return jsonb_build_object('outcome', 'done', 'agents', v_agents);
end $$;

-- A run that had ended goes on; a deadline that has passed no longer binds it. While another run of its concurrency key is
-- under way it waits for its turn, by the time of its creation.
create function stepfast.restart_run(r stepfast.runs, p_data jsonb, p_seq bigint, p_now timestamptz) returns void
language plpgsql volatile as $$
declare
    v_other uuid;
    v_after record;
begin
    if r.concurrency_key is not null and r.ended_at is not null then
        perform stepfast.lock_concurrency_key(r.tenant, r.pipeline, r.concurrency_key);
        v_other := nullif(stepfast.run_under_way(r.tenant, r.pipeline, r.concurrency_key), r.id);
    end if;
    insert into stepfast.events (run_id, seq, name, at, data)
    values (r.id, p_seq + 1, 'run.resumed', p_now,
            p_data || case when v_other is null then '{}' else jsonb_build_object('waits_for', v_other) end);
    update stepfast.runs
    set state = 'running', started_at = coalesce(started_at, p_now), ended_at = null, partial = false,
        deadline_at = case when deadline_at > p_now then deadline_at end
    where id = r.id returning * into r;
    select * into v_after from stepfast.settle_run(r, p_seq + 1, false, p_now);
    if v_other is not null and v_after.run_state = 'running' then
        update stepfast.steps set state = 'pending' where run_id = r.id and state = 'available';
        update stepfast.runs set state = 'pending' where id = r.id;
    end if;
end $$;

-- Gives a step an output by a person's hand: an attempt of its own, in a new generation. What was done on the old output is
-- done again, as in resume_from_v1; what reads a snapshot of it keeps it. A failed or cancelled run stays so, for `resume`.
create function stepfast.override_v1(p_run uuid, p_agent text, p_output jsonb, p_by text, p_reason text) returns jsonb
language plpgsql volatile as $$
declare
    v_now timestamptz;
    v_attempt uuid := gen_random_uuid();
    r stepfast.runs;
    s stepfast.steps;
    v_done text[];
    v_busy text[];
    v_seq bigint;
begin
    select * into r from stepfast.runs where id = p_run for no key update;
    v_now := stepfast.now();
    select * into s from stepfast.steps where run_id = p_run and agent = p_agent and item = '';
    if s.run_id is null or r.state = 'pending'
       or s.state not in ('completed', 'discarded', 'suspended', 'cancelled', 'skipped') then
        return jsonb_build_object('outcome', 'refused', 'run_state', r.state, 'state', s.state);
    end if;
    -- Only what had begun on the old output; what is discarded waits for the resume, with its dead letter.
    select coalesce(array_agg(agent), '{}') into v_done from stepfast.steps
    where run_id = p_run and agent = any (stepfast.strong_descendants(p_run, p_agent))
      and state in ('completed', 'executing', 'available', 'retryable', 'suspended', 'skipped');
    v_busy := stepfast.busy_agents(p_run, v_done);
    v_done := array(select a from unnest(v_done) a where a <> all (v_busy));
    -- What a person found out settles an unknown key too: it happened, and this is what it gave.
    update stepfast.keys k set state = 'completed', attempt_id = v_attempt, ended_at = v_now
    from stepfast.attempts a
    where a.run_id = p_run and a.id = s.attempt_id and k.tenant = r.tenant and k.pipeline = r.pipeline and k.agent = p_agent
      and k.key = a.key and k.attempt_id = s.attempt_id and k.state = 'unknown';
    insert into stepfast.attempts (run_id, id, agent, item, generation, number, state, decided_by, repeatable, inputs_hash,
                                   reads, started_at, deadline_at, ended_at, output, output_hash)
    values (p_run, v_attempt, p_agent, '', s.generation + 1, s.attempts + 1, 'completed', p_by, true, r.input_hash, '{}',
            v_now, v_now, v_now, p_output, stepfast.hash(p_output));
    update stepfast.dead_letters set resolved_at = v_now, resolution = 'overridden', resolved_by = p_by
    where run_id = p_run and agent = p_agent and resolved_at is null;
    update stepfast.approvals set state = 'void', decided_at = coalesce(decided_at, v_now), void_reason = 'overridden'
    where run_id = p_run and agent = p_agent and state in ('requested', 'approved');
    update stepfast.steps
    set state = 'completed', generation = generation + 1, attempts = attempts + 1, attempt_id = v_attempt, ended_at = v_now,
        failures = 0, worker_losses = 0, waits = 0, rounds = 0
    where run_id = p_run and agent = p_agent and item = '';
    insert into stepfast.events (run_id, seq, name, at, agent, item, generation, attempt_id, data)
    values (p_run, r.event_seq + 1, 'step.overridden', v_now, p_agent, '', s.generation + 1, v_attempt,
            jsonb_build_object('by', p_by, 'reason', p_reason, 'was', s.state));
    v_seq := stepfast.reopen_steps(r, v_done, p_agent || ' was overridden', r.event_seq + 1, v_now);
    v_seq := stepfast.abandon_steps(r, v_busy, p_agent || ' was overridden', v_seq, v_now);
    v_seq := stepfast.tell_snapshots(r, array[p_agent] || v_done, p_agent || ' was overridden', v_seq, v_now);
    if r.state = 'completed' then
        perform stepfast.restart_run(r, jsonb_build_object('by', p_by, 'agents', to_jsonb(v_done), 'overridden', p_agent),
                                     v_seq, v_now);
    else
        perform stepfast.settle_run(r, v_seq, false, v_now);
    end if;
    return jsonb_build_object('outcome', 'done', 'agents', to_jsonb(v_done), 'run_state',
                              (select state from stepfast.runs where id = p_run));
end $$;

-- Ends a run that has not ended. What executes is fenced; what may have had its effect is left as an unknown outcome. The next
-- run of its concurrency key does not wait for the fenced processes: whether they are stuck is for whoever cancels to judge.
create function stepfast.cancel_v1(p_run uuid, p_by text, p_reason text) returns jsonb language plpgsql volatile as $$
declare
    v_now timestamptz;
    r stepfast.runs;
    s stepfast.steps;
    v_error jsonb;
    v_seq bigint;
begin
    select * into r from stepfast.runs where id = p_run for no key update;
    v_now := stepfast.now();
    if r.state is null or r.state not in ('pending', 'running', 'suspended') then
        return jsonb_build_object('outcome', 'refused', 'run_state', r.state);
    end if;
    perform stepfast.lock_concurrency_key(r.tenant, r.pipeline, r.concurrency_key);
    v_seq := r.event_seq;
    for s in select * from stepfast.steps where run_id = p_run and state = 'executing' order by agent, item loop
        v_error := stepfast.take_back(r, s, jsonb_build_object('code', 'cancelled', 'who', 'person', 'next_step', '',
            'details', '{}'::jsonb, 'message', format('The run was cancelled while %s was executing.', s.agent)), v_now);
        if v_error is not null then
            v_seq := stepfast.discard_step(r, s, v_error, v_seq, v_now);
        else
            v_seq := v_seq + 1;
            insert into stepfast.events (run_id, seq, name, at, agent, item, generation, attempt_id)
            values (p_run, v_seq, 'step.cancelled', v_now, s.agent, s.item, s.generation, s.attempt_id);
        end if;
    end loop;
    update stepfast.approvals set state = 'void', decided_at = coalesce(decided_at, v_now), void_reason = 'cancelled'
    where run_id = p_run and state in ('requested', 'approved');
    update stepfast.steps set state = 'cancelled', ended_at = v_now, scheduled_at = null
    where run_id = p_run and state in ('pending', 'available', 'executing', 'retryable', 'suspended');
    insert into stepfast.events (run_id, seq, name, at, data)
    values (p_run, v_seq + 1, 'run.cancelled', v_now, jsonb_build_object('by', p_by, 'reason', p_reason));
    update stepfast.runs set state = 'cancelled', ended_at = v_now, event_seq = v_seq + 1 where id = p_run;
    perform stepfast.release_next_run(r, v_now);
    return jsonb_build_object('outcome', 'done');
end $$;

-- Resolves a dead letter without doing the step again. The step stays discarded. Returns whether it was open.
create function stepfast.discard_letter_v1(p_letter uuid, p_by text) returns boolean language plpgsql volatile as $$
declare
    v_now timestamptz;
    r stepfast.runs;
    d stepfast.dead_letters;
begin
    select * into r from stepfast.runs
    where id = (select run_id from stepfast.dead_letters where id = p_letter) for no key update;
    v_now := stepfast.now();
    update stepfast.dead_letters set resolved_at = v_now, resolution = 'discarded', resolved_by = p_by
    where id = p_letter and resolved_at is null returning * into d;
    if d.id is null then
        return false;
    end if;
    insert into stepfast.events (run_id, seq, name, at, agent, item, generation, data)
    values (r.id, r.event_seq + 1, 'step.dismissed', v_now, d.agent, d.item, d.generation,
            jsonb_build_object('dead_letter', d.id, 'by', p_by));
    update stepfast.runs set event_seq = event_seq + 1 where id = r.id;
    return true;
end $$;
