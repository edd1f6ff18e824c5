-- How an attempt ends without an output.

-- Ends an attempt that failed. p_action says what becomes of the step:
--   retry    again after p_retry_ms; a failure that does not count (a 429) is a wait
--   discard  given up, with a dead letter
--   rerun    its gate refused, or what p_rerun saw of the world has changed (the code stale_input): p_rerun and everything
--            that depends on it strongly are done again, given p_feedback; given up instead where that would repeat an
--            effect, or was done as often as it may be
-- Returns {"outcome": the step's new state, or "stale", "run_state": …, "ready": […]}.
create function stepfast.fail_v1(
    p_run uuid, p_agent text, p_item text, p_attempt uuid, p_action text, p_error jsonb, p_retry_ms integer,
    p_counts boolean, p_rerun text, p_feedback jsonb,
    p_model text, p_request_id text, p_usage jsonb, p_cost_usd double precision
) returns jsonb language plpgsql volatile as $$
declare
    v_now timestamptz;
    r stepfast.runs;
    s stepfast.steps;
    v_seq bigint;
    v_state text;
    v_after record;
    v_again text[];
    v_done text[];
    v_stale boolean := p_error->>'code' = 'stale_input';
    v_reruns integer;
begin
    select * into r from stepfast.runs where id = p_run for no key update;
    v_now := stepfast.now();
    select * into s from stepfast.steps where run_id = p_run and agent = p_agent and item = p_item;
    if s.state is distinct from 'executing' or s.attempt_id is distinct from p_attempt then
        -- My own lost reply, or the fence: either way the step has been dealt with.
        perform stepfast.note_fenced(r, p_attempt, p_error->>'code', p_model, p_usage, p_cost_usd, v_now);
        return jsonb_build_object('outcome', case when s.attempt_id = p_attempt then s.state else 'stale' end,
                                  'run_state', r.state);
    end if;
    if p_action = 'rerun' then
        v_again := array[p_rerun] || stepfast.strong_descendants(p_run, p_rerun);
        -- A gate is no person: it does not have done again what may have had its effect.
        v_done := stepfast.done_agents(p_run, array_remove(v_again, p_agent));
        if v_done <> '{}' then
            p_action := 'discard';
            p_error := p_error || jsonb_build_object('message', format('%s It was not sent back to %s, because what %s did '
                'may not be repeated.', p_error->>'message', p_rerun, array_to_string(v_done, ', ')));
        end if;
        v_reruns := (select stale_reruns from stepfast.steps where run_id = p_run and agent = p_rerun and item = p_item);
        if v_stale and v_reruns >= stepfast.stale_reruns_max() then
            p_action := 'discard';
            p_error := p_error || jsonb_build_object('message', format('%s %s was done again %s times.', p_error->>'message',
                                                                       p_rerun, v_reruns));
        end if;
    end if;
    perform stepfast.free_key(r, s, p_error->>'code' = 'outcome_unknown', v_now);
    update stepfast.attempts
    set state = 'failed', ended_at = v_now, error = p_error, model = p_model, request_id = p_request_id, usage = p_usage,
        cost_usd = p_cost_usd, error_fingerprint = stepfast.fingerprint(r.pipeline, p_agent, p_error)
    where run_id = p_run and id = p_attempt;
    update stepfast.steps set failures = failures + p_counts::int, waits = waits + (not p_counts)::int
    where run_id = p_run and agent = p_agent and item = p_item returning * into s;

    if p_action = 'discard' then
        v_seq := stepfast.discard_step(r, s, p_error, r.event_seq, v_now);
        v_state := 'discarded';
    else
        -- In a run that was halted meanwhile nothing new starts: the step waits for the resume.
        v_state := case when r.state = 'running' and p_action = 'retry' then 'retryable' else 'pending' end;
        update stepfast.steps
        set state = v_state, sent_at = null, rounds = rounds + (p_action = 'rerun' and not v_stale)::int,
            scheduled_at = case when v_state = 'retryable' then v_now + p_retry_ms * interval '1 ms' end
        where run_id = p_run and agent = p_agent and item = p_item;
        v_seq := r.event_seq + 1;
        insert into stepfast.events (run_id, seq, name, at, agent, item, generation, attempt_id, data)
        values (p_run, v_seq, case when p_action = 'rerun' then 'step.rerun' else 'step.retry_scheduled' end, v_now,
                p_agent, p_item, s.generation, p_attempt,
                jsonb_build_object('code', p_error->>'code', 'message', p_error->>'message', 'retry_ms', p_retry_ms,
                                   'failures', s.failures, 'rerun', p_rerun, 'values', p_error #> '{details,values}'));
        if p_action = 'rerun' then
            v_seq := stepfast.reopen_steps(r, v_again, format(case when v_stale then '%s found it stale' else
                'the gate of %s refused' end, p_agent), v_seq, v_now);
            update stepfast.steps set feedback = p_feedback, stale_reruns = stale_reruns + v_stale::int
            where run_id = p_run and agent = p_rerun;
        end if;
    end if;
    select * into v_after from stepfast.settle_run(r, v_seq, true, v_now);
    return jsonb_build_object('outcome', v_state, 'run_state', v_after.run_state, 'ready', v_after.ready);
end $$;

-- Takes an executing step away from an attempt whose worker is gone. A repeatable one goes on elsewhere at once, up to its
-- limit of worker losses; of any other the outcome is unknown, for a person. Returns why, or null where nothing was done.
-- p_counts: it is a loss, and not a worker's orderly end. Whoever holds the run's lock is changing the run: then this leaves
-- it to the next sweep.
create function stepfast.rescue_step(p_run uuid, p_attempt uuid, p_reason text, p_counts boolean) returns text
language plpgsql volatile as $$
declare
    v_now timestamptz;
    r stepfast.runs;
    s stepfast.steps;
    a stepfast.attempts;
    v_error jsonb;
    v_seq bigint;
begin
    select * into r from stepfast.try_run(p_run);
    v_now := stepfast.now();
    if r.id is null then
        return null;
    end if;
    select * into a from stepfast.attempts where run_id = p_run and id = p_attempt;
    select * into s from stepfast.steps
    where run_id = p_run and agent = a.agent and item = a.item and attempt_id = p_attempt and state = 'executing';
    if s.run_id is null then
        return null;
    end if;
    v_error := stepfast.take_back(r, s, jsonb_build_object('code', case when p_counts then 'worker_lost' else 'handed_over' end, 'who', 'retry', 'next_step', '',
        'details', jsonb_build_object('worker', a.worker_id),
        'message', format('The worker that executed %s %s.', s.agent, p_reason)), v_now);
    v_seq := r.event_seq + 1;
    insert into stepfast.events (run_id, seq, name, at, agent, item, generation, attempt_id, data)
    values (p_run, v_seq, 'step.rescued', v_now, s.agent, s.item, s.generation, p_attempt,
            jsonb_build_object('worker', a.worker_id, 'reason', p_reason,
                               'worker_losses', s.worker_losses + p_counts::int));
    update stepfast.steps set worker_losses = worker_losses + p_counts::int
    where run_id = p_run and agent = s.agent and item = s.item returning * into s;
    if v_error is null and s.worker_losses > s.max_worker_losses then
        v_error := jsonb_build_object('code', 'worker_lost', 'who', 'operator',
            'details', jsonb_build_object('worker', a.worker_id),
            'message', format('%s workers died under %s.', s.worker_losses, s.agent),
            'next_step', format('Find what kills them (memory?), then: stepfast resume %s', p_run));
    end if;
    if v_error is null then
        update stepfast.steps set state = case when r.state = 'running' then 'available' else 'pending' end, sent_at = null
        where run_id = p_run and agent = s.agent and item = s.item;
    else
        v_seq := stepfast.discard_step(r, s, v_error, v_seq, v_now);
    end if;
    perform stepfast.settle_run(r, v_seq, false, v_now);
    return coalesce(v_error->>'code', 'worker_lost');
end $$;
