"""Celery's signals that concern the logs."""

import logging
from typing import Any

from celery import signals

from app import events
from app.observe import logs
from app.settings import Settings


def connect(settings: Settings) -> None:
    """Makes Celery's processes log by our rules, and each task begin with nothing bound."""

    def set_up_worker(instance: Any, **_: object) -> None:  # noqa: ANN401  # Celery's worker has no type
        logs.setup(settings)  # before Celery asks for it, so that its first warning is a line too
        _silence(instance)

    def set_up(**_: object) -> None:
        from billiard.util import get_logger

        logs.setup(settings)
        # The pool of processes keeps its lines from the root logger, and Python then prints them as they are.
        get_logger().propagate = True

    # Celery leaves logging alone where `setup_logging` has a receiver. Closures would vanish from a weak reference.
    signals.setup_logging.connect(set_up, weak=False, dispatch_uid="stepfast.logs")
    signals.celeryd_init.connect(set_up_worker, weak=False, dispatch_uid="stepfast.worker_logs")
    signals.task_prerun.connect(lambda **_: events.clear(), weak=False, dispatch_uid="stepfast.clear")


def _silence(worker: Any) -> None:  # noqa: ANN401
    """A worker prints a banner as it starts, and sentences as it stops: no banner, and the sentences become lines."""
    from celery.apps import worker as celery_worker

    def log(sentence: str, _stream: object = None) -> None:
        logging.getLogger("celery.apps.worker").info(sentence)

    worker.quiet = True
    celery_worker.safe_say = log
