-- The late confirmation of an attempt that was taken for dead, while its outcome is unknown: the one write that is not
-- guarded by `executing`. It settles the key and the dead letter; the run waits for `resume`. Refused where what it read was
-- changed meanwhile: then what it did is not what the step is to do.
create function stepfast.confirm_late(
    r stepfast.runs, s stepfast.steps, p_output jsonb, p_observed jsonb,
    p_model text, p_request_id text, p_usage jsonb, p_cost_usd double precision, p_now timestamptz
) returns jsonb language plpgsql volatile as $$
begin
    if exists (
        select from stepfast.attempts a, jsonb_each(a.reads) pin join stepfast.steps u on u.run_id = r.id and u.agent = pin.key
        where a.run_id = s.run_id and a.id = s.attempt_id and u.agent = any (stepfast.strong_ancestors(r.id, s.agent))
          and (u.state <> 'completed' or u.attempt_id <> (pin.value->>'attempt')::uuid)) then
        return jsonb_build_object('outcome', 'stale', 'state', s.state, 'run_state', r.state);
    end if;
    update stepfast.keys k set state = 'completed', ended_at = p_now
    from stepfast.attempts a
    where a.run_id = s.run_id and a.id = s.attempt_id and k.tenant = r.tenant and k.pipeline = r.pipeline
      and k.agent = s.agent and k.key = a.key and k.attempt_id = s.attempt_id and k.state = 'unknown' and a.state = 'lost';
    if not found then
        perform stepfast.note_fenced(r, s.attempt_id, null, p_model, p_usage, p_cost_usd, p_now);
        return jsonb_build_object('outcome', 'stale', 'state', s.state, 'run_state', r.state);
    end if;
    update stepfast.attempts
    set state = 'completed', error = null, error_fingerprint = null, ended_at = p_now, output = p_output,
        output_hash = stepfast.hash(p_output), model = p_model, request_id = p_request_id, usage = p_usage,
        cost_usd = p_cost_usd, observed = p_observed
    where run_id = s.run_id and id = s.attempt_id;
    update stepfast.steps set state = 'completed', ended_at = p_now
    where run_id = s.run_id and agent = s.agent and item = s.item;
    update stepfast.dead_letters set resolved_at = p_now, resolution = 'settled', resolved_by = 'late confirmation'
    where run_id = s.run_id and agent = s.agent and item = s.item and resolved_at is null;
    insert into stepfast.events (run_id, seq, name, at, agent, item, generation, attempt_id)
    values (s.run_id, r.event_seq + 1, 'step.settled', p_now, s.agent, s.item, s.generation, s.attempt_id);
    -- A run that ended in part is whole where this was all that it lacked.
    update stepfast.runs
    set event_seq = event_seq + 1, observes = observes or p_observed is not null,
        partial = partial and (stepfast.has_gap(r.id)
                               or exists (select from stepfast.steps where run_id = r.id and state <> 'completed'))
    where id = r.id;
    return jsonb_build_object('outcome', 'completed', 'run_state', r.state, 'ready', '[]'::jsonb);
end $$;

-- Commits an attempt's output, and decides what may start next: one round trip.
-- Returns {"outcome": "completed", "run_state": …, "ready": [{"agent", "item"}]} where ready are the steps that this call made
-- available and that the caller must send; or {"outcome": "stale", "state": …} where the fence refused the attempt.
-- Called again by the same attempt (its reply was lost), it answers completed, with what still waits to be claimed.
create function stepfast.complete_v1(
    p_run uuid, p_agent text, p_item text, p_attempt uuid, p_output jsonb,
    p_model text, p_request_id text, p_usage jsonb, p_cost_usd double precision, p_reused_from uuid,
    p_observed jsonb
) returns jsonb language plpgsql volatile set plan_cache_mode = force_generic_plan as $$
declare
    v_now timestamptz;
    r stepfast.runs;
    s stepfast.steps;
    v_ready jsonb := '[]';
    v_key text;
    v_after record;
begin
    -- Two last branches of a join that commit at once would not see each other without this lock.
    select * into r from stepfast.runs where id = p_run for no key update;
    v_now := stepfast.now();
    update stepfast.steps set state = 'completed', ended_at = v_now
    where run_id = p_run and agent = p_agent and item = p_item and attempt_id = p_attempt and state = 'executing'
    returning * into s;
    if not found then
        select * into s from stepfast.steps where run_id = p_run and agent = p_agent and item = p_item;
        if s.state = 'completed' and s.attempt_id = p_attempt then
            select coalesce(jsonb_agg(jsonb_build_object('agent', agent, 'item', item)), '[]') into v_ready
            from stepfast.steps where run_id = p_run and p_agent = any (depends_on) and state = 'available';
            return jsonb_build_object('outcome', 'completed', 'run_state', r.state, 'ready', v_ready);
        end if;
        if s.state = 'discarded' and s.attempt_id = p_attempt then
            return stepfast.confirm_late(r, s, p_output, p_observed, p_model, p_request_id, p_usage, p_cost_usd, v_now);
        end if;
        perform stepfast.note_fenced(r, p_attempt, null, p_model, p_usage, p_cost_usd, v_now);
        return jsonb_build_object('outcome', 'stale', 'state', s.state, 'run_state', r.state);
    end if;

    update stepfast.attempts a
    set state = 'completed', ended_at = v_now, output = p_output, output_hash = stepfast.hash(p_output), model = p_model,
        request_id = p_request_id, usage = p_usage, cost_usd = p_cost_usd, reused_from = p_reused_from,
        -- What another run's attempt saw counts for whoever takes its output.
        observed = case when p_reused_from is null then p_observed else (
            select coalesce(o.observed, k.observed)
            from stepfast.keys k left join stepfast.attempts o on o.run_id = k.run_id and o.id = k.attempt_id
            where k.tenant = r.tenant and k.pipeline = r.pipeline and k.agent = p_agent and k.key = a.key
              and k.attempt_id = p_reused_from) end
    where run_id = p_run and id = p_attempt returning key, observed into v_key, p_observed;
    if p_observed is not null then
        update stepfast.runs set observes = true where id = p_run;
    end if;
    update stepfast.keys set state = 'completed', ended_at = v_now
    where tenant = r.tenant and pipeline = r.pipeline and agent = p_agent and key = v_key and attempt_id = p_attempt
      and state = 'reserved';

    insert into stepfast.events (run_id, seq, name, at, agent, item, generation, attempt_id, data)
    values (p_run, r.event_seq + 1, case when p_reused_from is null then 'step.completed' else 'step.reused' end, v_now,
            p_agent, p_item, s.generation, p_attempt, case when p_reused_from is null then '{}' else (
                select jsonb_build_object('age_ms', stepfast.age_ms(a, v_now)) from stepfast.attempts a
                where a.run_id = p_run and a.id = p_attempt) end);
    select * into v_after from stepfast.settle_run(r, r.event_seq + 1, true, v_now);
    return jsonb_build_object('outcome', 'completed', 'run_state', v_after.run_state, 'ready', v_after.ready);
end $$;
