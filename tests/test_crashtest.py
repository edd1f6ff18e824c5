"""`stepfast crashtest`, as a user types it: real servers, real workers, real SIGKILLs."""

import json
import os
from xml.etree import ElementTree as ET

import pytest
from commanding import answer, process
from conftest import ROOT

from app import rabbitmq
from app.crashpoints import CrashPoint
from app.crashtest.proxy import Proxy

EXAMPLE = ROOT / "examples" / "bugfix"

# Every point is reached by one of these: two models, of which one has a gate and asks, and a handler with a real effect.
EVERYTHING = """
    - {id: writer, model: claude-sonnet-5-5, output_schema: told}
    - id: critic
      model: claude-sonnet-5-5
      depends_on: [writer]
      gate: "{{writer.words}} > 0"
      requires_human_approval: true
      output_schema: told
    - {id: printer, depends_on: [critic]}
"""
PRINTER = """
    import pathlib

    from app.agents import Happened, NotHappened, effects_once

    @effects_once
    def printer(ctx):
        paper = pathlib.Path(ctx.run.input["folder"]) / "paper"

        def look():
            return Happened({"lines": 1}) if paper.exists() else NotHappened()

        def put():
            with paper.open("a") as file:
                file.write("a line\\n")
            return {"lines": len(paper.read_text().splitlines())}

        return ctx.once("paper", put, check=look)
"""
FILES = {
    "prompts/writer.md": "# System\nYou write.\n\n# User\nWrite.\n",
    "prompts/critic.md": "# System\nYou judge.\n\n# User\nJudge.\n",
    "schemas/told.json": json.dumps(
        {
            "type": "object",
            "properties": {"words": {"type": "integer"}},
            "required": ["words"],
            "additionalProperties": False,
        }
    ),
    "simulator.yaml": "rules: [{match: {system: You}, reply: {words: 7}}]\n",
}
# One cell for each point, at one of the agents that reach it.
OF_WRITER = ("take", "send", "call", "complete", "fail", "dead_letter")
OF_CRITIC = ("claim", "gate", "suspend", "approve", "sweep.after")
OF_PRINTER = ("effect", "check", "ack")
ONE_A_POINT = (
    *("enqueue.*", "sweep.before", "message.doubled"),
    *(f"{name}*:writer" for name in OF_WRITER),
    *(f"{name}*:critic" for name in OF_CRITIC),
    *(f"{name}*:printer" for name in OF_PRINTER),
)


def _crashtest(skill, tmp_path, *arguments, only=()):
    """The command's answer, and its JSON: rows by cell."""
    options = [word for pattern in only for word in ("--only", pattern)]
    environ = {"PATH": os.environ["PATH"]}
    running = process("crashtest", skill, "--json", *options, *arguments, env=environ, cwd=tmp_path)
    out, err = running.communicate(timeout=600)
    assert out, err
    found = json.loads(out)
    return running.returncode, found, {row["cell"]: row for row in found.get("cells", ())}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_whoever_dies_at_any_point_the_run_ends_as_if_nothing_had_happened(write_skill, tmp_path):
    """A real SIGKILL at every named point: same outputs, one line on the paper, no call too many, all rules hold."""
    skill = write_skill(EVERYTHING, PRINTER, files=FILES)
    code, found, rows = _crashtest(skill, tmp_path, "--input", "folder={scratch}", only=ONE_A_POINT)
    assert {name: row["why"] for name, row in rows.items() if row["verdict"] != "ok"} == {}
    assert (code, found["kept"], found["whole"], found["not_compared"]) == (0, True, [], [])
    assert found["not_reached"] == {}
    assert {name.partition(":")[0] for name in rows} - {"message.doubled"} == {point.label for point in CrashPoint}
    assert all(row["rules_hold"] and row["same_outputs"] and not row["effects_repeated"] for row in rows.values())
    repeated = {name for name, row in rows.items() if row["calls_repeated"]}
    assert repeated <= {"call.sent:writer", "call.after:writer", "complete.before:writer", "fail.before:writer"}
    assert rows["complete.before:writer"]["calls_repeated"] == 1


