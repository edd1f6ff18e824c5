"""The commands, on real servers: what they print, their keys, their exit codes."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import commanding
import pytest
from commanding import answer, complete, give_up, process
from pipelines import agent, line, pipeline

from app.cli.main import COMMANDS
from app.embedded import running
from app.runs.database import engine
from app.runs.orders import Orders
from app.runs.store import Ending, Paid, Store

RUN_KEYS = {"id", "pipeline", "state", "partial", "tenant", "key", "created_at", "started_at", "ended_at"}
DOCUMENT_KEYS = RUN_KEYS | {
    *("input", "labels", "priority", "concurrency_key", "deadline_at", "pipeline_hash", "version", "steps", "totals"),
    *("approvals", "blocked_by"),
}
STEP_KEYS = {
    *("run_id", "agent", "item", "state", "generation", "depends_on", "queue", "max_worker_losses", "attempt_id"),
    *("attempts", "failures", "worker_losses", "waits", "rounds", "feedback", "failure_mode"),
    *("scheduled_at", "sent_at", "sends", "ended_at", "tries", "snapshots", "stale_reruns"),
}
TRY_KEYS = {
    *("run_id", "id", "agent", "item", "generation", "number", "state", "worker_id", "decided_by", "repeatable"),
    *("code_hash", "key", "inputs_hash", "reads", "started_at", "deadline_at", "ended_at", "output", "output_hash"),
    *(
        "reused_from",
        "model",
        "request_id",
        "usage",
        "cost_usd",
        "error",
        "error_fingerprint",
        "overstayed_at",
        "observed",
        "stale_reads",
    ),
}
DEAD_KEYS = {
    *("id", "run_id", "agent", "item", "generation", "attempt_id", "code", "error_fingerprint", "payload"),
    *("created_at", "published_at", "resolved_at", "resolution", "resolved_by"),
}
PAID = Paid("claude-sonnet-5-5", "req_1", {"input_tokens": 1_200, "output_tokens": 34}, 0.0123)
HOSTILE = "\x1b]0;owned\x07\x1b[2J[bold red]markup[/] \u202edesrever sk-ant-api03-verysecretindeed"


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """`stepfast` inside this process; each call gives a `commanding.Answer`."""
    monkeypatch.setenv("STEPFAST_HOME", str(tmp_path / "home"))
    return commanding.in_process(capsys)


@pytest.fixture
def store(system, here):
    """The test's own store: a command closes that of the process."""
    opened = engine(system.database_url, pool_max=1)
    yield Store(opened)
    opened.dispose()


def _begin(store, definition, run_input=None):
    store.publish(definition)
    return store.enqueue(definition.name, run_input or {})[0]


def _failed(store, **error):
    """A run of two agents, of which the second is given up."""
    definition = line("first", "second")
    run_id = _begin(store, definition)
    complete(store, definition, run_id, "first", {"done": True}, PAID)
    give_up(store, definition, run_id, "second", **error)
    return run_id


