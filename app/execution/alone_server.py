"""What the fork server of `alone` imports before it forks: all that a step may need. No thread and no connection.

A platform that stops a worker may send SIGTERM to every process of it, and a terminal SIGINT. It is the worker that
decides what is finished: neither this process nor what it forks listens.
"""

import gc
import signal

import psycopg
from sqlalchemy.dialects.postgresql import psycopg as dialect

from app import settings
from app.agents import claude, handlers
from app.execution import alone
from app.observe import logs, traces

__all__ = ["alone", "claude", "dialect", "handlers", "logs", "psycopg"]


def _leave_it_to_the_worker(_number: int, _frame: object) -> None:
    pass


# A function and not SIG_IGN, which what a handler starts would inherit.
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, _leave_it_to_the_worker)
claude.warm_up()
if traces.reachable(settings.load()):
    traces.warm_up()
gc.freeze()  # what is never looked at again is never copied
