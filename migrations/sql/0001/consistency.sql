-- Which consistency a read has. A strong dependency is read as it stands: whatever changes it has its strong dependents done
-- again. Of a snapshot the last committed output counts, up to an age, also while a newer one is being made.

-- How often a dependent may have an agent done again because it found its output stale, until a person resumes.
create function stepfast.stale_reruns_max() returns integer language sql immutable as 'select 3';

-- Everything that is done again when an agent is: what depends on it, directly or not, and reads no snapshot in between.
create function stepfast.strong_descendants(p_run uuid, p_agent text) returns text[] language sql stable as $$
    with recursive found (agent) as (
        select s.agent from stepfast.steps s
        where s.run_id = p_run and p_agent = any (s.depends_on) and not s.snapshots ? p_agent
        union
        select s.agent from found f join stepfast.steps s
            on s.run_id = p_run and f.agent = any (s.depends_on) and not s.snapshots ? f.agent)
    select coalesce(array_agg(distinct agent), '{}') from found
$$;

-- The other way round.
create function stepfast.strong_ancestors(p_run uuid, p_agent text) returns text[] language sql stable as $$
    with recursive found (agent) as (
        select d from stepfast.steps s, unnest(s.depends_on) d
        where s.run_id = p_run and s.agent = p_agent and not s.snapshots ? d
        union
        select d from found f join stepfast.steps s on s.run_id = p_run and s.agent = f.agent, unnest(s.depends_on) d
        where not s.snapshots ? d)
    select coalesce(array_agg(agent), '{}') from found
$$;

-- The attempt whose output an agent committed last, in whatever generation.
create function stepfast.last_output(p_run uuid, p_agent text) returns stepfast.attempts language sql stable as $$
    select a.* from stepfast.attempts a
    where a.run_id = p_run and a.agent = p_agent and a.state = 'completed' order by a.number desc limit 1
$$;

-- When an output was made: what was taken from another run's key is as old as it is there.
create function stepfast.committed_at(a stepfast.attempts) returns timestamptz language sql stable as $$
    select coalesce((
        select k.ended_at from stepfast.runs r join stepfast.keys k
            on k.tenant = r.tenant and k.pipeline = r.pipeline and k.agent = a.agent and k.key = a.key
        where r.id = a.run_id and k.attempt_id = a.reused_from), a.ended_at)
$$;

-- How old an output is, in ms.
create function stepfast.age_ms(a stepfast.attempts, p_now timestamptz) returns bigint language sql stable as $$
    select floor(extract(epoch from p_now - stepfast.committed_at(a)) * 1000)::bigint
$$;

-- Whether a dependent need not wait for an agent that is being done again: its last output may be read, or refused, as it is.
create function stepfast.snapshot_serves(u stepfast.steps, p_declared jsonb, p_now timestamptz) returns boolean
language plpgsql stable as $$
declare
    a stepfast.attempts;
begin
    if u.state not in ('pending', 'available', 'executing', 'retryable', 'suspended') then
        return false;
    end if;
    a := stepfast.last_output(u.run_id, u.agent);
    return a.id is not null and (p_declared->>'on_stale' <> 'rerun'
                                 or stepfast.age_ms(a, p_now) <= (p_declared->>'max_staleness_ms')::bigint);
end $$;

-- Completes what a claim reads where it may read snapshots: the last outputs of what is being done again. `stale` are the reads
-- that were superseded, or are older than declared; null where there are none.
create function stepfast.read_snapshots(
    s stepfast.steps, p_reads text[], p_now timestamptz, inout outputs jsonb, inout pins jsonb, out stale jsonb
) language plpgsql stable as $$
declare
    u stepfast.steps;
    a stepfast.attempts;
    v_declared jsonb;
    v_age_ms bigint;
