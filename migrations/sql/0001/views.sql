-- What other applications read. Columns may be added; what is here keeps its name and meaning.
-- No view but v_outputs holds what agents were given or put out: error texts were redacted when they were stored, and so was
-- what a person is shown before a decision (v_approvals.shown). A run's input is in none: who started the run knows it.

-- The definition that new runs of a name take.
create view stepfast.v_pipelines as
select n.name, p.version, p.hash, p.definition->'input_schema' as input_schema, n.moved_at
from stepfast.pipeline_names n join stepfast.pipelines p on p.hash = n.hash;

-- Left join: a count of runs then need not look at the definitions.
create view stepfast.v_runs as
select r.id, r.tenant, r.pipeline, p.version, r.pipeline_hash, r.state, r.partial, r.key, r.labels, r.priority, r.deadline_at,
       r.created_at, r.started_at, r.ended_at,
       (select count(*) from stepfast.steps s where s.run_id = r.id) as steps,
       (select count(*) from stepfast.steps s where s.run_id = r.id and s.state = 'completed') as completed,
       (select sum(a.cost_usd) from stepfast.attempts a where a.run_id = r.id) as cost_usd
from stepfast.runs r left join stepfast.pipelines p on p.hash = r.pipeline_hash;

create view stepfast.v_steps as
select concat_ws('/', s.run_id, s.agent, nullif(s.item, '')) as id, s.run_id, s.agent, s.item, s.state, s.generation,
       s.depends_on, s.failure_mode, s.queue, s.attempt_id, s.attempts, s.failures, s.worker_losses, s.waits, s.scheduled_at,
       s.sent_at, s.ended_at
from stepfast.steps s;

create view stepfast.v_attempts as
select a.id, a.run_id, a.agent, a.item, a.generation, a.number, a.state, w.host, w.pid, a.decided_by, a.reused_from, a.model,
       (a.usage->>'input_tokens')::bigint as input_tokens, (a.usage->>'output_tokens')::bigint as output_tokens, a.cost_usd,
       a.started_at, a.ended_at, a.error->>'code' as error_code, a.error->>'who' as error_who,
       a.error->>'message' as error_message, a.error->>'next_step' as error_next_step, a.error_fingerprint
from stepfast.attempts a left join stepfast.workers w on w.id = a.worker_id;

-- The outputs that count, of completed steps.
create view stepfast.v_outputs as
select s.run_id, s.agent, s.item, s.generation, a.output
from stepfast.steps s join stepfast.attempts a on a.run_id = s.run_id and a.id = s.attempt_id
where s.state = 'completed';

create view stepfast.v_events as
select concat_ws('/', e.run_id, e.seq) as id, e.run_id, e.seq, e.name, e.at, e.agent, e.item, e.generation, e.attempt_id, e.data
from stepfast.events e;

create view stepfast.v_approvals as
select a.id, a.run_id, r.pipeline, a.agent, a.item, a.generation, a.digest, a.shown, a.state, a.requested_at, a.expires_at,
       a.decided_at, a.decided_by, a.reason
from stepfast.approvals a join stepfast.runs r on r.id = a.run_id;

create view stepfast.v_dead_letters as
select d.id, d.run_id, r.pipeline, d.agent, d.item, d.generation, d.attempt_id, d.code, d.payload->>'message' as message,
       d.payload->>'next_step' as next_step, d.error_fingerprint, d.created_at, d.published_at, d.resolved_at, d.resolution,
       d.resolved_by
from stepfast.dead_letters d join stepfast.runs r on r.id = d.run_id;

create view stepfast.v_requests as
select q.id, q.run_id, q.action, q.agent, q.digest, q.requested_by, q.login, q.reason, q.state, q.requested_at, q.ended_at,
       q.answer
from stepfast.requests q;

-- Of each run that failed or ended in part the open dead letter that decides, and in `held` why a plain resume would not help: a code that none
-- mends (`NOT_BY_RESUME` in app/runs/explain.py: a test compares), or a decision of a person that it would override.
create view stepfast.v_failed_runs as
select r.id, r.pipeline, r.created_at, r.ended_at, d.agent, d.code, d.error_fingerprint, d.message,
       case when d.never then d.code
            when exists (select from stepfast.steps s where s.run_id = r.id and s.state = 'cancelled') then 'rejected'
            when exists (select from stepfast.steps s where s.run_id = r.id and s.state = 'discarded' and not exists (
                select from stepfast.dead_letters o
                where o.run_id = s.run_id and o.agent = s.agent and o.item = s.item and o.resolved_at is null))
            then 'letter_discarded' end as held
from stepfast.runs r left join lateral (
    select l.agent, l.code, l.error_fingerprint, l.payload->>'message' as message, l.code = any (array[
        'author_mistake', 'gate_refused', 'invalid_input', 'model_refused', 'outcome_unknown', 'snapshot_too_old']) as never
    from stepfast.dead_letters l where l.run_id = r.id and l.resolved_at is null
    order by never desc, l.created_at, l.agent limit 1) d on true
where r.state = 'failed' or (r.partial and exists (
    select from stepfast.steps s where s.run_id = r.id and s.state in ('discarded', 'cancelled')));
