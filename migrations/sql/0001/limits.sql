-- Every function that others call gives up where it waits longer than this for one lock, whoever calls it: also behind a
-- pooler, where no setting of ours lasts, and in an application's own transaction. Ours hold a lock for milliseconds.
do $$
declare
    f regprocedure;
begin
    for f in select oid from pg_proc where pronamespace = 'stepfast'::regnamespace and proname like '%\_v1' loop
        execute format('alter function %s set lock_timeout = ''5s''', f);
        -- Plans are kept for a session, also those of a time when a table was empty and reading the whole of it was best.
        -- Each of ours finds what it needs by an index.
        execute format('alter function %s set enable_seqscan = off', f);
        -- Times in JSON are UTC, whatever zone the caller's session is in.
        execute format('alter function %s set timezone = ''UTC''', f);
    end loop;
end $$;
