"""docs/logs.md: its two configurations of rsyslog, run as they stand, carry each line whole to the central host."""

import json
import re
import shutil
import signal
import socket
import subprocess

import pytest
from conftest import ROOT, eventually

from app import events, settings
from app.events import Event
from app.observe import logs

RSYSLOGD = shutil.which("rsyslogd", path="/usr/sbin:/usr/bin:/sbin")
pytestmark = pytest.mark.skipif(RSYSLOGD is None, reason="rsyslog is not installed (Debian: rsyslog)")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Host:
    """One rsyslogd, with a block of the document: only its places and the address are the test's."""

    def __init__(self, name: str, folder, port: int) -> None:
        block = re.search(rf"```rsyslog-{name}\n(.*?)```", (ROOT / "docs" / "logs.md").read_text(), re.DOTALL)[1]
        self.folder = folder / name
        self.folder.mkdir()
        text = f'global(workDirectory="{self.folder}")\n' + block
        for there, here in {
            "logs.example.com": "127.0.0.1",
            "10514": str(port),
            "/var/log/stepfast/": f"{folder}/",
            "/var/log/central/": f"{self.folder}/",
        }.items():
            text = text.replace(there, here)
        self.config = self.folder / "rsyslog.conf"
        self.config.write_text(text.replace('resumeInterval="5"', 'resumeInterval="1"'))
        self.process = None

    def start(self) -> None:
        with (self.folder / "said").open("ab") as said:
            argv = [RSYSLOGD, "-n", "-f", str(self.config), "-i", str(self.folder / "pid")]
            self.process = subprocess.Popen(argv, stdout=said, stderr=said)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(20)
            (self.folder / "pid").unlink(missing_ok=True)

    def lines(self, pattern: str) -> list[str]:
        """Those that ended: rsyslogd writes by the block, and a long line's end may still be to come."""
        return [line for file in self.folder.glob(pattern) for line in file.read_text().split("\n")[:-1]]


@pytest.fixture
def hosts(tmp_path):
    port = _free_port()
    made = Host("host", tmp_path, port), Host("central", tmp_path, port)
    yield made
    for host in made:
        host.stop()


@pytest.mark.slow
def test_each_line_arrives_whole_and_nothing_is_lost_while_the_central_host_is_away(hosts, tmp_path):
    """Every event as it was logged, also a long one; errors also in their own file; killed and back, nothing is missing."""
    host, central = hosts
    with (tmp_path / "worker.log").open("w") as stream:
        logs.setup(settings.Settings(), stream)
        central.start()
        host.start()
        for number in range(50):
            events.emit(Event.STEP_COMPLETED, run_id=f"run-{number}", agent="coder", note='a "quoted" ü \\ line\nend')
        events.emit(Event.STEP_DISCARDED, run_id="run-51", message="x" * 8_000, values={"y": "z" * 8_000})
        eventually(lambda: len(set(central.lines("stepfast-2*.log"))) == 51, what="the first lines")
        eventually(lambda: central.lines("stepfast-errors.log"), what="the error, in its own file")
        central.stop(signal.SIGKILL)
        for number in range(100, 150):
            events.emit(Event.STEP_COMPLETED, run_id=f"run-{number}", agent="coder")
        central.start()
        # TCP and rsyslogd's buffers held nothing when it was killed: all had arrived, and was written.
        eventually(lambda: len(central.lines("stepfast-2*.log")) > 51, within_s=30, what="lines after the return")
        events.emit(Event.RUN_COMPLETED, run_id="last")
        eventually(lambda: any('"last"' in line for line in central.lines("stepfast-2*.log")), what="the last line")
    logged = (tmp_path / "worker.log").read_text().splitlines()
    arrived = central.lines("stepfast-2*.log")
    assert set(arrived) <= set(logged)
    missing = [line for line in logged if line not in set(arrived)]
    assert missing == []
    assert len(json.loads(next(line for line in arrived if "run-51" in line))["message"]) == 8_000
    assert [json.loads(line)["run_id"] for line in central.lines("stepfast-errors.log")] == ["run-51"]
