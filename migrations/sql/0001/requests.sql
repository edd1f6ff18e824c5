-- What a person orders from outside: an application with the rights of an operator, or plain SQL. It is written down here, in
-- the caller's own transaction, and a worker carries it out afterwards (`Orders.carry_out`): so no host's transaction holds a
-- run's lock, and what is rolled back was never asked.

create table stepfast.requests (
    id uuid primary key,
    run_id uuid not null references stepfast.runs (id) on delete cascade,
    action text not null check (action in ('approve', 'reject', 'resume', 'cancel')),
    agent text,                         -- whom a decision is about; for `resume`, from whom on
    digest text,                        -- binds a decision to what the person saw
    requested_by text not null,         -- as the caller says
    login text not null,                -- the database's role that asked
    reason text,
    state text not null check (state in ('waiting', 'done', 'refused')),
    requested_at timestamptz not null,
    ended_at timestamptz,
    answer jsonb,                       -- done: {"agents" | "decision"}; refused: {"message", "next_step"}
    check ((state = 'waiting') = (ended_at is null)),
    check ((state = 'waiting') = (answer is null)),
    check (action not in ('approve', 'reject') or agent is not null)
);
create index requests_waiting on stepfast.requests (requested_at) where state = 'waiting';
create index requests_run on stepfast.requests (run_id);

-- Errors: SF003 no such action, or a text that is missing or longer than 1,000 bytes; SF004 no such run or agent.
create function stepfast.request_v1(
    p_action text, p_run uuid, p_by text, p_agent text default null, p_reason text default null,
    p_digest text default null, p_request uuid default gen_random_uuid()
) returns uuid language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
begin
    if p_action is null or not p_action = any (array['approve', 'reject', 'resume', 'cancel']) then
        raise exception 'there is no action %; there are approve, reject, resume and cancel', p_action using errcode = 'SF003';
    end if;
    if coalesce(p_by, '') = '' or (p_agent is null and p_action in ('approve', 'reject')) then
        raise exception '% needs to know who orders it%', p_action,
            case when p_action in ('approve', 'reject') then ', and for which agent' else '' end using errcode = 'SF003';
    end if;
    if greatest(octet_length(p_by), octet_length(p_reason), octet_length(p_digest)) > 1000 then
        raise exception 'who orders it, why, and the digest take at most 1,000 bytes each' using errcode = 'SF003';
    end if;
    if not exists (select from stepfast.runs where id = p_run) then
        raise exception 'there is no run %', p_run using errcode = 'SF004';
    end if;
    if p_agent is not null and not exists (select from stepfast.steps where run_id = p_run and agent = p_agent) then
        raise exception 'run % has no agent %', p_run, p_agent using errcode = 'SF004';
    end if;
    insert into stepfast.requests (id, run_id, action, agent, digest, requested_by, login, reason, state, requested_at)
    values (p_request, p_run, p_action, p_agent, p_digest, p_by, session_user, p_reason, 'waiting', stepfast.now());
    return p_request;
end $$;
