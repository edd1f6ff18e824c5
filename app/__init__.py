"""Stepfast: a Celery chain of agents, resumable. Its rooms, in reading order; imports run from below to above.

settings, errors, clock, events, redaction, words    leaves: no room below them
pipelines/       WHAT SHOULD HAPPEN (pure): from a skill file to a definition; its plan, gates and templates
runs/            WHAT HAS HAPPENED: states, and the only code that speaks to Postgres (with migrations/sql)
agents/          THE OUTSIDE WORLD: Claude, Python handlers, the bundled deployer
execution/       DOING ONE STEP: executor is its story; canvas and tasks are Celery's side; rescue is the sweep
operations       publish, start, resume, decide, …: what every entry point calls
celery, start_task, cli/, flower/                    entry points
observe/, embedded, simulator/                       logs; the servers and the Claude of demos and tests

In five minutes: `runs/states` → `pipelines/plan` → `execution/executor` → `operations`. ARCHITECTURE.md says why.
"""
