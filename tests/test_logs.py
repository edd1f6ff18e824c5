import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import uuid
import warnings

import pytest
import structlog
from conftest import eventually

from app import events, operations
from app.events import Event, bound, emit
from app.observe import logs
from app.settings import ROOT, Settings

SECRET = "hunter2planted"
KEY = "sk-ant-api03-planted-0123456789"
URL = f"postgresql://stepfast:{SECRET}@db/x"


@pytest.fixture
def out():
    stream = io.StringIO()
    logs.setup(Settings(), stream)
    return stream


def lines(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_every_event_has_a_level():
    """The table of levels names each event, and nothing else."""
    assert set(logs.LEVELS) == set(Event)


@pytest.mark.parametrize("event", list(Event))
def test_an_event_is_one_line_of_json_under_its_own_name(event):
    """Each event is a line: time, level, name, then the ids in a fixed order, then its fields."""
    stream = io.StringIO()
    logs.setup(Settings(log_level="debug"), stream)
    run_id = uuid.uuid4()
    emit(event, zeta=1, pipeline="shop", attempt_id="a1", agent="coder", run_id=run_id, alpha=[1, {"b": None}])
    (line,) = lines(stream)
    assert list(line) == ["timestamp", "level", "event", *logs.IDS, "zeta", "alpha"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["timestamp"])
    assert line["level"] == logging.getLevelName(logs.LEVELS[event]).lower()
    assert line["event"] == event.value
    assert line["run_id"] == str(run_id)
    assert line["trace_id"] == run_id.hex
    assert line["alpha"] == [1, {"b": None}]


def test_an_event_below_the_level_is_not_written():
    """`log_level` holds for our events, and a field `level` raises or lowers what somebody else logged."""
    stream = io.StringIO()
    logs.setup(Settings(log_level="warning"), stream)
    emit(Event.STEP_CLAIMED)
    emit(Event.STEP_DISCARDED)
    emit(Event.HANDLER_LOG, message="quiet")
    emit(Event.HANDLER_LOG, message="loud", level="error")
    assert [(line["event"], line["level"]) for line in lines(stream)] == [
        ("step.discarded", "error"),
        ("handler.log", "error"),
    ]


def test_bound_ids_appear_until_they_are_cleared(out):
    """What is bound stands in every line, a library's too, and in none after."""
    library = logging.getLogger("kombu")
    with bound(run_id="4f9c-1", agent="coder"):
        emit(Event.STEP_CLAIMED)
        library.warning("inside")
    library.warning("outside")
    with bound(run_id="leaked"):
        events.clear()
        emit(Event.STEP_CLAIMED)
    inside, library_inside, outside, cleared = lines(out)
    for line in (inside, library_inside):
        assert (line["run_id"], line["agent"], line["trace_id"]) == ("4f9c-1", "coder", "4f9c1")
    assert "run_id" not in outside
    assert "run_id" not in cleared


def test_fields_cannot_replace_the_head_of_a_line(out):
    """A field that is named like the head of a line neither replaces it nor loses the line."""
    emit(Event.STEP_CLAIMED, timestamp="never", event="mine", method_name="m", fields={"a": 1}, self=1)
    (line,) = lines(out)
    assert line["event"] == "step.claimed"
    assert line["timestamp"] != "never"
    assert (line["method_name"], line["fields"], line["self"]) == ("m", {"a": 1}, 1)


def raise_with_secrets():
    try:
        raise ConnectionError(f"cannot reach {URL}")
    except ConnectionError as error:
        raise ValueError(f"password={SECRET} key {KEY}") from error


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_planted_secret_reaches_a_line(log_format):
    """Secrets in fields, nested values, errors, URLs, libraries' lines, warnings and dead threads are all hidden."""
    stream = io.StringIO()
    logs.setup(Settings(log_format=log_format), stream)
    emit(Event.STEP_DEFERRED, password=SECRET, reason=f"token={SECRET}", url=URL)
    emit(Event.STEP_OUTPUT, output={"a": [{"api_key": SECRET}, KEY, (KEY,), KEY.encode()]}, error=ValueError(KEY))
    emit(Event.HANDLER_LOG, **{KEY: 1, "text": f'{{"secret": "{SECRET}"}}'})
    library = logging.getLogger("sqlalchemy.engine")
    library.warning("connecting to %s with %s", URL, {"password": SECRET})
    library.warning("bad format %d of {KEY}", KEY)
    structlog.get_logger().warning(f"used directly {KEY}", password=SECRET)
    try:
        raise_with_secrets()
    except ValueError:
        library.exception("failed for %s", KEY)
    thread = threading.Thread(target=raise_with_secrets)
    thread.start()
    thread.join()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(f"deprecated {KEY}", DeprecationWarning, stacklevel=1)
    assert SECRET not in stream.getvalue()
    assert KEY not in stream.getvalue()
    assert stream.getvalue().count("[redacted]") > 15
    if log_format == "json":
        assert len(lines(stream)) == 9
        assert {line["event"] for line in lines(stream)} <= set(Event)


def test_a_librarys_exception_is_one_line_with_its_causes(out):
    """A traceback is text in one line, with its causes, beside the error's type and message; it holds no variables."""
    try:
        raise_with_secrets()
    except ValueError:
        logging.getLogger("celery.app.trace").exception("Task %s failed", "x")
    (line,) = lines(out)
    assert (line["event"], line["level"], line["logger"]) == ("library", "error", "celery.app.trace")
    assert line["message"] == "Task x failed"
    assert line["error"]["type"] == "ValueError"
    assert line["exception"].startswith("Traceback")
    assert "ConnectionError: cannot reach postgresql://stepfast:[redacted]@db/x" in line["exception"]


def test_libraries_debug_lines_are_never_written():
    """A library's debug line may hold a whole request, which only `log_inputs` may show."""
    stream = io.StringIO()
    logs.setup(Settings(log_level="debug"), stream)
    logging.getLogger("anthropic").debug("request: %s", "the prompt")
    assert stream.getvalue() == ""


def test_warnings_are_lines(out):
    """What Python warns of is a line, and not text on standard error."""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old\nusage", DeprecationWarning, stacklevel=1)
    (line,) = lines(out)
    assert (line["event"], line["level"], line["logger"]) == ("library", "warning", "py.warnings")


def test_a_second_setup_replaces_the_first(out):
    """Setting up twice writes each event once, to the newer stream."""
    newer = io.StringIO()
    logs.setup(Settings(), newer)
    emit(Event.STEP_CLAIMED)
    logging.getLogger("kombu").warning("once")
    assert out.getvalue() == ""
    assert len(lines(newer)) == 2


def test_a_megabyte_is_capped_in_each_value():
    """Each value of a line is cut to its limit, an exception too, and says how long it was."""
    stream = io.StringIO()
    logs.setup(Settings(log_value_max_bytes=1_000), stream)
    emit(Event.STEP_OUTPUT, output="é" * 1_000_000, inputs={"a": ["x" * 1_000_000]}, small=[1])
    try:
        raise ValueError("x" * 1_000_000)
    except ValueError:
        logging.getLogger("kombu").exception("y" * 1_000_000)
    first, second = lines(stream)
    assert first["output"].endswith("[cut: 6000002 bytes]")
    assert first["small"] == [1]
    assert max(map(len, stream.getvalue().splitlines())) < 5_000
    assert second["message"].startswith("yyy")


@pytest.mark.parametrize(
    "value", ["\ud800", "NUL\x00", float("nan"), object(), {1, 2}, b"\xff", ValueError("x"), 10**400, "\u2028\n\r"]
)
def test_any_value_is_one_line_of_ascii(out, value):
    """Every stream can take every line, and no value breaks it in two."""
    emit(Event.STEP_OUTPUT, output=value)
    assert out.getvalue().isascii()
    assert len(lines(out)) == 1


class Recorder(io.StringIO):
    def __init__(self):
        super().__init__()
        self.writes: list[str] = []

    def write(self, text):
        self.writes.append(text)
        return len(text)


def test_a_line_is_one_write():
    """A line and its end go out in one call, so that no other line comes between them."""
    stream = Recorder()
    logs.setup(Settings(), stream)
    emit(Event.STEP_CLAIMED)
    (text,) = stream.writes
    assert text.count("\n") == 1
    assert text.endswith("}\n")


def test_threads_never_interleave_their_lines(tmp_path):
    """Eight threads that log at once, by events and by a library, write whole lines only."""
    path = tmp_path / "log"
    start = threading.Barrier(8)

    def work(number):
        start.wait(timeout=30)
        for index in range(50):
            emit(Event.STEP_OUTPUT, number=number, output="x" * 4_000)
            logging.getLogger("kombu").warning("%d %d", number, index)

    with path.open("w") as stream:
        logs.setup(Settings(), stream)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 800


def test_a_signal_handler_may_log_while_its_thread_writes():
    """The lock is re-entrant: a handler that interrupts a write is not stuck behind it."""

    class Interrupting(Recorder):
        def write(self, text):
            if not self.writes:
                signal.raise_signal(signal.SIGUSR1)
            return super().write(text)

    stream = Interrupting()

    def handle(*_):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        stream.writes.append("")
        logging.getLogger("celery").warning("interrupted")

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        logs.setup(Settings(), stream)
        emit(Event.STEP_CLAIMED)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(stream.writes) == 3


def test_a_child_can_log_after_a_fork_in_the_middle_of_a_write(tmp_path):
    """A fork while another thread holds the lock leaves the child able to write."""
    held, done = threading.Event(), threading.Event()

    def hold():
        with logs._lock:
            held.set()
            done.wait(timeout=60)

    with (tmp_path / "log").open("w") as stream:
        logs.setup(Settings(), stream)
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(timeout=30)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of just this danger
            child = os.fork()
        if child == 0:
            signal.alarm(20)
            emit(Event.STEP_CLAIMED)
            os._exit(0)
        try:
            _, status = os.waitpid(child, 0)
        finally:
            done.set()
            thread.join()
    assert status == 0
    assert json.loads((tmp_path / "log").read_text())["event"] == "step.claimed"


def test_a_closed_stream_raises_nothing():
    """A stream that is closed loses the line, and the step goes on."""
    stream = io.StringIO()
    logs.setup(Settings(), stream)
    stream.close()
    emit(Event.STEP_CLAIMED)
    logging.getLogger("kombu").warning("nobody reads")


def test_a_broken_pipe_raises_nothing_and_ends_well():
    """A process whose reader went away goes on, and ends without an error."""
    code = (
        "import logging, sys; from app.observe import logs; from app.settings import Settings\n"
        "from app.events import Event, emit\n"
        "logs.setup(Settings()); sys.stdin.read()\n"
        "[emit(Event.STEP_OUTPUT, output='x' * 5000) for _ in range(40)]; logging.getLogger('kombu').warning('x')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    process.stdout.close()
    process.stdin.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (0, b"")
    process.stderr.close()


def test_the_console_is_for_people_and_safe_for_their_terminal():
    """The console shows one readable line an event, without colours where there is no terminal, and no command to it."""
    stream = io.StringIO()
    logs.setup(Settings(log_format="console"), stream)
    emit(Event.STEP_COMPLETED, run_id="4f9c", agent="coder", output={"a": "\x1b[2J"}, text="two\nlines\x1b[2J\r")
    (line,) = stream.getvalue().splitlines()
    assert "step.completed" in line
    assert "agent=coder" in line
    assert "\x1b" not in line
    try:
        raise_with_secrets()
    except ValueError:
        logging.getLogger("kombu").exception("failed")
    assert "\nTraceback" in stream.getvalue()


def test_the_console_has_colours_on_a_terminal_only():
    """Colours appear where the stream is a terminal."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    logs.setup(Settings(log_format="console"), stream)
    emit(Event.STEP_COMPLETED)
    assert "\x1b[" in stream.getvalue()


WORKER = f"""
import os, signal
from celery import Celery, signals
from app import events, settings
from app.observe import celery_signals

app = Celery("logged", broker="memory://", set_as_current=True)
app.conf.update(worker_redirect_stdouts=False, worker_hijack_root_logger=False, broker_connection_retry_on_startup=True)
celery_signals.connect(settings.parse({{}}))

@app.task
def fail(password):
    events.emit(events.Event.HANDLER_LOG, message=str(dict(events.bound_fields())))
    events.bound(run_id="leaked").__enter__()
    raise ValueError("password={SECRET} {KEY}")

@app.task
def stop():
    os.kill(os.getppid() if "prefork" in "{{pool}}" else os.getpid(), signal.SIGTERM)

@signals.worker_ready.connect
def send(**_):
    for _ in range(2):
        fail.delay("{SECRET}")
    stop.delay()
"""


def test_a_childs_death_and_an_imports_prints_are_lines(system, here, write_skill):
    """What the pool says of a dead child, and what handlers.py prints while it is imported, is JSON like the rest."""
    handlers = "import os\nprint('imported, password=' + 'hunter2')\ndef only(ctx): os._exit(7)\n"
    name = system.publish(here, write_skill("- {id: only, retry_policy: {max_attempts: 1}}", handlers))
    worker = system.start_worker(pool="prefork", concurrency=1)
    assert system.ended(operations.start(here, name, {}).run_id)["state"] == "failed"
    eventually(lambda: "exitcode 7" in worker.log.read_text(), what="the child's end")
    lines = [json.loads(line) for line in worker.log.read_text().splitlines()]
    printed = {line["message"] for line in lines if line["event"] == "handler.printed"}
    assert printed == {"imported, password=[redacted]"}


@pytest.mark.parametrize("pool", ["threads", "prefork"])
def test_a_worker_writes_json_lines_only(tmp_path, pool):
    """From its first warning to its last word a real worker writes our lines; a task starts with nothing bound."""
    (tmp_path / "logged.py").write_text(WORKER.replace("{pool}", pool))
    worker = subprocess.Popen(
        [
            *(sys.executable, "-m", "celery", "-A", "logged", "worker", "--pool", pool, "--concurrency", "1"),
            *("--without-mingle", "--without-gossip", "--without-heartbeat"),
        ],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    written = []
    try:
        for text in worker.stdout:
            written.append(json.loads(text))
            if "Warm shutdown" in written[-1]["message"]:
                break
    finally:
        os.killpg(worker.pid, signal.SIGKILL)  # Celery takes four seconds more to leave an in-memory broker
        worker.communicate()
    assert "Warm shutdown" in written[-1]["message"]
    assert SECRET not in json.dumps(written)
    assert KEY not in json.dumps(written)
    assert {line["event"] for line in written} == {"library", "handler.log"}
    assert [line["message"] for line in written if line["event"] == "handler.log"] == ["{}", "{}"]
    assert any("raised unexpected" in line["message"] for line in written)
