-- What every worker does twice a second, so that nothing waits for ever: retries that are due, workers that are gone,
-- messages that nobody sent. Each part re-checks state in the statement that changes it, and skips what others hold.

-- At most so many messages of a queue wait at the broker (a few more, where several processes send at once). What else may
-- start waits in Postgres, where priority and age decide, and a broker's queue knows neither: this is how many steps an urgent
-- run finds before it. Claims send what takes the place of what they claimed, so that more would not keep workers busier.
create function stepfast.dispatched_max() returns integer language sql immutable as 'select 8';

-- How many that others hold a sweep passes over to reach those that it may change.
create function stepfast.passed_max() returns integer language sql immutable as 'select 100';

-- Marks steps of a queue that are available and unsent as sent, and returns them in the order in which the caller must send
-- them, after this commits: the highest priority first, then the oldest run. If the caller dies in between, `overdue` finds
-- them. So many that p_max wait at the broker; none where more than p_waiting do; at most p_limit.
create function stepfast.send_next(p_queue text, p_waiting integer, p_max integer, p_limit integer default 100)
returns table (run_id uuid, pipeline_hash text, agent text, item text) language plpgsql volatile as $$
#variable_conflict use_column
begin
    return query
    with waiting as materialized (
        select count(*)::integer as steps from (
            select from stepfast.steps where queue = p_queue and state = 'available' and sent_at is not null limit p_max) w),
    taken as (
        select s.run_id, s.agent, s.item from stepfast.steps s
        where s.queue = p_queue and s.state = 'available' and s.sent_at is null
        order by s.priority desc, s.created_at, s.run_id, s.agent
        limit (select least(p_limit, case when steps <= p_waiting then p_max - steps else 0 end) from waiting)
        for update skip locked),
    marked as (
        update stepfast.steps s set sent_at = stepfast.now(), sends = s.sends + 1
        from taken t
        where s.run_id = t.run_id and s.agent = t.agent and s.item = t.item and s.state = 'available' and s.sent_at is null
        returning s.run_id, s.agent, s.item, s.priority, s.created_at)
    select m.run_id, r.pipeline_hash, m.agent, m.item from marked m join stepfast.runs r on r.id = m.run_id
    order by m.priority desc, m.created_at, m.run_id, m.agent;
end $$;

-- What comes next in each queue that has unsent steps (of one run, or of all): up to p_limit steps, of any runs, as send_next.
create function stepfast.take_unsent_v1(p_run uuid, p_limit integer)
returns table (run_id uuid, pipeline_hash text, agent text, item text) language plpgsql volatile as $$
declare
    v_queues text[];
    v_queue text;
    v_left integer := p_limit;
    v_count integer;
begin
    if p_limit = 0 then
        return;
    end if;
    if p_run is not null then
        v_queues := array(select distinct s.queue from stepfast.steps s
                          where s.run_id = p_run and s.state = 'available' and s.sent_at is null order by s.queue);
    else
        -- The queues one by one, each by its first step: a long backlog costs no more to look at than a short one.
        v_queues := array(
            with recursive q as (
                (select s.queue from stepfast.steps s where s.state = 'available' and s.sent_at is null
                 order by s.queue limit 1)
                union all
                select (select s.queue from stepfast.steps s where s.state = 'available' and s.sent_at is null and s.queue > q.queue
                        order by s.queue limit 1) from q where q.queue is not null)
            select q.queue from q where q.queue is not null);
    end if;
    foreach v_queue in array v_queues loop
        return query select * from stepfast.send_next(v_queue, stepfast.dispatched_max(), stepfast.dispatched_max(), v_left);
        get diagnostics v_count = row_count;
        v_left := v_left - v_count;
        exit when v_left <= 0;
    end loop;
end $$;

-- Like take_unsent_v1, for overdue steps: those of queues that the caller found empty, and those that were overtaken. A queue
-- gives its messages in the order in which they were sent, so what was sent well before a step that executes now is not behind
-- it: its message was lost, however long the queue is. (Five times p_resend_ms: clocks of senders, and messages given back.)
create function stepfast.take_overdue_v1(p_queues text[], p_resend_ms integer, p_limit integer)
returns table (run_id uuid, pipeline_hash text, agent text, item text) language plpgsql volatile as $$
#variable_conflict use_column
begin
    return query
    with clock as materialized (select stepfast.now() as now, p_resend_ms * interval '1 ms' as resend),
    lost as (
        select queue, 'infinity'::timestamptz as sent_before from unnest(p_queues) queue
        union all
        select e.queue, max(e.sent_at) - 5 * p_resend_ms * interval '1 ms'
        from stepfast.attempts a join stepfast.steps e on e.run_id = a.run_id and e.agent = a.agent and e.item = a.item
        where a.state = 'executing' and e.queue <> all (p_queues) group by e.queue),
    taken as (
        select s.run_id, s.agent, s.item
        from clock, lost l join stepfast.steps s on s.queue = l.queue
        where s.state = 'available' and s.sent_at is not null and s.sent_at < least(l.sent_before, clock.now - clock.resend)
          and s.sent_at < clock.now - clock.resend * power(2, least(s.sends - 1, 6))
        order by s.sent_at limit p_limit for update of s skip locked)
    update stepfast.steps s set sent_at = stepfast.now(), sends = s.sends + 1
    from taken t join stepfast.runs r on r.id = t.run_id
    where s.run_id = t.run_id and s.agent = t.agent and s.item = t.item and s.state = 'available'
    returning s.run_id, r.pipeline_hash, s.agent, s.item;