begin
    for u in select * from stepfast.steps where run_id = s.run_id and agent = any (p_reads) order by agent loop
        v_declared := s.snapshots->u.agent;
        if u.state in ('pending', 'available', 'executing', 'retryable', 'suspended') then
            a := stepfast.last_output(u.run_id, u.agent);
            continue when a.id is null;
            outputs := outputs || jsonb_build_object(u.agent, a.output);
            pins := pins || jsonb_build_object(u.agent, jsonb_build_object('attempt', a.id, 'hash', a.output_hash));
        elsif u.state = 'completed' and v_declared is not null then
            select * into a from stepfast.attempts where run_id = u.run_id and id = u.attempt_id;
        else
            continue;
        end if;
        v_age_ms := stepfast.age_ms(a, p_now);
        if u.state <> 'completed' or v_age_ms > (v_declared->>'max_staleness_ms')::bigint then
            stale := coalesce(stale, '{}') || jsonb_build_object(u.agent, jsonb_build_object(
                'attempt', a.id, 'age_ms', v_age_ms, 'superseded', u.state <> 'completed',
                'too_old', coalesce(v_age_ms > (v_declared->>'max_staleness_ms')::bigint, false)) || coalesce(v_declared, '{}'));
        end if;
    end loop;
end $$;

-- Whether among stale reads is one that its agent does not accept.
create function stepfast.refused_reads(p_stale jsonb) returns boolean language sql immutable as $$
    select coalesce(jsonb_path_exists(p_stale, '$.* ? (@.too_old == true && @.on_stale != "accept")'), false)
$$;

-- A dependent may begin without an output that is not made any more (`continue`). Where one is made after all (`resume --from`)
-- before the dependent is claimed, and there is no older one to read, it waits for it: returns a deferral with the steps to
-- send; otherwise null.
create function stepfast.await_snapshots(r stepfast.runs, s stepfast.steps, p_now timestamptz) returns jsonb
language plpgsql volatile as $$
declare
    v_absent text[] := (
        select array_agg(u.agent order by u.agent) from stepfast.steps u
        where u.run_id = r.id and s.snapshots ? u.agent
          and u.state in ('pending', 'available', 'executing', 'retryable', 'suspended')
          and (stepfast.last_output(r.id, u.agent)).id is null);
begin
    if v_absent is null then
        return null;
    end if;
    insert into stepfast.events (run_id, seq, name, at, agent, item, generation, data)
    values (r.id, r.event_seq + 1, 'step.stale_input', p_now, s.agent, s.item, s.generation,
            jsonb_build_object('reads', '{}'::jsonb, 'rerun', '[]'::jsonb, 'absent', v_absent));
    update stepfast.steps set state = 'pending', sent_at = null where run_id = r.id and agent = s.agent and item = s.item;
    return stepfast.deferred_as_stale(r, r.event_seq + 1, p_now);
end $$;

-- What a claim returns that put its step back, with the steps that its caller is to send instead.
create function stepfast.deferred_as_stale(r stepfast.runs, p_seq bigint, p_now timestamptz) returns jsonb
language plpgsql volatile as $$
declare
    v_after record;
begin
    select * into v_after from stepfast.settle_run(r, p_seq, true, p_now);
    return jsonb_build_object('outcome', 'deferred', 'reason', 'stale_input', 'next', (
        select coalesce(jsonb_agg(e.value || jsonb_build_object('run_id', r.id, 'pipeline_hash', r.pipeline_hash)), '[]')
        from jsonb_array_elements(v_after.ready) e));
end $$;

-- A claim found snapshots that are too old. Where all may be done again it has them done again, or waits for those that are
-- being done again, and returns a deferral with the steps to send. Where one is refused, or may not be repeated (any more), it
-- returns {"outcome": "too_old", "problem": …} for the attempt to fail with; and null where all are accepted.
create function stepfast.refresh_snapshots(r stepfast.runs, s stepfast.steps, p_stale jsonb, p_now timestamptz)
returns jsonb language plpgsql volatile as $$
declare
    v_reasons text[] := '{}';
    v_rerun text[] := '{}';
    v_again text[];
    v_told text;
    v_seq bigint := r.event_seq + 1;
    u record;
