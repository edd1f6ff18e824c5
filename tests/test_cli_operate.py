"""What an operator types: approve, reject, override, cancel, dead, doctor, show --follow; on real runs."""

import json
import os
import pty
import re
import subprocess

import commanding
import pytest
from commanding import STEPFAST, answer, claim, complete, give_up
from conftest import eventually
from pipelines import agent, line, pipeline

from app import operations
from app.runs.database import engine
from app.runs.store import Store

DIFF = "--- a/src.py\n+++ b/src.py\n@@ -1,2 +1,2 @@\n-return 1\n+return 2\n \n"
SECRET = "sk-ant-api03-verysecretindeed"
PLAN_SCHEMA = {
    "type": "object",
    "properties": {"patch": {"type": "string"}, "pin": {"type": "string", "x-sensitive": True}},
}
PAYS = pipeline(
    agent("plan", handler="handlers:plan", queue="handlers", schema=PLAN_SCHEMA),
    agent("pay", "plan", handler="handlers:pay", queue="handlers", requires_human_approval=True, idempotent=True),
)
HANDLERS = """
    def plan(ctx): return {"patch": ctx.run.input["patch"], "files": ["src.py", "b.py"], "sure": True, "pin": "7341"}
    def pay(ctx): return {"paid": True}
"""
GIVEN = {"patch": DIFF, "issue": "It breaks.\\nBadly.", "note": f"\x1b[2J{SECRET}", "budget": {"usd": 3}}


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """`stepfast` inside this process; each call gives a `commanding.Answer`."""
    monkeypatch.setenv("STEPFAST_HOME", str(tmp_path / "home"))
    return commanding.in_process(capsys)


@pytest.fixture
def store(system, here):
    opened = engine(system.database_url, pool_max=1)
    yield Store(opened)
    opened.dispose()


@pytest.fixture
def asked(system, here, write_skill):
    """A run of real workers that waits for a person to let `pay` begin."""
    write_skill("- {id: unused}", HANDLERS)
    system.start_worker()
    operations.publish(here, PAYS)
    run_id = operations.start(here, PAYS.name, GIVEN | {"issue": "It breaks.\nBadly."}).run_id
    eventually(lambda: system.run(run_id)["state"] == "suspended", what="a question to a person")
    return run_id


def _digest(system, run_id) -> str:
    return system.run(run_id)["approvals"][-1]["digest"]


def _begin(store, definition, run_input=None):
    store.publish(definition)
    return store.enqueue(definition.name, run_input or {})[0]


def _failed(store, definition=None, **error):
    definition = definition or line("first", "second")
    run_id = _begin(store, definition)
    complete(store, definition, run_id, "first", {"done": True})
    give_up(store, definition, run_id, "second", **error)
    return run_id


def test_approve_shows_what_will_happen_and_approves_exactly_that(cli, system, asked):
    """A diff as a diff, text as text, small values as lines; secrets hidden; bound to the digest that is shown."""
    assert "pay waits for a person since" in cli("explain", asked).out
    assert cli("explain", asked).following == ["approve", str(asked)[:8], "pay"]
    refused = cli("approve", asked, "pay")
    refused.refuses(2, "Nobody can be asked here", "add --yes")
    shown = refused.out
    for text in (
        "does       calls handlers:pay",
        "reads      input, plan",
        f"digest     {_digest(system, asked)[:12]}",
        "expires    never",
        "  issue:\n    It breaks.\n    Badly.\n",
        "  budget.usd: 3\n",
        "\noutput of plan\n",
        "  patch:\n    --- a/src.py\n    +++ b/src.py\n    @@ -1,2 +1,2 @@\n    -return 1\n    +return 2\n",
        "  files: src.py, b.py\n",
        "  sure: true\n",
        "  pin: [redacted]\n",
        "\\x1b[2J[redacted]",
    ):
        assert text in shown, text
    assert SECRET not in shown
    assert "\x1b" not in shown
    assert "--json asks nobody" in cli("approve", asked, "pay", "--json").json["error"]["message"]
    given = cli("approve", asked, "pay", "--yes", "--reason", "read it", "--json").json
    assert given.keys() == {"run_id", "agent", "decision", "digest", "by"}
    assert (given["decision"], given["digest"]) == ("approved", _digest(system, asked))
    run = system.ended(asked)
    assert (run["state"], run["approvals"][-1]["reason"]) == ("completed", "read it")
    cli("approve", asked, "pay", "--yes").refuses(2, "pay waits for no decision: it is completed. It was approved by")
    cli("approve", asked, "pya", "--yes").refuses(2, "tested has no agent pya. Did you mean 'pay'?")


