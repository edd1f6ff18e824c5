-- Retention: what ended long ago is deleted, a few runs a transaction, by whoever calls prune_runs_v1 again and again.

-- Start keys of runs that were pruned: whoever starts with one again is given that run, which is over.
create table stepfast.spent_keys (
    tenant text not null,
    pipeline text not null,
    key text not null,
    run_id uuid not null,
    input_hash text not null,
    pruned_at timestamptz not null,
    primary key (tenant, pipeline, key)
);

-- The output that a completed key gives: its attempt's, or what was kept of it when the attempt's run was pruned. One
-- statement, so that a prune meanwhile is seen as a whole.
create function stepfast.key_output(k stepfast.keys) returns jsonb language sql volatile as $$
    select coalesce(a.output, o.output)
    from stepfast.keys o left join stepfast.attempts a on a.run_id = o.run_id and a.id = o.attempt_id
    where o.tenant = k.tenant and o.pipeline = k.pipeline and o.agent = k.agent and o.key = k.key and o.generation = k.generation
$$;

-- Why a run that ended must stay; null where it may go. Counted_until: what happened later is not in the metrics yet.
create function stepfast.kept_because(r stepfast.runs, p_before timestamptz, p_counted_until timestamptz) returns text
language sql volatile as $$
    select case
        when exists (select from stepfast.steps s where s.run_id = r.id
                     and s.state in ('available', 'executing', 'retryable', 'suspended')) then 'unfinished'
        when exists (select from stepfast.dead_letters d where d.run_id = r.id and d.resolved_at is null) then 'dead_letter'
        -- Of a run that was taken back (cancelled, overridden) an attempt may still hold its key.
        when exists (select from stepfast.attempts a, lateral (
                         select from stepfast.keys k
                         where k.tenant = r.tenant and k.pipeline = r.pipeline and k.agent = a.agent and k.key = a.key
                           and k.attempt_id = a.id and k.state <> 'completed' offset 0) open
                     where a.run_id = r.id) then 'key'
        when exists (select from stepfast.requests q where q.run_id = r.id and q.state = 'waiting') then 'request'
        when coalesce((select e.at >= least(p_before, p_counted_until) from stepfast.events e
                       where e.run_id = r.id order by e.seq desc limit 1), false) then 'recent'
        end
$$;

-- Deletes runs that ended before p_before and after the place (p_after_at, p_after_id), in this order: as many as have
-- p_events_max events together, and at least one. What somebody else holds just now is skipped. Returns
-- {"looked_at", "pruned", "kept": {why: how many}, "last_at", "last_id"}: the place for the next call; looked_at is 0 at the end.
-- With p_dry_run nothing is changed. Killed between two calls, it goes on from the beginning.
create function stepfast.prune_runs_v1(
    p_before timestamptz, p_after_at timestamptz, p_after_id uuid, p_runs_max integer, p_events_max integer, p_dry_run boolean
) returns jsonb language plpgsql volatile
-- A few runs among many: each is found by its index, whatever the statistics say of tables that shrink meanwhile.
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off as $$
declare
    v_counted_until timestamptz := (select counted_until from stepfast.metric_position);
    v_now timestamptz := stepfast.now();
    v_seen uuid[];
    v_locked uuid[];
    v_ids uuid[];
    v_last_at timestamptz;
    v_kept jsonb;
