"""Who may come in: what our pages and our API have in common. Locked by default.

A login where Flower has one; where it has none, only this machine, by a name of this machine. Nothing is written
without a token of this site, nor with --read-only. Postgres is asked beside Tornado's loop, by a few at a time.
"""

import asyncio
from base64 import b64decode
from typing import TYPE_CHECKING, Any, TypeVar

from flower.api import BaseApiHandler
from flower.views import BaseHandler
from tornado import web

from app import settings
from app.errors import Misuse, NotPossible, NotReady, StepfastError, UnknownName
from app.execution import worker
from app.flower.setup import is_loopback
from app.runs.database import readiness
from app.words import cut, one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from app.execution.worker import Worker

# Flower's executor has at least five threads, which its own questions to workers need too.
QUESTIONS_AT_ONCE_MAX = 3
QUESTIONS_WAITING_MAX = 20
# Of one input, output or detail in the API's answer.
API_VALUE_MAX_BYTES = 65_536
PERSON_MAX_CHARS = 200
NOBODY = "somebody at Flower, without a login"

# Nothing but our own and Flower's files; no inline script, no frame, no form to elsewhere.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_STATUS = ((UnknownName, 404), (NotPossible, 409), (Misuse, 400), (NotReady, 503))

_asking = asyncio.Semaphore(QUESTIONS_AT_ONCE_MAX)
_waiting = 0
_Answer = TypeVar("_Answer")


class Door(BaseHandler):
    def set_default_headers(self) -> None:
        super().set_default_headers()
        # FLOWER_UNAUTHENTICATED_API lets every site read Flower's own pages: not ours.
        self.clear_header("Access-Control-Allow-Origin")
        self.set_header("Content-Security-Policy", CONTENT_SECURITY_POLICY)
        self.set_header("Referrer-Policy", "same-origin")
        self.set_header("Cache-Control", "no-store")

    @web.authenticated
    def prepare(self) -> None:
        options = self.application.options
        if not self.has_login and not is_loopback(self.request.host_name.strip("[]")):
            # A site may give its own name this machine's address, and would be same-origin with us.
            raise web.HTTPError(403, "Without a login Flower answers as localhost only: set --basic_auth or --auth.")
        if options.read_only and self.request.method not in {"GET", "HEAD", "OPTIONS"}:
            raise web.HTTPError(403, "Flower runs with --read-only.")

    def check_xsrf_cookie(self) -> None:
        super().check_xsrf_cookie()
        # Flower leaves it out where there is no cookie of a session; a browser sends a password by itself, too.
        web.RequestHandler.check_xsrf_cookie(self)

    @property
    def has_login(self) -> bool:
        return bool(self.application.options.basic_auth or self.application.options.auth)

    @property
    def person(self) -> str:
        """Who acts, for the record. The password was checked before."""
        name = self.current_user if isinstance(self.current_user, str) else NOBODY
        if name is NOBODY and self.application.options.basic_auth:
            credentials = b64decode(self.request.headers["Authorization"].split()[1])
            name = credentials.decode().partition(":")[0]
        return cut(one_line(name), PERSON_MAX_CHARS)

    async def ask(self, question: "Callable[[Worker], _Answer]") -> _Answer:
        """What Postgres answers. Raises HTTPError with the sentence of what is wrong."""
        global _waiting  # noqa: PLW0603  # of the one loop of this process
        if _waiting >= QUESTIONS_WAITING_MAX:
            raise web.HTTPError(503, "Too many questions wait for Postgres. Try again in a moment.")
        _waiting += 1
        try:
            async with _asking:
                return await asyncio.get_running_loop().run_in_executor(None, _answer, question)
        except StepfastError as error:
            status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
            raise web.HTTPError(status, str(error)) from error
        finally:
            _waiting -= 1


def _answer(question: "Callable[[Worker], _Answer]") -> _Answer:
    settings.load().need_broker()
    with readiness():
        return question(worker.current())


class Api(Door, BaseApiHandler):
    def prepare(self) -> None:
        BaseApiHandler.prepare(self)  # 401 where nobody can log in
        super().prepare()


class Page(Door):
    def write_error(self, status_code: int, **kwargs: Any) -> None:  # noqa: ANN401  # Tornado's
        """A sentence of ours on a page of ours; anything else as Flower does."""
        error = kwargs.get("exc_info", (None, None))[1]
        if not isinstance(error, web.HTTPError) or status_code == 401:
            super().write_error(status_code, **kwargs)
            return
        if not hasattr(self, "_current_user"):
            self.current_user = None  # the login is not asked again
        self.render("problem.html", status=status_code, sentence=one_line(error.get_message() or error.reason or ""))