def test_approve_asks_on_a_terminal(system, asked, tmp_path):
    """On a terminal it asks, in colour; no is the default, and then nothing was decided."""
    said = _on_terminal(system, tmp_path, "approve", asked, "pay", typed="\n")
    assert "Approve pay? [y/N]" in said
    assert "\x1b[32m" in said  # the added line
    assert "Nothing was decided" in said
    assert system.run(asked)["state"] == "suspended"
    said = _on_terminal(system, tmp_path, "approve", asked, "pay", typed="y\n")
    assert "pay is approved, and goes on." in said
    assert system.ended(asked)["state"] == "completed"


def _on_terminal(system, cwd, *arguments, typed):
    """What a person at a terminal sees, once the command has ended."""
    ours, theirs = pty.openpty()
    command = [str(STEPFAST), *map(str, arguments)]
    environ = system.environ | {"TERM": "xterm", "COLUMNS": "100"}
    running = subprocess.Popen(command, cwd=cwd, env=environ, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, typed.encode())
    seen = b""
    while True:
        try:
            more = os.read(ours, 65_536)
        except OSError:  # Linux: the other side is closed
            break
        if not more:
            break
        seen += more
    os.close(ours)
    assert running.wait(30) in {0, 130}
    return seen.decode()


def test_reject_says_why_and_what_becomes_of_the_run(cli, system, asked):
    """A rejection needs a reason, ends the run by its failure mode, and is no dead letter."""
    cli("reject", asked, "pay").refuses(2, "Missing option '--reason'")
    cli("reject", asked, "plan", "--reason", "no").refuses(2, "plan waits for no decision", "stepfast approve")
    rejected = cli("reject", asked, "pay", "--reason", "too dear")
    assert rejected.code == 0
    assert re.search(r"pay was rejected by \S+ \(too dear\) at ", rejected.out)
    assert rejected.following == ["resume", str(asked)[:8]]
    assert system.run(asked)["state"] == "failed"
    assert cli("dead", "list", "--json").json == []


def test_what_changed_after_it_was_shown_is_not_approved(cli, system, here, asked):
    """An override in between voids the request: the new one has another digest."""
    before = _digest(system, asked)
    operations.override(here, asked, "plan", {"patch": "another"}, by="ann")
    eventually(lambda: _digest(system, asked) != before, what="another question")
    eventually(lambda: system.run(asked)["state"] == "suspended", what="a question to a person")
    assert "another" in cli("approve", asked, "pay").out
    assert cli("approve", asked, "pay", "--yes", "--json").json["digest"] != before


