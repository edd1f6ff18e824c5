"""A real Flower with our configuration, as a process, and plain requests to it."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64encode
from contextlib import contextmanager
from dataclasses import dataclass

from conftest import ROOT

CONFIG = ROOT / "app" / "flower" / "config.py"
LOGIN = "ann:secret"


@dataclass(frozen=True)
class Reply:
    status: int
    text: str
    headers: dict[str, str]

    @property
    def json(self):
        return json.loads(self.text)


class _Unfollowed(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


class Visitor:
    """A program that talks to Flower: it keeps cookies, sends what it is told to, and follows no redirect."""

    def __init__(self, url: str, login: str | None = None) -> None:
        self.url = url
        self._headers = {"Authorization": "Basic " + b64encode(login.encode()).decode()} if login else {}
        self._cookies = urllib.request.HTTPCookieProcessor()
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _Unfollowed(), self._cookies)

    @property
    def token(self) -> str:
        return next((cookie.value for cookie in self._cookies.cookiejar if cookie.name == "_xsrf"), "")

    def get(self, path: str, **headers: str) -> Reply:
        return self._open(urllib.request.Request(self.url + path, headers=self._headers | headers))

    def post(self, path: str, fields: dict[str, str], **headers: str) -> Reply:
        body = urllib.parse.urlencode(fields).encode()
        return self._open(urllib.request.Request(self.url + path, data=body, headers=self._headers | headers))

    def _open(self, request: urllib.request.Request) -> Reply:
        try:
            with self._opener.open(request, timeout=30) as answer:
                return Reply(answer.status, answer.read().decode(), dict(answer.headers))
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, error.read().decode(), dict(error.headers))


@contextmanager
def flower(environ: dict[str, str], *options: str):
    """Yields Flower's address, once it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "app", "flower", f"--conf={CONFIG}", "--port=0", *options],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen = []
    try:
        for line in process.stdout:
            seen.append(line)
            if found := re.search(r"Visit me at (http://[^\s\"\\]+)", line):
                break
        else:
            raise AssertionError("".join(seen))
        yield found[1].rstrip("/")
    finally:
        process.kill()
        process.communicate()
