import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from app.flower.setup import TASK_VALUE_MAX_BYTES, format_task
from app.settings import ROOT

CONFIG = ROOT / "app" / "flower" / "config.py"
SECRET = "hunter2planted"
APP = f"""
from celery import Celery
from app import settings
from app.observe import celery_signals

app = Celery("watched", broker="memory://:{SECRET}@localhost//", set_as_current=True)
celery_signals.connect(settings.parse({{}}))
"""
# Two seconds after the start an object is dropped, and the signal finds Flower in its destructor.
IN_A_DESTRUCTOR = """
import signal
from tornado.ioloop import IOLoop

class Signalled:
    def __del__(self):
        signal.raise_signal({ending})
        print("in the destructor", flush=True)

IOLoop.current().call_later(2, Signalled)
"""


@pytest.fixture
def start(tmp_path):
    """Starts a real Flower with our configuration and more options, in a folder of its own."""
    (tmp_path / "watched.py").write_text(APP)
    started = []

    def start(*options, **env):
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "watched", "flower", f"--conf={CONFIG}", "--port=0", *options],
            cwd=tmp_path,
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}",
                "HOME": str(tmp_path),
                **env,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def read_until(flower, pattern: str) -> tuple[str, list[dict]]:
    """Reads Flower's lines until one has the pattern in its message, and gives what the pattern's group found."""
    seen = []
    for line in flower.stdout:
        seen.append(json.loads(line))
        found = re.search(pattern, seen[-1]["message"])
        if found:
            return found[1], seen
    raise AssertionError(seen)


def address_of(flower) -> str:
    return read_until(flower, r"Visit me at (http://\S+)")[0]


def listens_on(pid: int) -> set[str]:
    """The local addresses, as the kernel writes them, of the sockets on which a process listens."""
    inodes = {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()}
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes}


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def test_flower_listens_on_this_machine_only_and_writes_our_lines(start):
    """Flower with our configuration binds to the loopback, and each of its lines is ours, without queries or secrets."""
    flower = start()
    address, lines = read_until(flower, r"Visit me at (http://\S+)")
    if sys.platform == "linux":
        assert listens_on(flower.pid) == {"0100007F"}
    assert status_of(f"{address}/workers?token={SECRET}") == 200
    assert status_of(f"{address}/nowhere?code={SECRET}") == 404
    assert status_of(f"{address}/metrics") == 200
    lines += read_until(flower, "(GET /metrics)")[1]  # a request's line is written after its answer
    flower.send_signal(signal.SIGTERM)
    output, _ = flower.communicate(timeout=30)
    lines += [json.loads(line) for line in output.splitlines()]
    assert flower.returncode == 0
    assert SECRET not in json.dumps(lines)
    assert {line["event"] for line in lines} == {"library"}
    requests = [line for line in lines if line["logger"] == "flower.access"]
    assert [(line["level"], line["message"].rsplit(" ", 2)[0]) for line in requests] == [
        ("info", "GET /workers 200"),
        ("warning", "GET /nowhere 404"),
        ("info", "GET /metrics 200"),
    ]


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_flower_ends_wherever_the_signal_finds_it(start, tmp_path, ending):
    """Also in a destructor, in which Python drops what Flower's own handlers raise."""
    with (tmp_path / "watched.py").open("a") as watched:
        watched.write(IN_A_DESTRUCTOR.format(ending=int(ending)))
    flower = start()
    output, _ = flower.communicate(timeout=60)
    assert "in the destructor" in output
    assert flower.returncode == 0


@pytest.mark.parametrize(
    ("options", "env"),
    [
        (["--address=0.0.0.0"], {}),
        (["--address=::", "--auth_provider=flower.views.auth.GoogleAuth2LoginHandler"], {}),
        (["--address=flower.example"], {}),
        ([], {"FLOWER_ADDRESS": "0.0.0.0", "FLOWER_UNAUTHENTICATED_API": "true"}),
        (["--address=0.0.0.0", "--basic_auth="], {}),
        ([], {"FLOWER_ADDRESS": "0.0.0.0", "FLOWER_BASIC_AUTH": "ann:secret,"}),
        (["--basic_auth=ann:"], {}),
    ],
)
def test_flower_refuses_to_be_open_to_everyone(start, options, env):
    """An address that others can reach needs a login, and an empty one is none: Flower ends with one sentence."""
    flower = start(*options, **env)
    output, _ = flower.communicate(timeout=60)
    assert flower.returncode == 1
    (sentence,) = output.splitlines()
    assert re.match("Flower would listen on |Flower's --basic_auth holds", sentence)
    assert "secret" not in sentence


def test_an_empty_address_is_the_loopback(start):
    """`--address=`, which means every interface to Flower, means the loopback here."""
    flower = start("--address=")
    address_of(flower)
    if sys.platform == "linux":
        assert listens_on(flower.pid) == {"0100007F"}


def test_flower_may_be_reached_with_a_login(start):
    """With a login any address is allowed, and the pages ask for it."""
    flower = start("--address=0.0.0.0", "--basic_auth=me:secret")
    address = address_of(flower)
    assert status_of(f"{address.replace('0.0.0.0', '127.0.0.1')}/workers") == 401


def test_pages_show_short_texts_without_secrets():
    """What Flower's pages show of a task is redacted and short; what is absent stays absent."""
    task = SimpleNamespace(
        args=f"('x', 'token={SECRET}')",
        kwargs=f"{{'password': '{SECRET}'}}",
        result="x" * 1_000_000,
        exception=None,
        traceback=f"Traceback …\nValueError: password={SECRET}",
        name="shop.coder",
    )
    shown = format_task(task)
    assert SECRET not in str(vars(shown))
    assert len(shown.result) <= TASK_VALUE_MAX_BYTES
    assert (shown.exception, shown.name) == (None, "shop.coder")
    # A run's input, in which the schema alone knows what is sensitive.
    task.name, task.args, task.kwargs = "stepfast.start", "('shop', {'patient': 'Ada'})", "{'run_input': 'Ada'}"
    assert "Ada" not in str(vars(format_task(task)))