def test_help_waits_for_no_library(tmp_path):
    """`stepfast --help` lists every command within 0.3 s, and imports none of the heavy packages."""
    code = (
        "import sys; from app.cli.main import main; assert main(['--help']) == 0;"
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert not {"sqlalchemy", "celery", "kombu", "anthropic", "psycopg", "rich", "structlog", "yaml"} & set(
        told.stderr.split()
    )
    assert all(f"\n  {name} " in told.stdout for name in COMMANDS)
    times = []
    for _ in range(3):
        before = _children_cpu_s()
        assert answer("--help", cwd=tmp_path).code == 0
        times.append(_children_cpu_s() - before)
    assert min(times) < 0.3


def _children_cpu_s():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_migrate_says_where_the_database_is(cli, empty_database_url, monkeypatch):
    """`migrate` may be repeated, and gives the migrations' numbers before and after."""
    monkeypatch.setenv("STEPFAST_DATABASE_URL", empty_database_url)
    assert cli("migrate", "--json").json == {"before": None, "after": "0001"}
    assert cli("migrate", "--json").json == {"before": "0001", "after": "0001"}
    assert "already" in cli("migrate").out


def test_new_audit_publish(cli, here, tmp_path):
    """A starter skill is valid as it is written; `publish` stores it once."""
    folder = tmp_path / "greeting"
    written = cli("new", folder)
    assert written.code == 0
    assert written.following == ["audit", f"{folder}/greeting.skill.yaml"]
    cli("new", folder).refuses(2, "exists already")
    audited = cli("audit", folder, "--json")
    assert (audited.code, audited.err) == (0, "")
    assert audited.json.keys() == {"skill", "ok", "name", "version", "hash", "canvas", "findings"}
    assert audited.json["ok"]
    assert cli("publish", folder, "--json").json.keys() == {"name", "version", "hash", "new"}
    assert cli("publish", folder, "--json").json["new"] is False
    assert "greeting" in cli("publish", folder).out


def test_audit_says_every_fault_and_what_to_type_next(cli, write_skill):
    """A lone file lacks what `new --from` writes; then it is valid, and its canvas is shown."""
    folder = write_skill(
        "- {id: a, model: claude-sonnet-5-5, output_schema: answer}\n- {id: b, depends_on: [a], model: nope, queue: 7}"
    )
    file = folder / "tested.skill.yaml"
    audited = cli("audit", file)
    assert audited.code == 2
    assert audited.out.count(": error: ") >= 4
    assert all(": error: " not in line or line.startswith(str(folder)) for line in audited.out.splitlines())
    assert audited.following == ["audit", str(file)]
    refused = cli("audit", file, "--json")
    assert (refused.code, refused.json["ok"], refused.json["canvas"]) == (2, False, [])
    assert "error" in {finding["severity"] for finding in refused.json["findings"]}

    write_skill("- {id: a, model: claude-sonnet-5-5, output_schema: answer}\n- {id: b, depends_on: [a]}")
    assert cli("audit", folder).following == ["new", "--from", str(file)]
    assert cli("new", "--from", file).following == ["audit", str(file)]
    audited = cli("audit", folder)
    assert audited.code == 0
    assert "  chain(a, b)\n" in audited.out
    assert "Nothing is missing" in cli("new", "--from", file).out
    # A function that a file of the author's lacks is named, and left to the author.
    handlers = file.parent / "handlers.py"
    handlers.write_text(handlers.read_text().replace("def b(", "def c("))
    lacking = cli("new", "--from", file)
    assert (lacking.code, lacking.following) == (2, ["audit", str(file)])
    assert "has no function 'b'" in lacking.out


def test_runs_lists_the_newest_first(cli, store):
    """`runs` filters by state and pipeline, is limited, and has stable keys."""
    failed = _failed(store)
    pending = _begin(store, pipeline(agent("only"), version="2"), {"n": 1})
    listed = cli("runs", "--json").json
    assert [run["id"] for run in listed] == [str(pending), str(failed)]
    assert all(run.keys() == RUN_KEYS | {"labels", "steps", "completed", "cost_usd"} for run in listed)
    assert [run["id"] for run in cli("runs", "--json", "--state", "failed").json] == [str(failed)]
    assert len(cli("runs", "--json", "--limit", "1").json) == 1
    assert cli("runs", "--json", "--pipeline", "other").json == []
    shown = cli("runs").out.splitlines()
    assert shown[0].split() == ["run", "pipeline", "state", "steps", "started", "time", "cost"]
    assert shown[2].split()[:4] == [str(failed)[:8], "tested", "failed", "1/2"]
    assert max(map(len, shown)) <= 80


def test_show_gives_stable_keys(cli, store):
    """`show --json` is the read model, `show` the same for people, within 80 columns."""
    run_id = _failed(store)
    document = cli("show", "last", "--json").json
    assert document.keys() == DOCUMENT_KEYS
    assert all(step.keys() == STEP_KEYS for step in document["steps"])
    assert all(entry.keys() == TRY_KEYS for step in document["steps"] for entry in step["tries"])
    assert document["totals"].keys() == {"calls", "cost_usd", "input_tokens", "output_tokens"}
    shown = cli("show", str(run_id)[:12]).out
    assert re.search(r"^first +completed +1 +\d\.\d s +1,200 +34 +\$0\.0123 *$", shown, re.MULTILINE)
    assert "cost      $0.0123, 1 call" in shown
    table, _, _ = shown.rpartition("\n\n")
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize(
    ("code", "following"),
    [
        ("timed_out", "resume {run}"),
        ("account_problem", "resume {run}"),
        ("gate_refused", "resume {run} --from first"),
        ("author_mistake", "override {run} second --output FILE"),
        ("outcome_unknown", "dead show {letter}"),
    ],
)
def test_failed_run_names_its_reason_and_the_next_command(cli, store, code, following):
    """What a resume can mend is resumed; anything else by what mends it; and where nobody knows, somebody looks."""
    run_id = _failed(store, code=code, message="It did not go well.")
    letter = cli("dead", "list", "--json").json[0]["id"]
    shown = cli("show", run_id)
    assert f"\nsecond was given up after 1 attempt ({code}): It did not go well. " in shown.out
    assert " ".join(shown.following) == following.format(run=str(run_id)[:8], letter=letter[:8])


def test_show_says_what_is_waited_for(cli, store):
    """A step that waits says why, and a step that nobody takes asks for workers."""
    definition = pipeline(agent("only"))
    run_id = _begin(store, definition)
    assert "No worker has taken only yet" in cli("show", run_id).out
    bid = commanding.claim(store, definition, run_id, "only")
    error = {"code": "unavailable", "who": "retry", "message": "Overloaded.", "next_step": "", "details": {}}
    store.fail(bid.step, bid.attempt_id, error, Paid(), Ending("retry", retry_ms=60_000))
    assert re.search(r"only failed \(unavailable\) and waits until [\d:]{8} UTC: Overloaded\.", cli("show", run_id).out)


def test_dead_letters_are_listed_and_shown(cli, store):
    """`dead list` lists what waits for somebody, `dead show` says everything; both have stable keys."""
    assert cli("dead", "list", "--json").json == []
    assert cli("dead", "list").out == "There is no dead letter.\n"
    run_id = _failed(store, details={"gate": "{{a.b}} > 1", "values": {"a.b": 0}}, next_step="Look at it.")
    (letter,) = cli("dead", "list", "--json").json
    assert letter.keys() == DEAD_KEYS
    assert letter["run_id"] == str(run_id)
    explained = cli("explain", run_id, "--json").json["text"]
    assert cli("dead", "show", letter["id"][:8], "--json").json == letter | {"explanation": explained}
    shown = cli("dead", "show", letter["id"]).out
    assert '"a.b": 0' in shown
    assert "Look at it." in shown
    assert cli("dead", "list").following == ["dead", "show", letter["id"][:8]]
    Orders(store.engine).resume(run_id, "me")
    assert cli("dead", "list", "--json").json == []
    assert cli("dead", "list", "--all", "--json").json[0]["resolution"] == "resumed"


def test_nothing_hostile_or_secret_reaches_the_terminal(cli, store):
    """Control characters, markup and secrets in what agents said are shown as text, or hidden."""
    definition = pipeline(
        agent("teller", schema={"properties": {"pin": {"x-sensitive": True}}}),
        agent("last", "teller"),
        input_schema={"properties": {"door": {"x-sensitive": True}}},
    )
    run_id = _begin(store, definition, {"door": "sesame", "note": HOSTILE})
    complete(store, definition, run_id, "teller", {"pin": "1234567", "said": HOSTILE})
    give_up(store, definition, run_id, "last", message=HOSTILE, details={"saw": HOSTILE})
    letter = cli("dead", "list", "--json").json[0]["id"]
    for arguments in (
        *(["show", run_id], ["show", run_id, "--follow"], ["explain", run_id], ["resume", run_id, "--plan"], ["runs"]),
        *(["dead"], ["dead", "list"], ["dead", "show", letter], ["resume", "--failed", "--plan"], ["doctor"]),
    ):
        for as_json in ([], ["--json"]):
            said = cli(*arguments, *as_json)
            assert said.code == (1 if "--follow" in arguments else 0)
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said.out + said.err)
            assert not re.search(r"verysecret|1234567|sesame", said.out + said.err)
    assert "\\x1b[2J[bold red]markup[/] \\u202edesrever [redacted]" in cli("show", run_id).out


