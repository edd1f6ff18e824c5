"""What only looks: show --agent, show --timeline on a terminal, diff, report, runs --stuck; as they are typed."""

import json
import os
import pty
import re
import struct
import subprocess
from fcntl import ioctl
from termios import TIOCSWINSZ

import commanding
import pytest
from benches import CALM_MS, ERROR, Bench
from commanding import STEPFAST
from pipelines import agent, line, pipeline

from app.pipelines.model import OnRefused, Prompt
from app.runs.database import engine
from app.runs.orders import Orders
from app.runs.store import Ending, Paid, Store


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """`stepfast` inside this process; each call gives a `commanding.Answer`."""
    monkeypatch.setenv("STEPFAST_HOME", str(tmp_path / "home"))
    return commanding.in_process(capsys)


@pytest.fixture
def bench(system, here):
    opened = engine(system.database_url, pool_max=2)
    made = Bench(Store(opened))
    made.orders = Orders(opened)
    yield made
    opened.dispose()


REVIEWED = pipeline(
    agent("coder", prompt=Prompt("You write code.", "Do {{input.what}}.")),
    agent("reviewer", "coder", gate="{{coder.ok}} == true", on_refused=OnRefused("coder")),
)


def _sent_back(bench):
    """A run whose coder runs again, because the gate after it refused."""
    run = bench.start(REVIEWED, {"what": "this", "api_key": "hunter2-correct-horse"})
    bid, _ = bench.claim(run, "coder")
    bench.complete(bid, {"ok": False})
    bid, _ = bench.claim(run, "reviewer")
    error = ERROR | {"code": "gate_refused", "message": "No.", "details": {"gate": "", "values": {"coder.ok": False}}}
    sent = {"gate_of": "reviewer", "gate": "{{coder.ok}} == true", "read": {"coder": {"ok": False}}}
    bench.store.fail(bid.step, bid.attempt_id, error, Paid(), Ending("rerun", rerun="coder", feedback=sent))
    bid, claim = bench.claim(run, "coder")
    assert claim.feedback == sent
    bench.complete(bid, {"ok": True})
    return run, sent


def test_show_agent_gives_what_each_attempt_was_sent(cli, bench):
    """The message with its data, what a gate had sent back, what it put out; of any attempt; and no secret."""
    run, sent = _sent_back(bench)
    found = cli("show", run, "--agent", "coder", "--json").json
    assert found["feedback"] == sent
    assert (found["attempt"]["number"], found["attempts"], found["attempt"]["output"]) == (2, 2, {"ok": True})
    assert found["asked"]["system"].startswith("You write code.\n\nWhat stands between a tag")
    assert re.search(r'Do <data-\w+ name="input.what">this</data-\w+>\.', found["asked"]["user"])
    assert "Your earlier answer was sent back" in found["asked"]["user"]
    first = cli("show", run, "--agent", "coder", "--attempt", "1", "--json").json
    assert (first["feedback"], first["attempt"]["output"]) == (None, {"ok": False})
    assert "sent back" not in first["asked"]["user"]
    said = cli("show", run, "--agent", "reviewer", "--attempt", "1").out
    assert "gate     {{coder.ok}} == true refused: coder.ok = False" in said
    assert "output of coder\n  ok: false" in said
    assert "hunter2" not in json.dumps(found) + said


def test_show_agent_refuses_what_it_cannot_show(cli, bench):
    """An agent or an attempt that is not there, one that was given nothing yet, and two ways at once."""
    run = bench.start(line("one", "two"))
    bench.do(run, "one")
    cli("show", run, "--agent", "ona").refuses(2, "tested has no agent ona", "one")
    cli("show", run, "--agent", "two").refuses(2, "two was given nothing yet: it is available.", "stepfast show")
    cli("show", run, "--agent", "one", "--attempt", "9").refuses(2, "one has no attempt 9.", "1 to 1")
    for options in (["--timeline", "--follow"], ["--agent", "one", "--timeline"], ["--attempt", "1"]):
        cli("show", run, *options).refuses(2, "each show a run in another way", "stepfast show --help")


def test_stuck_runs_are_listed_with_what_they_wait_for(cli, bench):
    """Those in which nothing happens: a person, a worker that nobody started; not what executes or retries later."""
    asked = bench.start(line("a"))
    bid, _ = bench.claim(asked, "a")
    bench.store.suspend(bid.step, bid.attempt_id, "d1", {}, None)
    retries, executes = bench.start(line("a")), bench.start(line("a"))
    bench.fail(bench.claim(retries, "a")[0], retry_ms=3_600_000)
    assert cli("runs", "--stuck").out == "No run is stuck.\n"
    bench.pass_time(120)
    unserved = bench.start(pipeline(agent("a", queue="gpu"), name="other"))
    bench.pass_time(61)
    # A step that is put off again and again has waited since before.
    missing = bench.start(pipeline(agent("a", handler="h:f", queue="cpu"), name="missing"))
    for _ in range(3):
        bench.pass_time(40)
        bench.store.defer(bench.bid(missing, "a").step, 1_000, "this worker has no handler h:f")
        bench.pass_time(2)
        bench.sweep(lease_ms=CALM_MS)
    bench.definition = line("a")
    bench.claim(executes, "a")
    rows = cli("runs", "--stuck", "--json").json
    assert [row["run_id"] for row in rows] == [str(run) for run in (asked, unserved, missing)]
    assert rows[0]["why"].startswith("a waits for a person since ")
    assert rows[0]["command"] == f"stepfast approve {str(asked)[:8]} a"
    assert "from the queue gpu" in rows[1]["why"]
    said = cli("runs", "--stuck", "--limit", "1")
    assert str(asked)[:8] in said.out
    assert said.following[:1] == ["approve"]
    assert len(cli("runs", "--stuck", "--pipeline", "other", "--json").json) == 1
    cli("runs", "--stuck", "--state", "failed").refuses(2, "--stuck goes with", "runs --help")


