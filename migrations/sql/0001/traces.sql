-- Marks the trace of a run, where it has one, as due: an attempt or a step ended, or the run itself.
create function stepfast.mark_trace() returns trigger language plpgsql as $$
begin
    if tg_table_name = 'runs' then
        update stepfast.traces set due_at = stepfast.now() where run_id = new.id;
    else
        update stepfast.traces set due_at = stepfast.now() where run_id = new.run_id;
    end if;
    return null;
end $$;
create trigger step_trace after update of state on stepfast.steps
    for each row when (old.state <> new.state and (old.state = 'executing' or new.state in ('completed', 'discarded', 'cancelled')))
    execute function stepfast.mark_trace();
create trigger run_trace after update of state on stepfast.runs
    for each row when (old.state <> new.state and new.state in ('completed', 'failed', 'cancelled'))
    execute function stepfast.mark_trace();
