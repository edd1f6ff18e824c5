-- Time, and what holds whoever writes. What is called on every step is in plpgsql, which keeps its plans for the session: a
-- function in SQL that Postgres cannot inline is planned anew at each call, which took half of complete_v1's time (15 to 17).
-- Where a function sets plan_cache_mode, its plans do not depend on what it is given: without it a fifth of its time is planning.

create function stepfast.now() returns timestamptz language plpgsql volatile as $$
begin
    return clock_timestamp() + (select clock_offset from stepfast.meta);
end $$;

-- The transitions of app/runs/states.py. A row is "before after".
create function stepfast.check_step_transition() returns trigger language plpgsql as $$
begin
    if not (old.state || ' ' || new.state = any (array[
        'available cancelled', 'available discarded', 'available executing', 'available pending',
        'available retryable', 'cancelled available', 'cancelled completed', 'cancelled pending',
        'completed pending', 'discarded available', 'discarded completed', 'discarded pending',
        'executing available', 'executing cancelled', 'executing completed', 'executing discarded',
        'executing pending', 'executing retryable', 'executing suspended', 'pending available',
        'pending cancelled', 'pending skipped', 'retryable available', 'retryable cancelled',
        'retryable discarded', 'retryable pending', 'skipped completed', 'skipped pending',
        'suspended available', 'suspended cancelled', 'suspended completed', 'suspended discarded',
        'suspended pending'])) then
        raise exception 'a step may not go from % to %', old.state, new.state using errcode = 'SF100';
    end if;
    return new;
end $$;
create trigger step_transition before update of state on stepfast.steps
    for each row when (old.state is distinct from new.state) execute function stepfast.check_step_transition();

create function stepfast.check_run_transition() returns trigger language plpgsql as $$
begin
    if not (old.state || ' ' || new.state = any (array[
        'cancelled running', 'completed running', 'failed running', 'pending cancelled', 'pending failed',
        'pending running', 'running cancelled', 'running completed', 'running failed', 'running pending', 'running suspended',
        'suspended cancelled', 'suspended completed', 'suspended failed', 'suspended running'])) then
        raise exception 'a run may not go from % to %', old.state, new.state using errcode = 'SF100';
    end if;
    return new;
end $$;
create trigger run_transition before update of state on stepfast.runs
    for each row when (old.state is distinct from new.state) execute function stepfast.check_run_transition();

-- Both begin at their beginning: whatever else is written as a new row was never in another state.
create function stepfast.refuse_beginning() returns trigger language plpgsql as $$
begin
    raise exception 'a row of % may not begin as %', tg_table_name, new.state using errcode = 'SF100';
end $$;
create trigger step_beginning before insert on stepfast.steps
    for each row when (new.state not in ('pending', 'available')) execute function stepfast.refuse_beginning();
create trigger run_beginning before insert on stepfast.runs
    for each row when (new.state <> 'pending') execute function stepfast.refuse_beginning();

-- What an ended attempt recorded stands: an output is an immutable row of its attempt. One exception: a lost attempt whose
-- outcome is unknown may still confirm it (complete_v1).
create function stepfast.refuse_change() returns trigger language plpgsql as $$
begin
    raise exception '% % is ended and may not change', tg_table_name, old.id using errcode = 'SF100';
end $$;
create trigger attempt_immutable before update on stepfast.attempts
    for each row when (old.state <> 'executing' and not (old.state = 'lost' and new.state = 'completed')) execute function stepfast.refuse_change();

-- jsonb sorts keys and drops spaces, so its text is a canonical form; only numbers keep their spelling (1 is not 1.0).
create function stepfast.hash(value jsonb) returns text language plpgsql immutable strict as $$
begin
    return encode(sha256(convert_to(value::text, 'UTF8')), 'hex');
end $$;

-- Errors that differ only in numbers and ids have one fingerprint.
create function stepfast.fingerprint(pipeline text, agent text, error jsonb) returns text language sql immutable as $$
    select left(encode(sha256(convert_to(concat_ws('|', pipeline, agent, error->>'code',
        regexp_replace(left(error->>'message', 2000), '[0-9a-f-]{8,}|[0-9]+', '#', 'g')), 'UTF8')), 'hex'), 16)
$$;

