-- Time, and what holds whoever writes. What is called on every step is in plpgsql, which keeps its plans for the session: a
-- function in SQL that Postgres cannot inline is planned anew at each call, which took half of complete_v1's time (15 to 17).
-- Where a function sets plan_cache_mode, its plans do not depend on what it is given: without it a fifth of its time is planning.

create function stepfast.now() returns timestamptz language plpgsql volatile as $$
begin
    return clock_timestamp() + (select clock_offset from stepfast.meta);
end $$;

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

