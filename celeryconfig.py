"""Celery's configuration. Each value has its reason."""

from app.execution.queues import step_queue
from app.settings import load

broker_url = load().need_broker()
# Steps keep their results in Postgres; a second store would be a second truth, and a round trip a step.
result_backend = None
task_ignore_result = True

# JSON only: a broker that somebody else can write to must not make a worker unpickle.
task_serializer = "json"
accept_content = ["json"]

# A message is acknowledged after its step's commit. A doubled message does no harm: the claim refuses it.
task_acks_late = True
task_reject_on_worker_lost = True
# Celery's own redelivery is not how steps are recovered: a sweep from Postgres is, and on Redis their messages are not
# even written down as taken (app/execution/redis_channel.py). But `stepfast.start` has nothing in Postgres yet: where a
# worker died with it, it comes back after this long.
broker_transport_options = {
    "visibility_timeout": 300,
    "socket_connect_timeout": 3,
    "socket_timeout": 10,
    "socket_keepalive": True,
}

# No more messages than can be worked on: a waiting message stays where another worker can take it.
worker_prefetch_multiplier = 1
# Leave our own logging alone.
worker_hijack_root_logger = False
worker_redirect_stdouts = False
# Flower shows what these send.
worker_send_task_events = True
task_send_sent_event = True

# A broker that is away is tried briefly: the step is safe in Postgres, and the sweep sends what was not sent.
task_publish_retry = True
task_publish_retry_policy = {"max_retries": 1, "interval_start": 0.1, "interval_max": 0.2}
broker_connection_timeout = 3
broker_connection_retry_on_startup = True
broker_connection_max_retries = None

# What a worker serves that names no queue. A skill file may name others; app/execution/queues.py makes all alike.
task_queues = [step_queue("agents"), step_queue("handlers")]
task_default_queue = "agents"

# Quorum queues know no global prefetch; Celery turns it off when it sees them.
worker_detect_quorum_queues = True

imports = ("app.execution.tasks", "app.start_task")
task_routes = {"stepfast.start": {"queue": "agents"}, "stepfast.dispatch": {"queue": "agents"}}
timezone = "UTC"
# One reply queue a worker for remote control; Flower needs it.
worker_enable_remote_control = True
