"""One message after a commit, so that a run starts at once. Nothing depends on it: the workers' sweep comes within 2 s.

A thread of its own sends it. The host's thread never waits for a broker, whether that is away, slow, or takes
connections and never answers.
"""

import atexit
import logging
import os
import queue
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import uuid4

if TYPE_CHECKING:
    from kombu.connection import Connection

TASK = "stepfast.dispatch"
QUEUE = "agents"
# What is older is of no use: the sweep was there.
USEFUL_S = 1.0
WAITING_MAX = 1_000
# How long a process that ends waits for what is not sent yet.
EXIT_MS = 50

_log = logging.getLogger("stepfast")


class Sender:
    """To one broker: its URL, or a Celery app that shares Stepfast's broker."""

    def __init__(self, broker: Any) -> None:  # noqa: ANN401  # a Celery app, which is untyped
        self._broker = broker
        self._waiting: queue.Queue[tuple[float, str]] = queue.Queue(WAITING_MAX)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def send(self, run_id: str) -> None:
        """Never waits, and never raises: what cannot be sent is left to the sweep."""
        try:
            self._start()
            self._waiting.put_nowait((time.monotonic(), run_id))
        except (queue.Full, RuntimeError) as error:  # RuntimeError: the process ends, and takes no new thread
            _log.info("Run %s is left to the sweep: %s.", run_id, error or type(error).__name__)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="stepfast-sender", daemon=True)
                self._thread.start()
                atexit.register(self.flush)

    def flush(self) -> None:
        """Waits until all is sent, or given up, for at most EXIT_MS."""
        done = self._waiting.all_tasks_done
        with done:
            done.wait_for(lambda: not self._waiting.unfinished_tasks, timeout=EXIT_MS / 1000)

    def _run(self) -> None:
        connection: Connection | None = None
        while True:
            since_s, run_id = self._waiting.get()
            try:
                if time.monotonic() - since_s < USEFUL_S:
                    connection = connection or self._connect()
                    _publish(connection, run_id)
            except Exception as error:  # noqa: BLE001  # each transport raises errors of its own library
                _log.info("Run %s is left to the sweep: %s.", run_id, error)
                _drop(connection)
                connection = None
            finally:
                self._waiting.task_done()

    def _connect(self) -> "Connection":
        if not isinstance(self._broker, str):
            return self._broker.connection_for_write(connect_timeout=USEFUL_S)  # type: ignore[no-any-return]
        from kombu.connection import Connection

        if self._broker.startswith("redis"):
            limits = {"socket_timeout": USEFUL_S, "socket_connect_timeout": USEFUL_S}
        else:
            limits = {"read_timeout": USEFUL_S, "write_timeout": USEFUL_S}
        return Connection(self._broker, connect_timeout=USEFUL_S, transport_options=limits)


def _publish(connection: "Connection", run_id: str) -> None:
    """Celery's message, made by hand: a host needs no Celery, and must not declare Stepfast's queues in its own way."""
    task_id = str(uuid4())
    headers: dict[str, Any] = {
        "lang": "py",
        "task": TASK,
        "id": task_id,
        "root_id": task_id,
        "parent_id": None,
        "group": None,
    }
    headers |= {"retries": 0, "eta": None, "expires": None, "timelimit": [None, None], "ignore_result": True}
    headers |= {"argsrepr": f"('{run_id}',)", "kwargsrepr": "{}", "origin": f"stepfast-client-{os.getpid()}"}
    body: tuple[Any, ...] = ((run_id,), {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None})
    connection.Producer(connection.default_channel).publish(
        body,
        exchange="",
        routing_key=QUEUE,
        serializer="json",
        headers=headers,
        correlation_id=task_id,
        delivery_mode=1,
        retry=False,
    )


def _drop(connection: "Connection | None") -> None:
    if connection is not None:
        with suppress(Exception):  # it was broken before
            connection.release()


_senders: dict[Any, Sender] = {}


def sender(broker: Any) -> Sender:  # noqa: ANN401
    """The sender of this process to a broker."""
    return _senders.setdefault(broker, Sender(broker))


# A child has neither its parent's threads nor a right to its connections.
os.register_at_fork(after_in_child=_senders.clear)