end $$;

-- What a worker says of the processes that it started: those that ended are dead at once; those that live keep their lease,
-- also where a call into C holds their interpreter for longer. Returns the dead.
create function stepfast.vouch(p_worker bigint, p_living integer[], p_dead integer[], p_lease_ms integer) returns bigint[]
language plpgsql volatile as $$
declare
    v_now timestamptz := stepfast.now();
    v_lost bigint[];
begin
    update stepfast.workers
    set lease_until = v_now + p_lease_ms * interval '1 ms', suspect_since = null
    where parent_id = p_worker and pid = any (p_living) and ended_at is null
      and (suspect_since is not null or lease_until < v_now + p_lease_ms / 2 * interval '1 ms');
    with lost as (
        update stepfast.workers set ended_at = v_now
        where parent_id = p_worker and pid = any (p_dead) and ended_at is null returning id)
    select coalesce(array_agg(id), '{}') into v_lost from lost;
    return v_lost;
end $$;

-- Finds dead workers. A free advisory lock makes a worker suspect, and so does a lease that ran out; a heartbeat clears it. It
-- is dead when the suspicion has stood for the grace; and for a lease that ran out as long as a live worker needs for its next
-- beat, too: after Postgres itself was frozen every lease is old. Likewise for the child of a worker that lives: its parent
-- sees its death sooner, and may have to vouch for it; and for a process that has other sessions here: it lost the one with the
-- lock, and is too busy to be back within the grace. `judge_ms`: how soon the oldest suspicion is to be looked at again.
create function stepfast.bury_workers(p_lease_ms integer, p_grace_ms integer, out lost bigint[], out judge_ms integer)
language plpgsql volatile as $$
declare
    v_now timestamptz := stepfast.now();
    v_grace interval := p_grace_ms * interval '1 ms';
    v_beat interval := p_lease_ms / 3 * interval '1 ms';
    v_free boolean;
    v_vouched boolean;
    v_due timestamptz;
    w record;
begin
    lost := '{}';
    for w in select c.id, c.suspect_since, c.lease_until, c.has_session,
                    left(format('stepfast %s@%s', c.pid, c.host), 63) as session_name, p.id as parent, p.has_session as parent_has_session
             from stepfast.workers c left join stepfast.workers p on p.id = c.parent_id and p.ended_at is null
             where c.ended_at is null limit 1000 loop
        v_free := w.has_session and pg_try_advisory_xact_lock(7083, w.id::int);
        continue when not v_free and w.lease_until >= v_now;
        v_vouched := coalesce(w.parent_has_session and not pg_try_advisory_xact_lock(7083, w.parent::int), false)
                     or exists (select from pg_stat_activity where application_name = w.session_name);
        v_due := coalesce(w.suspect_since, v_now) + v_grace
                 + case when v_free and not v_vouched then interval '0' else v_beat end;
        if w.suspect_since is not null and v_due < v_now then
            -- A heartbeat in between has moved the lease: then it lives.
            update stepfast.workers set ended_at = v_now
            where id = w.id and ended_at is null and lease_until = w.lease_until;
            if found then
                lost := lost || w.id;
            end if;
            continue;
        end if;
        judge_ms := least(judge_ms, ceil(extract(epoch from v_due - v_now) * 1000)::integer);
        if w.suspect_since is null then
            update stepfast.workers set suspect_since = v_now where id = w.id and ended_at is null;
        end if;
    end loop;
end $$;

-- Whether every lock may be free and every lease old because Postgres started, crashed or changed its place less than a lease
-- ago. Then nobody is dead: to wait is better than to pay twice.
create function stepfast.is_truce(p_lease_ms integer) returns boolean language plpgsql volatile as $$
declare
    v_since timestamptz := (select since from stepfast.awake);
