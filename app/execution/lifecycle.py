"""What happens when a worker starts and stops: refuse to start unready, sweep while it lives, say goodbye."""

import sys
from typing import Any

from celery import signals
from celery.concurrency.prefork import TaskPool as PreforkPool

from app import settings
from app.errors import StepfastError
from app.execution import stopping, tracing, worker
from app.execution.rescue import Sweeper
from app.observe import traces
from app.pipelines.model import Queue

_sweepers: list[Sweeper] = []


def connect() -> None:
    """Connects to Celery's signals. Calling it again changes nothing."""
    signals.worker_init.connect(_refuse_unready, weak=False, dispatch_uid="stepfast-unready")
    signals.celeryd_after_setup.connect(_warm_up, weak=False, dispatch_uid="stepfast-warm-up")
    signals.worker_ready.connect(_start_sweeping, weak=False, dispatch_uid="stepfast-sweep")
    signals.worker_shutting_down.connect(stopping.begin, weak=False, dispatch_uid="stepfast-stop")
    signals.worker_shutdown.connect(_leave, weak=False, dispatch_uid="stepfast-leave")
    signals.worker_process_shutdown.connect(_leave_process, weak=False, dispatch_uid="stepfast-leave-process")
    signals.task_prerun.connect(stopping.leave_it_to_the_parent, weak=False, dispatch_uid="stepfast-child")


def _refuse_unready(**_: Any) -> None:  # noqa: ANN401  # Celery's signals pass what they like
    """A worker without its database would take messages that it cannot serve."""
    try:
        worker.Worker(settings.load()).stop()
    except StepfastError as error:
        print(error, file=sys.stderr)  # noqa: T201  # before the logs are set up
        raise SystemExit(error.exit_code) from error


def _warm_up(instance: Any, **_: Any) -> None:  # noqa: ANN401
    """What comes before any fork. The SDK takes two seconds to import: not out of the first agent's own time."""
    if set(instance.app.amqp.queues.consume_from) - {Queue.HANDLERS}:
        from app.agents import claude

        claude.warm_up()
    if traces.reachable(settings.load()):
        traces.warm_up()
    if issubclass(instance.pool_cls, PreforkPool):
        _be_a_parent(instance)


def _be_a_parent(instance: Any) -> None:  # noqa: ANN401
    """Registers this process, whose children then know it, and has it look after them."""
    parent = worker.current()
    # There is no pool before it starts, nor after it stopped.
    parent.children.pool = lambda: [process.pid for process in getattr(instance.pool._pool, "_pool", ())]  # noqa: SLF001
    _ = parent.worker_id


def _start_sweeping(**_: Any) -> None:  # noqa: ANN401
    sweeper = Sweeper(worker.current, settings.load().sweep_s)
    sweeper.start()
    _sweepers.append(sweeper)
    tracing.start(worker.current, settings.load())


def _leave(**_: Any) -> None:  # noqa: ANN401
    stopping.end()
    for sweeper in _sweepers:
        sweeper.stop()
    _sweepers.clear()
    tracing.stop()
    worker.stop()


def _leave_process(**_: Any) -> None:  # noqa: ANN401
    tracing.stop()
    worker.stop()