def test_override_takes_a_file_that_fits(cli, system, here, write_skill, tmp_path):
    """A file that is no JSON, or not in the schema, changes nothing; one that fits is used, and what depends is redone."""
    schema = {"type": "object", "properties": {"n": {"type": "number"}}, "required": ["n"]}
    definition = pipeline(
        agent("first", handler="handlers:first", queue="handlers", schema=schema),
        agent("second", "first", handler="handlers:second", queue="handlers", idempotent=True),
    )
    write_skill(
        "- {id: unused}",
        "def first(ctx): return {'n': 1}\ndef second(ctx): return {'twice': ctx.inputs['first']['n'] * 2}\n",
    )
    system.start_worker()
    operations.publish(here, definition)
    run_id = operations.start(here, definition.name, {}).run_id
    system.ended(run_id)
    file = tmp_path / "output.json"
    for text, said in (
        ("{", "is not JSON"),
        ("[]", "holds no JSON object"),
        ('{"n": "much"}', "output.n breaks 'type'"),
    ):
        file.write_text(text)
        cli("override", run_id, "first", "--output", file).refuses(2, said)
    cli("override", run_id, "first", "--output", tmp_path / "gone").refuses(2, "is missing.")
    file.write_text('{"n": 21}')
    cli("override", run_id, "frist", "--output", file).refuses(2, "has no agent frist. Did you mean 'first'?")
    assert [len(step["tries"]) for step in system.run(run_id)["steps"]] == [1, 1]
    given = cli("override", run_id, "first", "--output", file, "--reason", "measured")
    assert given.code == 0
    assert "Done again, because they were given the old one: second." in given.out
    run = system.ended(run_id)
    assert run["steps"][1]["tries"][-1]["output"] == {"twice": 42}
    assert cli("override", run_id, "second", "--output", file, "--json").json["done_again"] == []


def test_override_of_a_failed_run_names_resume(cli, store, tmp_path):
    """The run stays failed: resume is what lets it go on."""
    run_id = _failed(store, code="gate_refused", details={"values": {"first.n": 0}})
    (tmp_path / "output.json").write_text('{"done": "well"}')
    given = cli("override", run_id, "first", "--output", tmp_path / "output.json")
    assert "the output of first was given by hand by" in given.out
    assert cli("resume", run_id, "--json").json["resumed"] == ["second"]


def test_cancel_ends_a_run_once(cli, store):
    """Also one that executes; then it names resume. A run that has ended is refused."""
    definition = line("first", "second")
    run_id = _begin(store, definition)
    claim(store, definition, run_id, "first")
    cancelled = cli("cancel", run_id, "--reason", "wrong customer")
    assert cancelled.code == 0
    assert cancelled.following == ["resume", str(run_id)[:8]]
    assert re.search(r"was cancelled by \S+ \(wrong customer\) at ", cli("explain", run_id).out)
    cli("cancel", run_id).refuses(2, "The run is cancelled, which does not allow it.")
    other = _begin(store, definition)
    assert cli("cancel", other, "--json").json["state"] == "cancelled"


def test_dead_letters_are_grouped_by_what_went_wrong(cli, store):
    """Count, newest, an example, and the command; what differs in numbers and ids alone is one group."""
    assert cli("dead").out == "There is no dead letter.\n"
    for number in range(3):
        _failed(store, code="timed_out", message=f"Slow after {number} s.")
    refused = _failed(store, code="gate_refused", message="It does not hold.")
    groups = cli("dead", "--json").json
    assert [(group["code"], group["count"]) for group in groups] == [("gate_refused", 1), ("timed_out", 3)]
    keys = {
        "error_fingerprint",
        "count",
        "oldest",
        "newest",
        "example",
        "run_id",
        "agent",
        "code",
        "payload",
        "command",
    }
    assert all(group.keys() == keys for group in groups)
    assert groups[0]["run_id"] == str(refused)
    assert groups[1]["command"] == "stepfast resume --failed --pipeline tested"
    shown = cli("dead")
    assert re.search(r"^ +3  tested.second  timed_out  ", shown.out, re.MULTILINE)
    assert cli(*shown.following).code == 0
    cli("dead", "--all").refuses(2, "--all belongs to `dead list`")


def test_dead_letter_is_discarded_once(cli, store):
    """It is resolved without its step being done again; the second time it says when and how."""
    run_id = _failed(store)
    (letter,) = cli("dead", "list", "--json").json
    shown = cli("dead", "discard", letter["id"][:8])
    assert re.search(r"resolved +\S+ \S+ UTC, discarded by ", shown.out)
    assert cli("explain", run_id).out.splitlines()[0] in shown.out
    assert cli("dead", "--json").json == []
    cli("dead", "discard", letter["id"]).refuses(2, "It was resolved at", "stepfast dead list")


