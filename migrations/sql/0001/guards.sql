-- What holds of every row that a step's progress writes, whoever writes it. In other tables such rules are CHECK constraints.
-- Postgres reads those, and the conditions of triggers, from their text at every statement, which took a quarter of a step's
-- time; a function keeps its plan. A condition whose value is unknown counts as kept, as in a CHECK.
--
-- They also mark the trace of a run, where it has one, as due: an attempt, a step or the run ended.

-- The transitions of app/runs/states.py: a row is "before after". Runs and steps begin at their beginning: whatever else is
-- written as a new row was never in another state.
create function stepfast.guard_run() returns trigger language plpgsql as $$
begin
    if tg_op = 'INSERT' then
        if new.state <> 'pending' then
            raise exception 'a run may not begin as %', new.state using errcode = 'SF100';
        end if;
        if not (jsonb_typeof(new.input) = 'object' and jsonb_typeof(new.labels) = 'object') then
            raise check_violation using message = 'a run is not as runs are (check): input, labels';
        end if;
    elsif old.state <> new.state then
        if not (old.state || ' ' || new.state = any (array[
            'cancelled running', 'completed running', 'failed running', 'pending cancelled', 'pending failed',
            'pending running', 'running cancelled', 'running completed', 'running failed', 'running pending', 'running suspended',
            'suspended cancelled', 'suspended completed', 'suspended failed', 'suspended running'])) then
            raise exception 'a run may not go from % to %', old.state, new.state using errcode = 'SF100';
        end if;
        if new.state in ('completed', 'failed', 'cancelled') then
            update stepfast.traces set due_at = stepfast.now() where run_id = new.id;
        end if;
    end if;
    if not ((new.state in ('completed', 'failed', 'cancelled')) = (new.ended_at is not null)
            and (new.state <> 'running' or new.started_at is not null)
            and (not new.partial or new.state = 'completed') and new.priority between 0 and 9) then
        raise check_violation using message = 'a run is not as runs are (check): state, ended_at, started_at, partial, priority';
    end if;
    return new;
end $$;
-- Of the columns that it looks at: most updates of a run only count its events.
create trigger guard before insert or update of state, partial, started_at, ended_at, priority on stepfast.runs
    for each row execute function stepfast.guard_run();

create function stepfast.refuse_change() returns trigger language plpgsql as $$
begin
    raise exception '% of % may not change', tg_argv[0], tg_table_name using errcode = 'SF100';
end $$;
create trigger guard_start before update of input, labels on stepfast.runs
    for each row execute function stepfast.refuse_change('what started a row');

create function stepfast.guard_step() returns trigger language plpgsql as $$
begin
    if tg_op = 'INSERT' then
        if new.state not in ('pending', 'available') then
            raise exception 'a step may not begin as %', new.state using errcode = 'SF100';
        end if;
    elsif old.state <> new.state then
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
        if old.state = 'executing' or new.state in ('completed', 'discarded', 'cancelled') then
            update stepfast.traces set due_at = stepfast.now() where run_id = new.run_id;
        end if;
    end if;
    if not ((new.state = 'retryable') = (new.scheduled_at is not null)
            and (new.state in ('completed', 'skipped', 'discarded', 'cancelled')) = (new.ended_at is not null)
            and (new.state not in ('executing', 'completed') or new.attempt_id is not null)
            and new.failure_mode in ('halt_pipeline', 'skip_dependents', 'continue') and new.generation >= 1) then
        raise check_violation using message = 'a step is not as steps are (check): state, scheduled_at, ended_at, attempt_id';
    end if;
    return new;
end $$;
create trigger guard before insert or update on stepfast.steps for each row execute function stepfast.guard_step();

-- What an ended attempt recorded stands: an output is an immutable row of its attempt. One exception: a lost attempt whose
-- outcome is unknown may still confirm it (complete_v1).
create function stepfast.guard_attempt() returns trigger language plpgsql as $$
begin
    if tg_op = 'UPDATE' and old.state <> 'executing' and not (old.state = 'lost' and new.state = 'completed') then
        raise exception 'attempt % is ended and may not change', old.id using errcode = 'SF100';
    end if;
    if not (new.state in ('executing', 'completed', 'failed', 'lost', 'suspended')
            and (new.state = 'executing') = (new.ended_at is null)
            and (new.state = 'completed') = (new.output is not null)
            and (new.state in ('failed', 'lost')) = (new.error is not null)
            and (new.worker_id is not null or new.decided_by is not null)) then
        raise check_violation using message = 'an attempt is not as attempts are (check): state, ended_at, output, error';
    end if;
    return new;
end $$;
create trigger guard before insert or update on stepfast.attempts for each row execute function stepfast.guard_attempt();

create function stepfast.guard_key() returns trigger language plpgsql as $$
begin
    if not (new.state in ('reserved', 'completed', 'unknown')
            and (new.state = 'reserved') = (new.ended_at is null)
            and (new.output is null or new.state = 'completed')
            and (new.output is null) = (new.output_hash is null)) then
        raise check_violation using message = 'a key is not as keys are (check): state, ended_at, output';
    end if;
    return new;
end $$;
create trigger guard before insert or update on stepfast.keys for each row execute function stepfast.guard_key();