def test_run_starts_what_is_published_or_a_file(cli, here, write_skill):
    """A file is published and started; its name starts it again; one key gives one run."""
    folder = write_skill("- {id: only}", "def only(ctx): return {}\n")
    document = cli("run", folder, "--input", "n=1", "--json").json
    assert document.keys() == DOCUMENT_KEYS | {"created"}
    assert (document["state"], document["input"], document["created"]) == ("pending", {"n": 1}, True)
    started = cli("run", "tested", "--key", "k")
    assert started.code == 0
    assert re.match(r"Started tested as run [0-9a-f-]{36}\.\n", started.out)
    assert started.following[0] == "show"
    assert cli("run", "tested", "--key", "k", "--json").json["created"] is False
    assert "has started run" in cli("run", "tested", "--key", "k").out
    cli("run", "tested", "--key", "k", "--input", "n=2").refuses(2, "belongs to run")


def test_runs_are_started_listed_and_shown_by_tenant_label_and_priority(cli, here, write_skill):
    """What is asked for at the start is stored, filtered by, and shown; what is none is refused."""
    folder = write_skill("- {id: only}", "def only(ctx): return {}\n")
    options = ("--priority", 7, "--tenant", "acme", "--label", "team=shop", "--label", "why=a = b")
    run = cli("run", folder, *options, "--json").json
    labels = {"team": "shop", "why": "a = b"}
    assert (run["priority"], run["tenant"], run["labels"]) == (7, "acme", labels)
    other = cli("run", "tested", "--json").json["id"]
    for narrowed in (["--tenant", "acme"], ["--label", "team=shop"], ["--label", "why=a = b", "--label", "team=shop"]):
        assert [found["id"] for found in cli("runs", *narrowed, "--json").json] == [run["id"]]
    assert cli("runs", "--label", "team=bank").out.startswith("There is no such run.")
    shown = cli("show", run["id"]).out
    for field in ("tenant    acme", "priority  7", "labels    team=shop, why=a = b"):
        assert f"\n{field}\n" in shown
    assert "priority" not in cli("show", other).out
    cli("run", "tested", "--priority", 10).refuses(2, "10 is not in the range 0<=x<=9")
    cli("run", "tested", "--label", "team").refuses(2, "--label 'team' is no key=value.")
    cli("runs", "--label", "a=1", "--label", "a=2").refuses(2, "--label gives 'a' twice.")


