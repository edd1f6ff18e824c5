-- The one start path: the command line, the client, Celery's stepfast.start and plain SQL all call it.
-- Errors: SF001 unknown pipeline; SF002 the key was used with another input; SF003 the input is not an object, or a key is
-- empty, too long or has no value. Where p_hash is given and the name means another definition by now, nothing is started, and no row
-- returned: whoever checked the input against that definition checks it anew. p_traceparent: of the host's span (W3C), to which
-- the run's trace is linked. `waits`: the places of its queues at the broker are taken, or it waits for another run: what ends there
-- sends it, so that to tell a worker of it changes nothing.
create function stepfast.enqueue_v1(
    p_pipeline text,
    p_input jsonb,
    p_key text default null,
    p_tenant text default 'default',
    p_labels jsonb default '{}',
    p_priority integer default 0,
    p_run uuid default gen_random_uuid(),
    p_hash text default null,
    p_traceparent text default null
) returns table (run_id uuid, created boolean, waits boolean)
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    v_now timestamptz;
    v_hash text;
    v_concurrency_parts jsonb;
    v_deadline_ms bigint;
    v_traced_by text;
    v_full boolean; -- no queue of its first steps has a place at the broker
    v_input_hash text := encode(sha256(convert_to(p_input::text, 'UTF8')), 'hex');  -- stepfast.hash, without a call
    v_old_id uuid;
    v_old_hash text;
    v_part jsonb;
    v_value text;
    v_concurrency text;
begin
    waits := false;
    if p_input is null or jsonb_typeof(p_input) <> 'object' then
        raise exception 'the input must be a JSON object' using errcode = 'SF003';
    end if;
    if p_key = '' then
        raise exception 'the key is empty' using errcode = 'SF003';
    end if;
    if octet_length(p_key) > 1000 then -- what fits into an index
        raise exception 'the key is longer than 1,000 bytes' using errcode = 'SF003';
    end if;
    select p.hash, p.concurrency_parts, p.deadline_ms, p.traced_by, clock_timestamp() + m.clock_offset, not exists (
        select from stepfast.pipeline_agents a
        where a.pipeline_hash = p.hash and a.depends_on = '{}' and stepfast.dispatched_max() > (select count(*) from (
            select from stepfast.steps s where s.queue = a.queue and s.state = 'available' and s.sent_at is not null
            limit stepfast.dispatched_max()) w))
    into v_hash, v_concurrency_parts, v_deadline_ms, v_traced_by, v_now, v_full
    from stepfast.pipeline_names n join stepfast.pipelines p on p.hash = n.hash, stepfast.meta m
    where n.name = p_pipeline;
    if not found then
        raise exception 'no pipeline is published as %', p_pipeline using errcode = 'SF001';
    end if;
    if v_hash <> p_hash then
        return;
    end if;

    -- One at a time for a concurrency key: whoever enqueues next for it waits here until this one is visible.
    if jsonb_array_length(v_concurrency_parts) > 0 then
        v_concurrency := '';
        for v_part in select * from jsonb_array_elements(v_concurrency_parts) loop
            v_value := coalesce(v_part->>'text', jsonb_build_object('input', p_input)
                                #>> array(select jsonb_array_elements_text(v_part->'path')));
            if v_value is null then
                raise exception 'the concurrency key names %, which the input lacks',
                    array_to_string(array(select jsonb_array_elements_text(v_part->'path')), '.') using errcode = 'SF003';
            end if;
            v_concurrency := v_concurrency || v_value;
        end loop;
        if octet_length(v_concurrency) > 1000 then
            raise exception 'the concurrency key is longer than 1,000 bytes' using errcode = 'SF003';
        end if;
        perform stepfast.lock_concurrency_key(p_tenant, p_pipeline, v_concurrency);
        v_now := stepfast.now();  -- the order of creation is the order of this lock
        waits := exists (select from stepfast.runs r where r.tenant = p_tenant and r.pipeline = p_pipeline
                         and r.concurrency_key = v_concurrency and r.state in ('pending', 'running', 'suspended'))
                 or stepfast.run_under_way(p_tenant, p_pipeline, v_concurrency) is not null;
    end if;

    if p_key is null then
        insert into stepfast.runs (id, tenant, pipeline, pipeline_hash, state, input, input_hash, labels, priority,
                                   concurrency_key, deadline_at, created_at, event_seq)
        values (p_run, p_tenant, p_pipeline, v_hash, 'pending', p_input, v_input_hash, p_labels, p_priority,
                v_concurrency, v_now + v_deadline_ms * interval '1 ms', v_now, 1);
    else -- a statement of its own: one that minds conflicts writes more
        insert into stepfast.runs (id, tenant, pipeline, pipeline_hash, state, input, input_hash, key, labels, priority,
                                   concurrency_key, deadline_at, created_at, event_seq)
        values (p_run, p_tenant, p_pipeline, v_hash, 'pending', p_input, v_input_hash, p_key, p_labels, p_priority,
                v_concurrency, v_now + v_deadline_ms * interval '1 ms', v_now, 1)
        on conflict (tenant, pipeline, key) where key is not null do nothing;
        created := found;
        if not created then
            select r.id, r.input_hash into v_old_id, v_old_hash from stepfast.runs r
            where r.tenant = p_tenant and r.pipeline = p_pipeline and r.key = p_key;
        end if;
        if v_old_id is null then -- or it was pruned just now: this statement sees what the prune left
            select s.run_id, s.input_hash into v_old_id, v_old_hash from stepfast.spent_keys s
            where s.tenant = p_tenant and s.pipeline = p_pipeline and s.key = p_key;
        end if;
        if v_old_id is not null then
            if created then
                delete from stepfast.runs where id = p_run;
            end if;
            if v_old_hash <> v_input_hash then
                raise exception 'key % belongs to run % with input %, not %', p_key, v_old_id, v_old_hash, v_input_hash
                    using errcode = 'SF002';
            end if;
            run_id := v_old_id;
            created := false;
            return next;
            return;
        end if;
    end if;

    insert into stepfast.steps (run_id, agent, state, depends_on, snapshots, failure_mode, queue, max_worker_losses, priority, created_at)
    select p_run, a.agent, case when a.depends_on = '{}' and not waits then 'available' else 'pending' end, a.depends_on,
           a.snapshots, a.failure_mode, a.queue, a.max_worker_losses, p_priority, v_now
    from stepfast.pipeline_agents a where a.pipeline_hash = v_hash;
    insert into stepfast.events (run_id, seq, name, at, data)
    values (p_run, 1, 'run.enqueued', v_now, jsonb_build_object('pipeline_hash', v_hash, 'input_hash', v_input_hash));
    if v_traced_by is not null then
        insert into stepfast.traces (run_id, provider, traceparent)
        values (p_run, v_traced_by, left(p_traceparent, 100));
    end if;
    run_id := p_run;
    created := true;
    waits := waits or v_full;
    return next;
end $$;