begin
    with page as materialized (
        select id, ended_at, event_seq from stepfast.runs
        where ended_at is not null and ended_at < p_before and (ended_at, id) > (p_after_at, p_after_id)
        order by ended_at, id limit p_runs_max),
    summed as (select id, ended_at, sum(event_seq) over (order by ended_at, id) - event_seq as before from page)
    select array_agg(id order by ended_at, id), max(ended_at) into v_seen, v_last_at
    from summed where before < p_events_max;
    if v_seen is null then
        return jsonb_build_object('looked_at', 0, 'pruned', 0, 'kept', '{}'::jsonb);
    end if;
    if p_dry_run then
        v_locked := v_seen;
    else
        select coalesce(array_agg(id), '{}') into v_locked from (
            select id from stepfast.runs where id = any (v_seen) and ended_at < p_before for update skip locked) held;
    end if;
    -- A statement of its own: it sees what was committed before the locks.
    with judged as (
        select r.id, case when r.id = any (v_locked) then stepfast.kept_because(r, p_before, v_counted_until) else 'busy' end as why
        from stepfast.runs r where r.id = any (v_seen)),
    counted as (select why, count(*) as runs from judged where why is not null group by why)
    select (select coalesce(array_agg(id), '{}') from judged where why is null),
           (select coalesce(jsonb_object_agg(why, runs), '{}') from counted)
    into v_ids, v_kept;
    if not p_dry_run and v_ids <> '{}' then
        insert into stepfast.spent_keys (tenant, pipeline, key, run_id, input_hash, pruned_at)
        select tenant, pipeline, key, id, input_hash, v_now from stepfast.runs where id = any (v_ids) and key is not null;
        -- A key outlives its run, with its output. One that names its run goes with it: no other run can come with it. It does
        -- where the agent's key is made of run_id; what only looks so came with the input, and may come again.
        with naming as materialized (
            select p.hash, agent->>'id' as agent
            from stepfast.pipelines p,
                 jsonb_path_query(p.definition, '$.agents[*] ? (@.key_parts[*].path[0] == "run_id")') agent
            where p.hash in (select pipeline_hash from stepfast.runs where id = any (v_ids))),
        mine as (
            select k.tenant, k.pipeline, k.agent, k.key, k.generation, a.output, a.output_hash, a.observed,
                   exists (select from naming n where n.hash = r.pipeline_hash and n.agent = a.agent) as own
            from stepfast.runs r join stepfast.attempts a on a.run_id = r.id, lateral (
                select * from stepfast.keys k
                where k.tenant = r.tenant and k.pipeline = r.pipeline and k.agent = a.agent and k.key = a.key
                  and k.attempt_id = a.id offset 0) k  -- a lookup for each attempt, by the whole key
            where r.id = any (v_ids)),
        gone as (
            delete from stepfast.keys k using mine m
            where m.own and (k.tenant, k.pipeline, k.agent, k.key, k.generation)
                          = (m.tenant, m.pipeline, m.agent, m.key, m.generation))
        update stepfast.keys k set output = m.output, output_hash = m.output_hash, observed = m.observed from mine m
        where not m.own and (k.tenant, k.pipeline, k.agent, k.key, k.generation)
                          = (m.tenant, m.pipeline, m.agent, m.key, m.generation);
        delete from stepfast.runs where id = any (v_ids); -- and by it steps, attempts, events, letters, approvals, effects
    end if;
    return jsonb_build_object('looked_at', cardinality(v_seen), 'pruned', cardinality(v_ids), 'kept', v_kept,
                              'last_at', v_last_at, 'last_id', v_seen[cardinality(v_seen)]);
end $$;

-- What is left over, a few a transaction: workers that ended before p_before, and definitions that were published before it and
-- that no run has. The newest definition of a pipeline stays, and the one that its name means, also for a while after another one.
-- Returns {"workers", "definitions"}: how many went; both are 0 at the end.
create function stepfast.prune_rest_v1(p_before timestamptz, p_workers_max integer, p_definitions_max integer)
returns jsonb language plpgsql volatile as $$
declare
    v_workers integer;
    v_definitions integer;
begin
    delete from stepfast.workers where id = any (array(
        select w.id from stepfast.workers w
        where w.ended_at < p_before
          and not exists (select from stepfast.attempts a where a.worker_id = w.id and a.state = 'executing')
        order by w.ended_at limit p_workers_max for update skip locked));
    get diagnostics v_workers = row_count;
    delete from stepfast.pipelines where hash = any (array(
        select p.hash from stepfast.pipelines p
        where p.published_at < p_before
          and exists (select from stepfast.pipelines q where q.name = p.name and q.published_at > p.published_at)
          and not exists (select from stepfast.pipeline_names n where n.name = p.name and (n.hash = p.hash or n.moved_at >= p_before))
          and not exists (select from stepfast.runs r where r.pipeline_hash = p.hash)
        limit p_definitions_max for update skip locked));
    get diagnostics v_definitions = row_count;
    return jsonb_build_object('workers', v_workers, 'definitions', v_definitions);
end $$;