begin
    if v_since is null then
        insert into stepfast.awake (since) values (clock_timestamp()) on conflict do nothing;
        return true;
    end if;
    return clock_timestamp() - greatest(v_since, pg_postmaster_start_time()) < p_lease_ms * interval '1 ms';
end $$;

-- Takes steps away from workers that are dead, and from attempts that overstayed their time.
create function stepfast.rescue_steps(p_grace interval, p_limit integer) returns jsonb language plpgsql volatile as $$
declare
    v_now timestamptz := stepfast.now();
    v_rescued jsonb := '[]';
    v_code text;
    a record;
begin
    -- An attempt past its deadline is given time for a commit that waited for Postgres, from when this is first seen.
    update stepfast.attempts set overstayed_at = v_now
    where state = 'executing' and deadline_at < v_now and overstayed_at is null;
    -- Also what a sweep before this one could not take, because the run was locked.
    for a in select t.run_id, t.id, t.agent, 'died' as reason
             from stepfast.attempts t join stepfast.workers x on x.id = t.worker_id
             where t.state = 'executing' and x.ended_at is not null
             union all
             select t.run_id, t.id, t.agent, 'overstayed its time' from stepfast.attempts t
             where t.state = 'executing' and t.deadline_at < v_now and t.overstayed_at < v_now - p_grace
             limit p_limit + stepfast.passed_max() loop
        exit when jsonb_array_length(v_rescued) >= p_limit;
        v_code := stepfast.rescue_step(a.run_id, a.id, a.reason, true);
        if v_code is not null then
            v_rescued := v_rescued || jsonb_build_object('run_id', a.run_id, 'agent', a.agent, 'attempt_id', a.id,
                                                         'code', v_code, 'reason', a.reason);
        end if;
    end loop;
    return v_rescued;
end $$;

-- A worker that stops gives away what it executes, and its children too: what may be repeated goes on elsewhere at once, and
-- counts as no loss. What may not is left to finish. Ends the rows of those that execute nothing any more. Returns how many
-- attempts are left; up to p_limit are given away by one call.
create function stepfast.hand_over_v1(p_worker bigint, p_limit integer) returns integer language plpgsql volatile as $$
declare
    a record;
begin
    for a in select t.run_id, t.id from stepfast.attempts t join stepfast.workers w on w.id = t.worker_id
             where t.state = 'executing' and t.repeatable and p_worker in (w.id, w.parent_id)
             order by t.run_id limit p_limit loop
        perform stepfast.rescue_step(a.run_id, a.id, 'stopped', false);
    end loop;
    update stepfast.workers w set ended_at = stepfast.now()
    where p_worker in (id, parent_id) and ended_at is null
      and not exists (select from stepfast.attempts where worker_id = w.id and state = 'executing');
    return (select count(*) from stepfast.attempts t join stepfast.workers w on w.id = t.worker_id
            where t.state = 'executing' and p_worker in (w.id, w.parent_id));
end $$;

-- Ends what waited too long for a person, and runs whose deadline has passed. Returns how many steps it ended.
create function stepfast.expire_steps(p_limit integer) returns integer language plpgsql volatile as $$
declare
    v_now timestamptz := stepfast.now();
    v_count integer := 0;
    v_runs integer := 0;
    v_seq bigint;
    r stepfast.runs;
    s stepfast.steps;
    a record;
begin
    for a in select run_id, agent from stepfast.approvals
             where state = 'requested' and expires_at <= v_now order by expires_at limit p_limit + stepfast.passed_max() loop
        exit when v_count >= p_limit;
        select * into r from stepfast.try_run(a.run_id);
        if r.id is not null then
            perform stepfast.decide_v1(a.run_id, a.agent, 'expired', null, 'stepfast', 'nobody decided in time');
            v_count := v_count + 1;
        end if;
    end loop;
    for a in select id from stepfast.runs
             where deadline_at <= v_now and state in ('pending', 'running', 'suspended')
             order by deadline_at limit p_limit + stepfast.passed_max() loop
        exit when v_runs >= p_limit;
        select * into r from stepfast.try_run(a.id);
        continue when r.id is null or r.state not in ('pending', 'running', 'suspended');
        v_runs := v_runs + 1;
        v_seq := r.event_seq;
        -- Executing steps finish and are recorded. One that waited is given up, so that a dead letter says why.
        for s in select * from stepfast.steps
                 where run_id = r.id and state in ('available', 'retryable', 'suspended', 'executing')
                 order by state = 'executing', agent limit 1 loop
            exit when s.state = 'executing';
            v_seq := stepfast.discard_step(r, s, jsonb_build_object('code', 'run_deadline', 'who', 'operator',
                'message', 'The deadline of the run has passed.', 'details', '{}'::jsonb,
                'next_step', format('To go on without a deadline: stepfast resume %s', r.id)), v_seq, v_now);
            v_count := v_count + 1;
        end loop;
        update stepfast.approvals set state = 'void', decided_at = v_now, void_reason = 'the run failed'
        where run_id = r.id and state = 'requested';
        update stepfast.steps set state = 'pending', scheduled_at = null, sent_at = null
        where run_id = r.id and state in ('available', 'retryable', 'suspended');
        insert into stepfast.events (run_id, seq, name, at, data)
        values (r.id, v_seq + 1, 'run.failed', v_now, '{"code": "run_deadline"}');
        update stepfast.runs set state = 'failed', ended_at = v_now, event_seq = v_seq + 1 where id = r.id;
        perform stepfast.release_next_run(r, v_now);
    end loop;
    return v_count;
