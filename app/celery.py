"""Builds the Celery app; nothing else."""

import os
from importlib.util import module_from_spec, spec_from_file_location

from app import crashpoints, settings
from app.execution import lifecycle, messages, queues, redis_channel, sending, task_events
from app.observe import celery_signals

# Celery reads these itself, before its configuration: another application's broker must not become ours.
for _name in ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND"):
    os.environ.pop(_name, None)

# By its place: a folder that a worker or a command is started from may hold a celeryconfig.py of its own.
_spec = spec_from_file_location("stepfast_celeryconfig", settings.ROOT / "celeryconfig.py")
assert _spec is not None
assert _spec.loader is not None
_config = module_from_spec(_spec)
_spec.loader.exec_module(_config)

crashpoints.use(settings.load().crash_points)
redis_channel.mend()
celery = sending.StepCelery("stepfast", amqp=queues.StepAMQP, events=task_events.TaskEvents)
celery.config_from_object(_config)
celery.steps["consumer"].add(task_events.SendWhatWaits)
celery.set_default()
celery_signals.connect(settings.load())
lifecycle.connect()
messages.connect()
