-- Approvals: asked for by an attempt that stands before its execution, and given by a person for exactly what it was about to
-- do (the digest). Retries with the same digest use the same approval; anything else is asked again.

-- Suspends an executing step until a person decides. An approval of another digest is void. Returns like fail_v1.
create function stepfast.suspend_v1(
    p_run uuid, p_agent text, p_item text, p_attempt uuid, p_digest text, p_shown jsonb, p_expires_ms bigint
) returns jsonb language plpgsql volatile as $$
declare
    v_now timestamptz;
    r stepfast.runs;
    s stepfast.steps;
    v_after record;
begin
    select * into r from stepfast.runs where id = p_run for no key update;
    v_now := stepfast.now();
    select * into s from stepfast.steps where run_id = p_run and agent = p_agent and item = p_item;
    if s.state is distinct from 'executing' or s.attempt_id is distinct from p_attempt then
        return jsonb_build_object('outcome', case when s.attempt_id = p_attempt then s.state else 'stale' end,
                                  'run_state', r.state);
    end if;
    perform stepfast.free_key(r, s, false, v_now);
    update stepfast.attempts set state = 'suspended', ended_at = v_now where run_id = p_run and id = p_attempt;
    update stepfast.approvals
    set state = 'void', decided_at = coalesce(decided_at, v_now), void_reason = 'what was approved changed'
    where run_id = p_run and agent = p_agent and item = p_item and state in ('requested', 'approved');
    -- In a run that was halted meanwhile nobody is asked: after the resume the step asks again.
    insert into stepfast.approvals (id, run_id, agent, item, generation, subject, digest, attempt_id, shown, state,
                                    requested_at, expires_at)
    select gen_random_uuid(), p_run, p_agent, p_item, s.generation, 'step', p_digest, p_attempt, p_shown, 'requested',
           v_now, v_now + p_expires_ms * interval '1 ms' where r.state = 'running';
    update stepfast.steps
    set state = case when r.state = 'running' then 'suspended' else 'pending' end, sent_at = null
    where run_id = p_run and agent = p_agent and item = p_item;
    insert into stepfast.events (run_id, seq, name, at, agent, item, generation, attempt_id, data)
    values (p_run, r.event_seq + 1, 'step.suspended', v_now, p_agent, p_item, s.generation, p_attempt,
            jsonb_build_object('digest', p_digest));
    select * into v_after from stepfast.settle_run(r, r.event_seq + 1, true, v_now);
    return jsonb_build_object('outcome', 'suspended', 'run_state', v_after.run_state, 'ready', v_after.ready);
end $$;

-- Decides on the open request of a step: approved, rejected, or expired. The first decision counts. A rejected step is
-- cancelled, follows its failure mode, and is no dead letter. Returns {"outcome": done}, or refused with state.
create function stepfast.decide_v1(p_run uuid, p_agent text, p_decision text, p_digest text, p_by text, p_reason text)
returns jsonb language plpgsql volatile as $$
declare
    v_now timestamptz;
    r stepfast.runs;
    s stepfast.steps;
    v_approval stepfast.approvals;
begin
    select * into r from stepfast.runs where id = p_run for no key update;
    v_now := stepfast.now();
    select * into s from stepfast.steps where run_id = p_run and agent = p_agent and item = '';
    select * into v_approval from stepfast.approvals where run_id = p_run and agent = p_agent and state = 'requested';
    if v_approval.id is null or s.state <> 'suspended' or (p_decision = 'expired' and v_approval.expires_at > v_now)
       or v_approval.digest is distinct from coalesce(p_digest, v_approval.digest) then
        return jsonb_build_object('outcome', 'refused', 'state', s.state, 'run_state', r.state,
            'decided', (select jsonb_build_object('state', state, 'by', decided_by, 'at', decided_at) from stepfast.approvals
                        where run_id = p_run and agent = p_agent and decided_at is not null order by decided_at desc limit 1));
    end if;
    if p_decision = 'approved' and v_approval.expires_at <= v_now then
        p_decision := 'expired';
    end if;
    update stepfast.approvals set state = p_decision, decided_at = v_now, decided_by = p_by, reason = p_reason
    where id = v_approval.id;
    update stepfast.steps
    set state = case when p_decision = 'approved' then 'available' else 'cancelled' end,
        ended_at = case when p_decision = 'approved' then null else v_now end
    where run_id = p_run and agent = p_agent and item = '';
    insert into stepfast.events (run_id, seq, name, at, agent, item, generation, data)
    values (p_run, r.event_seq + 1, 'step.' || p_decision, v_now, p_agent, '', s.generation,
            jsonb_build_object('by', p_by, 'reason', p_reason, 'digest', v_approval.digest));
    perform stepfast.settle_run(r, r.event_seq + 1, false, v_now);
    return jsonb_build_object('outcome', p_decision);
end $$;