def test_values_of_inputs(cli, here, write_skill, tmp_path):
    """JSON where it is JSON, otherwise text; a file's text is never JSON; a JSON file gives all its fields."""
    folder = write_skill("- {id: only}", "def only(ctx): return {}\n")
    (tmp_path / "text").write_text("12")
    (tmp_path / "all.json").write_text('{"x": [1], "y": null}')
    given = [
        "a=1.5",
        "b=true",
        'c={"d": [null]}',
        'e="12"',
        "f=plain = text",
        "g=NaN",
        "h=",
        "i=[1",
        f"j=@{tmp_path}/text",
    ]
    options = [part for text in [*given, f"@{tmp_path}/all.json"] for part in ("--input", text)]
    assert cli("run", folder, *options, "--json").json["input"] == {
        "a": 1.5,
        "b": True,
        "c": {"d": [None]},
        "e": "12",
        "f": "plain = text",
        "g": "NaN",
        "h": "",
        "i": "[1",
        "j": "12",
        "x": [1],
        "y": None,
    }


FAILS_ONCE = """
def first(ctx): return {}
def second(ctx):
    import pathlib
    if not pathlib.Path(ctx.run.input["mended"]).exists():
        raise RuntimeError("not mended")
    return {}
"""


def test_watch_follows_to_the_end_and_resume_goes_on(cli, system, here, write_skill, tmp_path):
    """A failed run exits 1 and names `resume`, which continues at the step that failed, and exits 0."""
    folder = write_skill(
        "- {id: first}\n- {id: second, depends_on: [first], retry_policy: {max_attempts: 1}}", FAILS_ONCE
    )
    system.start_worker()
    failed = cli("run", folder, "--input", f"mended={tmp_path}/mended", "--watch")
    assert failed.code == 1
    lines = failed.out.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d  first {13}claimed {10}attempt 1", lines[2])
    assert "not mended" in lines[-2]
    assert failed.following[0] == "resume"
    (tmp_path / "mended").touch()
    resumed = cli(*failed.following, "--watch")
    assert resumed.code == 0
    assert "goes on with second." in resumed.out
    assert "first" not in resumed.out
    assert resumed.following[0] == "show"
    cli("resume", "last").refuses(2, "The run is completed")


