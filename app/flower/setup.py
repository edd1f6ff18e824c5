"""What Stepfast changes about Flower: our logs, no open door, and no long or secret texts on its pages."""

import asyncio
import ipaddress
import logging
import signal
import sys
from typing import Any

from flower.urls import settings as tornado_settings
from tornado.ioloop import IOLoop
from tornado.options import options
from tornado.web import RequestHandler

from app import settings
from app.observe import logs
from app.redaction import capped

LOOPBACK = "127.0.0.1"
TASK_VALUE_MAX_BYTES = 1_024

_access_log = logging.getLogger("flower.access")


def prepare() -> None:
    """Called while Flower reads its options; what the command line says after the file is judged by the callback."""
    logs.setup(settings.load())
    options.logging = "none"  # or Tornado adds a handler of its own
    options.add_parse_callback(require_safe_address)
    tornado_settings["log_function"] = log_request
    IOLoop.current().add_callback(_end_between_callbacks)


def _end_between_callbacks() -> None:
    """Called once the loop runs, and so after Flower set its own handlers.

    Those raise wherever the signal finds them. Where that is a destructor, Python drops the error, and Flower stays.
    """
    for ending in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(ending, IOLoop.current().stop)


def require_safe_address() -> None:
    """Binds to the loopback unless told otherwise; ends the process where anybody could reach Flower without a login.

    Flower listens on every interface by default, to everyone. `auth_provider` alone protects nothing: Flower asks for
    a login only where `auth` (who may enter) or `basic_auth` is set; an empty `basic_auth`, as an unset variable makes
    it, lets in whoever sends an empty one.
    """
    if not options.address:
        options.address = LOOPBACK
    if not all(name and password for name, _, password in (login.partition(":") for login in options.basic_auth or ())):
        sys.exit("Flower's --basic_auth holds a login without a name or without a password: write name:password.")
    if options.unix_socket or options.basic_auth or options.auth or is_loopback(options.address):
        return
    sys.exit(
        f"Flower would listen on {options.address} without a login: set --basic_auth or --auth, or drop --address."
    )


def is_loopback(address: str) -> bool:
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def log_request(handler: RequestHandler) -> None:
    """One library line for each request, without its query, which may hold a login's code."""
    status, request = handler.get_status(), handler.request
    level = logging.INFO if status < 400 else logging.WARNING if status < 500 else logging.ERROR
    _access_log.log(level, "%s %s %d %.0f ms", request.method, request.path, status, request.request_time() * 1000)


def format_task(task: Any) -> Any:  # noqa: ANN401  # Flower's copy of a task, without a type
    """Flower's hook for what its pages show of a task.

    The arguments of `stepfast.start` are a run's input, whose schema alone says what is sensitive in it.
    """
    if task.name == "stepfast.start":
        task.args, task.kwargs = "[redacted]", "[redacted]"
    for name in ("args", "kwargs", "result", "exception", "traceback"):
        value = getattr(task, name)
        if value is not None:
            setattr(task, name, capped(value, TASK_VALUE_MAX_BYTES))
    return task
