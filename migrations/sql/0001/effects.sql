-- The record behind ctx.once: begun before the effect, happened after it. Every write names the attempt that holds the claim.
-- Each returns {"state": "stale"} where the fence refuses the attempt.

-- {"state": "new"} where nobody began it (now it is begun), "happened" with its output, or "unknown": begun and not ended.
create function stepfast.begin_effect_v1(p_run uuid, p_agent text, p_item text, p_attempt uuid, p_key text)
returns jsonb language plpgsql volatile as $$
declare
    s stepfast.steps;
    e stepfast.effects;
begin
    select * into s from stepfast.steps
    where run_id = p_run and agent = p_agent and item = p_item and attempt_id = p_attempt and state = 'executing' for share;
    if not found then
        return '{"state": "stale"}';
    end if;
    insert into stepfast.effects (run_id, agent, item, generation, key, state, attempt_id, begun_at)
    values (p_run, p_agent, p_item, s.generation, p_key, 'begun', p_attempt, stepfast.now()) on conflict do nothing;
    if found then
        return '{"state": "new"}';
    end if;
    select * into e from stepfast.effects
    where run_id = p_run and agent = p_agent and item = p_item and generation = s.generation and key = p_key;
    if e.state = 'happened' then
        return jsonb_build_object('state', 'happened', 'output', e.output);
    end if;
    return '{"state": "unknown"}';
end $$;

-- Records that the effect happened (p_output), or that it did not (null): then the next begin is new.
create function stepfast.end_effect_v1(p_run uuid, p_agent text, p_item text, p_attempt uuid, p_key text, p_output jsonb)
returns jsonb language plpgsql volatile as $$
declare
    s stepfast.steps;
begin
    select * into s from stepfast.steps
    where run_id = p_run and agent = p_agent and item = p_item and attempt_id = p_attempt and state = 'executing' for share;
    if not found then
        return '{"state": "stale"}';
    end if;
    if p_output is null then
        delete from stepfast.effects
        where run_id = p_run and agent = p_agent and item = p_item and generation = s.generation and key = p_key
          and state = 'begun';
    else
        update stepfast.effects set state = 'happened', output = p_output, ended_at = stepfast.now(), attempt_id = p_attempt
        where run_id = p_run and agent = p_agent and item = p_item and generation = s.generation and key = p_key
          and state = 'begun';
    end if;
    return '{"state": "ended"}';
end $$;