def test_watch_with_json_prints_one_document(cli, system, here, write_skill, tmp_path):
    """The document is the run as it ended; the exit code says how."""
    folder = write_skill(
        "- {id: first}\n- {id: second, depends_on: [first], retry_policy: {max_attempts: 1}}", FAILS_ONCE
    )
    system.start_worker()
    failed = cli("run", folder, "--input", f"mended={tmp_path}/mended", "--watch", "--json")
    assert (failed.code, failed.json["state"]) == (1, "failed")
    (tmp_path / "mended").touch()
    resumed = cli("resume", "last", "--watch", "--json")
    assert (resumed.code, resumed.json["state"], resumed.json["resumed"]) == (0, "completed", ["second"])
    assert resumed.json.keys() == DOCUMENT_KEYS | {"resumed"}


def test_interrupted_watch_leaves_the_run_alone(system, write_skill, tmp_path):
    """Ctrl-C while watching says that the run goes on, and exits 130."""
    folder = write_skill("- {id: only}", "def only(ctx): return {}\n")
    watching = process("run", folder, "--watch", env=system.environ, cwd=tmp_path)
    lines = [watching.stdout.readline() for _ in range(2)]
    assert lines[0].startswith("Started tested as run ")
    watching.send_signal(signal.SIGINT)
    _, err = watching.communicate(timeout=30)
    assert watching.returncode == 130
    assert re.search(r"goes on\.\nNext: \S+ show [0-9a-f]{8}$", err.strip())
    assert "Traceback" not in err
    assert answer("runs", "--json", env=system.environ, cwd=tmp_path).json[0]["state"] == "pending"


def test_termination_unwinds(system, write_skill, tmp_path):
    """TERM and HUP end a command as Ctrl-C does, by its own clean-up, and quietly."""
    folder = write_skill("- {id: only}", "def only(ctx): return {}\n")
    for number in (signal.SIGTERM, signal.SIGHUP):
        watching = process("run", folder, "--watch", env=system.environ, cwd=tmp_path)
        watching.stdout.readline()
        watching.send_signal(number)
        _, err = watching.communicate(timeout=30)
        assert watching.returncode == 128 + number
        assert "Traceback" not in err


def test_closed_pipe_is_quiet(system, store, tmp_path):
    """`stepfast runs | head -1` says nothing about its pipe."""
    definition = line("only")
    for _ in range(300):
        _begin(store, definition)
    running = process("runs", "--limit", "1000", "--json", env=system.environ, cwd=tmp_path)
    assert running.stdout.read(1) == "["
    running.stdout.close()
    with running.stderr as stream:
        assert stream.read() == ""
    assert running.wait(30) == 141


def test_simulator_is_served(tmp_path):
    """`simulate` prints its address, and ends by Ctrl-C with 0."""
    serving = process("simulate", "--seed", "3", env={}, cwd=tmp_path)
    assert re.fullmatch(r"Claude simulator: http://127\.0\.0\.1:\d+\n", serving.stdout.readline())
    serving.send_signal(signal.SIGINT)
    _, err = serving.communicate(timeout=30)
    assert (serving.returncode, err) == (0, "")


def test_logs_go_to_standard_error(cli, here, write_skill):
    """Standard output is the answer; what happened is a JSON line on standard error."""
    folder = write_skill("- {id: only}", "def only(ctx): return {}\n")
    told = cli("run", folder, "--json")
    events = [json.loads(text)["event"] for text in told.err.splitlines()]
    assert "run.enqueued" in events
    assert Path(folder).name == told.json["pipeline"]


def test_embedded_run_needs_nothing_else(cli, write_skill, tmp_path):
    """One command starts servers and workers, runs to the end, and leaves nothing running; the run can be looked at."""
    folder = write_skill("- {id: first}\n- {id: second, depends_on: [first]}", FAILS_ONCE)
    environ = {"PATH": os.environ["PATH"], "STEPFAST_HOME": str(tmp_path / "home")}
    (tmp_path / "mended").touch()
    ended = answer("run", folder, "--input", f"mended={tmp_path}/mended", "--embedded", env=environ, cwd=tmp_path)
    assert ended.code == 0, ended
    assert ended.following[0] == "show"
    assert running(tmp_path / "home") == {}
    shown = cli(*ended.following)
    assert shown.code == 0
    assert re.search(r"^second +completed", shown.out, re.MULTILINE)
    assert cli("runs", "--embedded", "--json").json[0]["completed"] == 2
    assert running(tmp_path / "home") == {}
