-- Counts what happened since the last time, up to p_lag_ms ago, at most p_slice_ms of it: the cost is that of what is new.
-- The lag is longer than any of our statements may take, so that what it counts has been committed; a host's own long
-- transaction only adds `run.enqueued`, which is not counted. Returns how many seconds are left to count; 0 where somebody
-- else counts just now.
-- A series beyond the first p_series_max of its metric is counted as `other`: labels are bounded, whatever is published.
create function stepfast.count_events_v1(p_lag_ms integer, p_slice_ms integer, p_series_max integer) returns double precision
language plpgsql volatile as $$
declare
    v_from timestamptz;
    v_until timestamptz;
    v_end timestamptz := stepfast.now() - p_lag_ms * interval '1 ms';
begin
    select counted_until into v_from from stepfast.metric_position for update skip locked;
    if v_from is null or v_from >= v_end then
        return 0;
    end if;
    v_until := least(v_end, v_from + p_slice_ms * interval '1 ms');
    with happened as materialized (
        select e.name, e.data, e.agent, r.pipeline, a.model, a.usage, extract(epoch from a.ended_at - a.started_at) as seconds
        from stepfast.events e join stepfast.runs r on r.id = e.run_id
        -- Only of the event that ended it: a step may be given up later under the same attempt.
        left join stepfast.attempts a on a.run_id = e.run_id and a.id = e.attempt_id and a.ended_at = e.at
        where e.at >= v_from and e.at < v_until),
    counted (metric, pipeline, agent, label, total) as (
        select 'runs_ended', pipeline, '', substr(name, 5), count(*)::float8 from happened
        where name in ('run.completed', 'run.failed', 'run.cancelled') group by pipeline, name
        union all
        select 'retries', pipeline, agent, '', count(*) from happened where name = 'step.retry_scheduled' group by pipeline, agent
        union all
        select 'rescues', pipeline, agent, '', count(*) from happened where name = 'step.rescued' group by pipeline, agent
        union all
        select 'dead_letters', pipeline, agent, data->>'code', count(*) from happened
        where name = 'step.discarded' group by pipeline, agent, data->>'code'
        union all
        select 'tokens_' || direction, '', '', coalesce(model, 'unknown'), sum((usage->>(direction || '_tokens'))::float8)
        from happened, unnest(array['input', 'output']) direction
        where usage ? (direction || '_tokens') group by direction, model
        union all
        select 'step_seconds_sum', pipeline, agent, '', sum(seconds) from happened
        where name = 'step.completed' group by pipeline, agent
        union all
        -- As Prometheus has it: how many took at most so long, for each limit; a row also where there are none.
        select 'step_seconds_le_' || edge, pipeline, agent, '', count(*) filter (where seconds <= edge)
        from happened, unnest(array[0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 'infinity']::float8[]) edge
        where name = 'step.completed' group by edge, pipeline, agent),
    ranked as (
        select c.*, t.metric is not null as known,
               row_number() over (partition by c.metric, t.metric is null order by c.pipeline, c.agent, c.label)
               + (select count(*) from stepfast.metric_totals o where o.metric = c.metric) as place
        from counted c left join stepfast.metric_totals t using (metric, pipeline, agent, label)
        where c.total is not null)
    insert into stepfast.metric_totals
    select metric, coalesce(w.pipeline, 'other'), coalesce(w.agent, 'other'), coalesce(w.label, 'other'), sum(total)
    from ranked r left join lateral (
        select r.pipeline, r.agent, r.label where r.known or r.place <= p_series_max) w on true
    group by 1, 2, 3, 4
    on conflict (metric, pipeline, agent, label) do update set total = metric_totals.total + excluded.total;
    update stepfast.metric_position set counted_until = v_until;
    return extract(epoch from v_end - v_until);
end $$;