BROKEN = """
    - {id: honest, idempotent: true}
    - {id: appends, depends_on: [honest], idempotent: true}
    - {id: differs, depends_on: [appends], idempotent: true}
    - {id: unsafe, depends_on: [differs]}
"""
BROKEN_HANDLERS = """
    import pathlib

    def honest(ctx): return {"n": 1}

    def appends(ctx):
        with (pathlib.Path(ctx.run.input["folder"]) / "log").open("a") as file:
            file.write("again\\n")
        return {"n": 2}

    def differs(ctx): return {"n": ctx.run.number}
    def unsafe(ctx): return {"n": 4}
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_broken_promise_fails_and_an_unknown_outcome_does_not(write_skill, tmp_path):
    """A handler that claims to be repeatable and is not is found; one that claims nothing ends as was promised."""
    junit = tmp_path / "junit.xml"
    arguments = ("--input", "folder={scratch}", "--junit", junit)
    skill = write_skill(BROKEN, BROKEN_HANDLERS)
    code, _, rows = _crashtest(skill, tmp_path, *arguments, only=["call.after:*"])
    verdicts = {name.partition(":")[2]: row["verdict"] for name, row in rows.items()}
    assert verdicts == {"honest": "ok", "appends": "BROKEN", "differs": "BROKEN", "unsafe": "outcome_unknown"}
    assert code == 1
    assert rows["call.after:appends"]["why"] == ["what the handlers left behind differs: log"]
    assert rows["call.after:differs"]["why"] == ["outputs differ: differs.n"]
    assert rows["call.after:unsafe"]["rules_hold"]
    suite = ET.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("4", "2")


@pytest.mark.slow
@pytest.mark.rabbitmq
@pytest.mark.timeout(300)
@pytest.mark.skipif(not rabbitmq.installed(), reason=rabbitmq.MISSING)
def test_rabbitmq_may_lose_everything(write_skill, tmp_path):
    """On quorum queues: a worker dies before its ack, and the broker loses all that it had, twice in a run."""
    skill = write_skill(EVERYTHING, PRINTER, files=FILES)
    cells = ["ack.before:printer", "broker.wiped:*"]
    code, _, rows = _crashtest(skill, tmp_path, "--input", "folder={scratch}", "--broker", "rabbitmq", only=cells)
    assert {name: row["why"] for name, row in rows.items() if row["why"]} == {}
    assert (code, len(rows)) == (0, 2)


def test_what_cannot_be_tested_is_refused(write_skill, tmp_path):
    """Where the undisturbed run does not complete there is nothing to compare with: a sentence, and what to do next."""
    folder = write_skill("- {id: only, retry_policy: {max_attempts: 1}}", "def only(ctx): raise ValueError('no')\n")
    code, found, _ = _crashtest(folder, tmp_path)
    assert code == 1
    assert "since only ended with handler_failed" in found["error"]["message"]
    assert "--answers RUN" in found["error"]["next_step"]


def test_input_is_checked_before_anything_is_started(tmp_path):
    """What the pipeline's schema refuses leaves nothing behind."""
    refused = answer("crashtest", EXAMPLE, "--input", "repo=x", cwd=tmp_path)
    assert (refused.code, refused.out) == (2, "")
    assert "Error: The input does not fit the pipeline's input_schema" in refused.err
    assert "Starting" not in refused.err


def test_proxy_carries_drops_and_cuts(tmp_path):
    """What goes in comes out; connections are reset by a drop, and refused while it is cut."""
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "server"))
        server.listen()
        with Proxy(tmp_path / "server") as proxy:
            client = socket.create_connection((proxy.host, proxy.port), timeout=10)
            far, _ = server.accept()
            client.sendall(b"there")
            assert far.recv(10) == b"there"
            far.sendall(b"back")
            assert client.recv(10) == b"back"
            proxy.drop()
            assert _is_gone(client)
            proxy.cut()
            assert _is_gone(socket.create_connection((proxy.host, proxy.port), timeout=10))
            proxy.heal()
            with socket.create_connection((proxy.host, proxy.port), timeout=10) as client, server.accept()[0] as again:
                again.sendall(b"healed")
                assert client.recv(10) == b"healed"
            far.close()


def _is_gone(client) -> bool:
    with client:
        try:
            return client.recv(1) == b""
        except ConnectionError:
            return True