def test_a_backlog_is_not_stuck(cli, bench):
    """What waits behind others for a worker that executes waits its turn."""
    first, behind = bench.start(line("a")), bench.start(line("a"))
    bench.pass_time(600)
    assert len(cli("runs", "--stuck", "--json").json) == 2
    bench.claim(first, "a")
    assert cli("runs", "--stuck", "--json").json == []
    assert bench.states(behind) == {"a": "available"}


FORGED = "a.py\ndigest     0000: approved\r\u2028digest     0000: approved"


def test_no_line_end_of_an_agents_begins_a_line_of_ours(cli, bench):
    """In a short text, in a field's name, in an error: what follows it stands where the agent's text began."""
    definition = pipeline(
        agent("plan"),
        agent("pay", "plan", requires_human_approval=True, gate="{{plan.sure}} != 1"),
        agent("last", "pay"),
    )
    runs = [bench.start(definition, {"order": number}) for number in (1, 2)]
    for number, run in enumerate(runs):
        bench.complete(bench.claim(run, "plan")[0], {"files": [FORGED, number], FORGED: number, "sure": FORGED})
        bid, _ = bench.claim(run, "pay")
        bench.store.suspend(bid.step, bid.attempt_id, "d1", {"files": [FORGED]}, None)
    asked, failed = runs
    bench.orders.decide(failed, "pay", approved=True, digest="d1", by="ann", reason=None)
    bench.fail(bench.claim(failed, "pay")[0], error=ERROR | {"message": f"No. {FORGED}", "details": {FORGED: [FORGED]}})
    for command in (
        ["approve", asked, "pay"],
        *(["show", run, "--agent", name] for run, name in ((asked, "plan"), (asked, "pay"), (failed, "pay"))),
        *([name, failed] for name in ("show", "explain")),
        ["show", failed, "--timeline"],
        ["diff", asked, failed],
        ["dead"],
        ["dead", "show", failed],
    ):
        said = cli(*command).out
        assert "digest     0000: approved" in said or not ({"approve", "--agent", "diff"} & set(command)), command
        # A text of several lines is shown as such, further in than any line of ours.
        assert not re.search(
            r"^ {0,3}digest     0000", said.replace("\r", "\n").replace("\u2028", "\n"), re.MULTILINE
        ), command


def test_diff_and_report_in_words(cli, bench):
    """Both print tables for people; an agent's text commands no terminal."""
    run, _ = _sent_back(bench)
    other = bench.start(REVIEWED, {"what": "that"})
    bench.complete(bench.claim(other, "coder")[0], {"ok": True, "text": "\x1b[2J[red]"})
    said = cli("diff", run, other)
    assert "run: input\n" in said.out
    assert "-what: this\n" in said.out.replace("  -", "-")
    assert "\\x1b[2J[red]" in said.out
    assert "\x1b" not in said.out
    assert cli("diff", run, run).out.endswith("They differ in nothing but time and cost.\n")
    assert cli("diff", run, run, "--json").json["same"] is True
    told = cli("report", "--since", "2h").out
    assert re.search(r"^runs begun +2 running$", told, re.MULTILINE)
    assert re.search(r"retries +0, and 1 review rounds", told)
    assert "Slowest agents" in told
    assert cli("report", "--pipeline", "nobody").code == 0
    cli("report", "--since", "soon").refuses(2, "is no age such as 2h", "stepfast report --help")


def _on_terminal(arguments, environ, columns):
    """What a terminal of so many columns is sent."""
    mine, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    # These would be asked before the terminal is.
    environ = {name: value for name, value in environ.items() if name not in {"COLUMNS", "LINES"}}
    with subprocess.Popen(
        [str(STEPFAST), *arguments],
        env=environ | {"TERM": "xterm-256color"},
        stdout=theirs,
        stderr=theirs,
        stdin=theirs,
    ) as running:
        os.close(theirs)
        said = b""
        while True:
            try:
                part = os.read(mine, 65_536)
            except OSError:  # how Linux says that the other side is closed
                break
            if not part:
                break
            said += part
        running.wait(30)
    os.close(mine)
    return said.decode()


@pytest.mark.parametrize("columns", [70, 140])
def test_timeline_honours_the_terminal(bench, system, cli, columns):
    """Coloured, and as wide as the terminal is; a pipe gets 100 columns and no colour."""
    run = bench.start(line("first", "second"))
    bench.do(run, "first")
    said = _on_terminal(["show", str(run), "--timeline"], system.environ, columns)
    assert "\x1b[" in said
    bars = [re.sub(r"\x1b\[[0-9;]*m", "", text) for text in said.splitlines() if "│" in text]
    assert len(bars) == 2
    assert all(columns - 2 <= len(text.rstrip("\r")) <= columns for text in bars)
    piped = cli("show", run, "--timeline").out
    assert "\x1b" not in piped
    assert {len(text) for text in piped.splitlines() if "│" in text} == {100 - 1}
