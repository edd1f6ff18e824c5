-- Who may do what. Nobody but the owner reaches a function or a table of this schema; other applications get roles that
-- `allow_v1` gives rights, in this database alone: nothing here makes a role, because roles belong to the whole cluster.
revoke execute on all functions in schema stepfast from public;

-- p_rights: `client` starts runs (enqueue_v1) and reads the views; `operator` may also order what a person orders (request_v1).
-- Called again after a migration (`stepfast migrate --client ROLE`), it covers what that one added.
create function stepfast.allow_v1(p_role name, p_rights text) returns void language plpgsql volatile as $$
declare
    v_statement text;
begin
    if p_rights is null or not p_rights = any (array['client', 'operator']) then
        raise exception 'there are the rights client and operator, and not %', p_rights using errcode = 'SF003';
    end if;
    execute format('grant usage on schema stepfast to %I', p_role);
    for v_statement in
        select format('grant select on stepfast.%I to %I', viewname, p_role) from pg_views where schemaname = 'stepfast'
        union all
        select format(case when proname = 'request_v1' and p_rights = 'client' then 'revoke execute on function %s from %I'
                           else 'grant execute on function %s to %I' end, oid::regprocedure, p_role)
        from pg_proc where pronamespace = 'stepfast'::regnamespace and proname = any (array['enqueue_v1', 'request_v1'])
    loop
        execute v_statement;
    end loop;
end $$;
revoke execute on function stepfast.allow_v1 from public;