def test_show_follows_a_run(cli, system, here, write_skill):
    """The whole history, then what comes; the exit code is the run's; with --json the document at the end."""
    write_skill("- {id: unused}", "def only(ctx): return {}\n")
    system.start_worker()
    runs = []
    for queue in ("handlers", "nobody-serves-this"):
        definition = pipeline(agent("only", handler="handlers:only", queue=queue), version=queue)
        operations.publish(here, definition)
        runs.append(operations.start(here, definition.name, {}).run_id)
    good, bad = runs
    system.ended(good)
    operations.cancel(here, bad, by="ann")
    for run_id, code in ((good, 0), (bad, 1)):
        followed = cli("show", run_id, "--follow")
        assert followed.code == code
        assert re.search(r"run +enqueued", followed.out)
        assert cli("show", run_id, "--follow", "--json").json["id"] == str(run_id)


def test_follower_of_a_suspended_run_is_told_the_command(system, asked, tmp_path):
    """At once, on standard error; then it follows on."""
    following = commanding.process("show", asked, "--follow", env=system.environ, cwd=tmp_path)
    lines = iter(following.stderr.readline, "")
    told = next(text for text in lines if text.startswith("Next: "))
    assert f"approve {str(asked)[:8]} pay" in told
    assert answer("approve", asked, "pay", "--yes", env=system.environ, cwd=tmp_path).code == 0
    following.communicate(timeout=30)
    assert following.returncode == 0


def _checks(answered) -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for check in answered.json["checks"]:
        assert check.keys() == {"name", "status", "text", "next"}
        assert check["next"] or check["status"] == "ok"
        found.setdefault(check["name"], []).append((check["status"], check["text"]))
    return found


def test_doctor_on_a_healthy_system(cli, system, here, write_skill):
    """Everything is ok, exit 0; settings are named and their values are not shown."""
    write_skill("- {id: unused}")
    system.start_worker()
    well = cli("doctor", "--json")
    assert (well.code, well.json["ok"]) == (0, True)
    checks = _checks(well)
    assert {status for found in checks.values() for status, _ in found} == {"ok"}
    assert checks.keys() == {"settings", "versions", "database", "clock", "broker", "workers", "dead letters", "runs"}
    assert "STEPFAST_BROKER_URL" in checks["settings"][0][1]
    assert "agents 0, handlers 0, stepfast.dead 0" in checks["broker"][0][1]
    assert "1 node answers" in checks["workers"][0][1]
    assert "sk-ant-test" not in well.out
    assert system.database_url not in well.out
    shown = cli("doctor").out
    assert re.search(r"^ok +clock: Postgres is 0\.\d{3} s ", shown, re.MULTILINE)


def test_doctor_says_what_is_missing(empty_database_url, tmp_path):
    """A wrong setting, a database that is not migrated, no broker: bad lines with the next command, exit 3."""
    environ = {
        "PATH": os.environ["PATH"],
        "STEPFAST_DATABASE_URL": empty_database_url,
        "STEPFAST_BROKER_URL": "redis://127.0.0.1:1/0",
        "STEPFAST_SKILLS": "/nonexistent",
    }
    ill = answer("doctor", "--json", env=environ, cwd=tmp_path)
    assert (ill.code, ill.json["ok"]) == (3, False)
    told = {check["name"]: check for check in ill.json["checks"]}
    assert {name: check["status"] for name, check in told.items()} == {
        "settings": "ok",
        "skills": "warn",
        "claude": "warn",
        "versions": "ok",
        "database": "bad",
        "broker": "bad",
    }
    assert told["database"]["next"] == "Run: stepfast migrate"
    wrong = answer("doctor", env=environ | {"STEPFAST_DATABSE_URL": "x"}, cwd=tmp_path)
    assert wrong.code == 3
    assert (
        "bad   settings: STEPFAST_DATABSE_URL is not a setting.\n      Did you mean STEPFAST_DATABASE_URL?" in wrong.out
    )