begin
    if not stepfast.refused_reads(p_stale) then
        return null;
    end if;
    for u in
        select e.agent, e.read, t.stale_reruns, a.decided_by
        from jsonb_each(p_stale) e (agent, read) join stepfast.steps t on t.run_id = r.id and t.agent = e.agent
            join stepfast.attempts a on a.run_id = r.id and a.id = (e.read->>'attempt')::uuid
        where (e.read->>'too_old')::boolean and e.read->>'on_stale' <> 'accept' order by e.agent loop
        v_told := format('the output of %s is %s ms old, and %s may not use it after %s ms', u.agent, u.read->>'age_ms', s.agent,
                         u.read->>'max_staleness_ms');
        v_again := array[u.agent] || stepfast.strong_descendants(r.id, u.agent);
        if u.read->>'on_stale' = 'fail' then
            v_reasons := v_reasons || v_told;
        elsif (u.read->>'superseded')::boolean then
            null; -- the next one is being made
        elsif u.decided_by is not null then
            v_reasons := v_reasons || format('%s; it is not done again, because %s gave it by hand', v_told, u.decided_by);
        elsif u.stale_reruns >= stepfast.stale_reruns_max() then
            v_reasons := v_reasons || format('%s; it was done again %s times', v_told, u.stale_reruns);
        elsif stepfast.done_agents(r.id, v_again) <> '{}' then
            v_reasons := v_reasons || format('%s; it is not done again, because what %s did may not be repeated', v_told,
                                             array_to_string(stepfast.done_agents(r.id, v_again), ', '));
        else
            v_rerun := v_rerun || u.agent;
        end if;
    end loop;
    if v_reasons <> '{}' then
        return jsonb_build_object('outcome', 'too_old', 'problem', array_to_string(v_reasons, '; '), 'stale', p_stale);
    end if;

    insert into stepfast.events (run_id, seq, name, at, agent, item, generation, data)
    values (r.id, v_seq, 'step.stale_input', p_now, s.agent, s.item, s.generation,
            jsonb_build_object('reads', p_stale, 'rerun', v_rerun));
    v_again := (select coalesce(array_agg(distinct agent), '{}') from (
        select unnest(array[name] || stepfast.strong_descendants(r.id, name)) as agent from unnest(v_rerun) name) found);
    if s.agent <> all (v_again) then
        update stepfast.steps set state = 'pending', sent_at = null
        where run_id = r.id and agent = s.agent and item = s.item;
    end if;
    v_seq := stepfast.reopen_steps(r, v_again, s.agent || ' found it stale', v_seq, p_now);
    update stepfast.steps set stale_reruns = stale_reruns + 1 where run_id = r.id and agent = any (v_rerun);
    return stepfast.deferred_as_stale(r, v_seq, p_now);
end $$;

-- Tells that those who read a snapshot of these agents keep what they made, or make, of the old outputs. Returns the new seq.
create function stepfast.tell_snapshots(r stepfast.runs, p_agents text[], p_reason text, p_seq bigint, p_now timestamptz)
returns bigint language plpgsql volatile as $$
declare
    v_seq bigint := p_seq;
    s record;
begin
    for s in
        select t.agent, t.item, t.generation, t.attempt_id, (
            select jsonb_object_agg(e.key, e.value || '{"superseded": true}') from jsonb_each(a.reads) e
            where e.key = any (p_agents) and t.snapshots ? e.key) as reads
        from stepfast.steps t join stepfast.attempts a on a.run_id = t.run_id and a.id = t.attempt_id
        where t.run_id = r.id and t.snapshots ?| p_agents and t.agent <> all (p_agents) and t.state in ('completed', 'executing')
        order by t.agent loop
        continue when s.reads is null;
        v_seq := v_seq + 1;
        insert into stepfast.events (run_id, seq, name, at, agent, item, generation, attempt_id, data)
        values (r.id, v_seq, 'step.stale_read', p_now, s.agent, s.item, s.generation, s.attempt_id,
                jsonb_build_object('reads', s.reads, 'reason', p_reason));
    end loop;
    return v_seq;
end $$;