end $$;

-- The whole sweep, one statement for an idle worker. p_worker vouches for its children: p_living and p_dead are their pids.
-- Returns {"due": retries released, "expired": steps ended, "lost": [worker ids], "rescued": [{"run_id", "agent",
-- "attempt_id", "code", "reason"}], "judge_ms": how soon to sweep again because a worker is suspect, or null, "unsent":
-- whether take_unsent_v1 would find any, "unpublished": whether a dead letter waits to be sent, "requested": whether a person's
-- order waits to be carried out, "overdue": the queues of steps whose message was sent a while ago and not claimed: lost, or
-- waiting behind others}. That while doubles with every send, up to 64 times, so that a backlog is not doubled by resending.
create function stepfast.sweep_v1(
    p_lease_ms integer, p_grace_ms integer, p_resend_ms integer, p_limit integer,
    p_worker bigint default null, p_living integer[] default '{}', p_dead integer[] default '{}'
) returns jsonb language plpgsql volatile as $$
declare
    v_now timestamptz := stepfast.now();
    v_due integer;
    v_lost bigint[] := '{}';
    v_rescued jsonb := '[]';
    v_expired integer := 0;
    v_found record;
    v_judge_ms integer;
    v_overdue jsonb;
begin
    if p_worker is not null then
        v_lost := stepfast.vouch(p_worker, p_living, p_dead, p_lease_ms);
    end if;
    -- One sweeper at a time: several that each end many runs could wait for each other, and the lock that one takes to look
    -- at a worker's would seem a live worker's to another.
    if pg_try_advisory_xact_lock(7083, 0) then
        v_expired := stepfast.expire_steps(p_limit);
        if not stepfast.is_truce(p_lease_ms) then
            select * into v_found from stepfast.bury_workers(p_lease_ms, p_grace_ms);
            v_lost := v_lost || v_found.lost;
            v_judge_ms := v_found.judge_ms;
            v_rescued := stepfast.rescue_steps((p_grace_ms + p_lease_ms / 3) * interval '1 ms', p_limit);
        end if;
    end if;
    -- Last: it locks steps without their runs, and whoever holds such a step must not wait for anything.
    update stepfast.steps s set state = 'available', scheduled_at = null, sent_at = null, sends = 0
    from (select run_id, agent, item from stepfast.steps
          where state = 'retryable' and scheduled_at <= v_now
          order by scheduled_at limit p_limit for update skip locked) d
    where s.run_id = d.run_id and s.agent = d.agent and s.item = d.item;
    get diagnostics v_due = row_count;
    -- The queues one by one, each by its first overdue step: a long backlog costs no more to look at than a short one.
    with recursive q as (
        (select queue from stepfast.steps where state = 'available' and sent_at is not null order by queue limit 1)
        union all
        select (select s.queue from stepfast.steps s where s.state = 'available' and s.sent_at is not null and s.queue > q.queue
                order by s.queue limit 1) from q where q.queue is not null)
    select coalesce(jsonb_agg(queue), '[]') into v_overdue from q
    where exists (select from stepfast.steps s where s.state = 'available' and s.sent_at is not null and s.queue = q.queue
                  and s.sent_at < v_now - p_resend_ms * interval '1 ms'
                  and s.sent_at < v_now - p_resend_ms * power(2, least(s.sends - 1, 6)) * interval '1 ms');
    return jsonb_build_object(
        'due', v_due, 'expired', v_expired, 'lost', v_lost, 'rescued', v_rescued, 'judge_ms', v_judge_ms,
        'unsent', exists (select from stepfast.steps where state = 'available' and sent_at is null),
        'unpublished', exists (select from stepfast.dead_letters where published_at is null),
        'requested', exists (select from stepfast.requests where state = 'waiting'),
        'overdue', v_overdue);
end $$;