def test_doctor_finds_stuck_runs_and_missing_workers(cli, store):
    """Rule 5: what has no live lease, retry, message, person, key or run to wait for is named, with its command."""
    definition = pipeline(agent("a"), agent("b", "a"))
    healthy, stuck, lost = (_begin(store, definition) for _ in range(3))
    store.take_unsent(None, 10)
    claim(store, definition, lost, "a")  # by worker 1, which does not exist
    with store.engine.connect() as connection:
        # Nothing of them happened for a while; the first one's message is on its way.
        connection.exec_driver_sql("update stepfast.events set at = at - interval '1 minute'")
        connection.exec_driver_sql(
            f"update stepfast.steps set sent_at = sent_at - interval '1 hour' where run_id = '{stuck}' and agent = 'a'"
        )
        connection.exec_driver_sql(
            "insert into stepfast.workers (host, pid, code_version, started_at, lease_until, ended_at)"
            " values ('h', 1, 1, now(), now() - interval '1 minute', now())"
        )
    ill = cli("doctor", "--json")
    assert ill.code == 3
    told = {check["next"]: check["text"] for check in ill.json["checks"] if check["name"] == "runs"}
    assert told.keys() == {f"stepfast explain {str(run)[:8]}" for run in (stuck, lost)}
    assert f"{str(healthy)[:8]}" not in ill.out
    assert _checks(ill)["workers"] == [("bad", "none is alive")]


def test_doctor_counts_dead_letters(cli, store):
    """Open ones are a warning, and no reason to exit 3."""
    _failed(store)
    checks = _checks(cli("doctor", "--json"))
    assert checks["dead letters"][0] == ("warn", "1 wait for somebody")


def test_hostile_reasons_and_outputs_are_escaped(cli, store, tmp_path):
    """What people and agents wrote reaches the terminal as text."""
    hostile = f"\x1b]0;owned\x07 \u202e {SECRET}"
    definition = pipeline(agent("first"), agent("second", "first", requires_human_approval=True), version="h")
    run_id = _begin(store, definition, {"note": hostile})
    complete(store, definition, run_id, "first", {"text": hostile + "\n" + hostile, hostile: {"deep": [hostile]}})
    bid = claim(store, definition, run_id, "second")
    store.suspend(bid.step, bid.attempt_id, "d" * 64, {}, None)
    said = [
        cli("approve", run_id, "second"),
        cli("reject", run_id, "second", "--reason", hostile),
        cli("explain", run_id),
    ]
    (tmp_path / "o.json").write_text(json.dumps({"x": hostile}))
    said.append(cli("override", run_id, "first", "--output", tmp_path / "o.json", "--reason", hostile))
    for one in said:
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", one.out + one.err), one
        assert "verysecret" not in one.out + one.err


def test_doctor_verifies_a_run(cli, system, here, store):
    """Which of the nine rules hold of what is recorded; exit 1, with what contradicts it, where one does not."""
    definition = line("first", "second")
    run_id = _begin(store, definition)
    complete(store, definition, run_id, "first", {"done": True})
    for name in ("last", str(run_id)[:8]):
        well = cli("doctor", "--verify", name, "--json")
        assert (well.code, well.json["ok"], well.json["run"]) == (0, True, str(run_id))
        assert [(rule["rule"], rule["ok"], rule["found"]) for rule in well.json["rules"]] == [
            (number, True, []) for number in range(1, 10)
        ]
    with store.engine.connect() as connection:
        connection.exec_driver_sql("delete from stepfast.keys where agent = 'first'")
    ill = cli("doctor", "--verify", "last")
    assert ill.code == 1
    assert "bad   rule 4: One key in one generation" in ill.out
    assert "first: Attempt 1 is completed, and its key is free." in ill.out
    assert [rule["rule"] for rule in cli("doctor", "--verify", "last", "--json").json["rules"] if not rule["ok"]] == [4]


def test_doctor_refuses_to_verify_what_is_no_run(cli, system, here):
    """One sentence, and the next command."""
    refused = cli("doctor", "--verify", "ffff")
    assert (refused.code, refused.out) == (2, "")
    assert "begins with ffff" in refused.err
