"""Bad input and missing servers: one clear sentence, what to do next, an exit code, nothing lost, never a traceback."""

import os
import stat
from pathlib import Path

import commanding
import pytest
from commanding import answer
from pipelines import agent, pipeline

from app.runs.database import engine
from app.runs.store import Store

NOWHERE_DATABASE = "postgresql://127.0.0.1:1/none"
NOWHERE_BROKER = "redis://127.0.0.1:1/0"
OUTPUT = str(Path(__file__).parent / "data/output.json")
DATABASE_COMMANDS = (
    *(["runs"], ["show", "last"], ["explain", "last"], ["cancel", "last"], ["dead"], ["dead", "list"]),
    *(
        ["resume", "last", "--plan"],
        ["resume", "--failed", "--plan"],
        ["diff", "last", "last"],
        ["report"],
        ["migrate"],
    ),
)
SENDING_COMMANDS = (
    *(["run", "tested"], ["resume", "last"], ["resume", "--failed"], ["approve", "last", "a"]),
    *(["reject", "last", "a", "--reason", "no"], ["override", "last", "a", "--output", OUTPUT]),
)


@pytest.fixture
def cli(capsys, monkeypatch, tmp_path):
    """`stepfast` inside this process; each call gives a `commanding.Answer`."""
    monkeypatch.setenv("STEPFAST_HOME", str(tmp_path / "home"))
    return commanding.in_process(capsys)


@pytest.fixture
def skill(write_skill):
    return write_skill("- {id: only}", "def only(ctx): return {}\n")


def _run_count(cli) -> int:
    return len(cli("runs", "--json").json)


@pytest.mark.parametrize("command", [*DATABASE_COMMANDS, *SENDING_COMMANDS], ids=" ".join)
def test_no_database(cli, monkeypatch, command):
    """Not named, not reachable, not Postgres: the variable is named, and the exit code is 3."""
    monkeypatch.setenv("STEPFAST_BROKER_URL", NOWHERE_BROKER)
    cli(*command).refuses(3, "STEPFAST_DATABASE_URL is not set.", "--embedded")
    monkeypatch.setenv("STEPFAST_DATABASE_URL", NOWHERE_DATABASE)
    cli(*command).refuses(3, "Postgres cannot be used: ", "STEPFAST_DATABASE_URL")
    for url in ("mysql://h/x", "postgresql://h:port/x"):
        monkeypatch.setenv("STEPFAST_DATABASE_URL", url)
        cli(*command).refuses(3, "STEPFAST_DATABASE_URL is not a Postgres URL.")


@pytest.mark.parametrize("command", SENDING_COMMANDS, ids=" ".join)
def test_no_broker_is_named(cli, here, monkeypatch, command):
    """Without its variable nothing is started."""
    monkeypatch.delenv("STEPFAST_BROKER_URL")
    cli(*command).refuses(3, "STEPFAST_BROKER_URL is not set.", "--embedded")


@pytest.mark.parametrize(
    "url", [NOWHERE_BROKER, "amqp://guest:hidden@127.0.0.1:1//", "nonsense://h/", "redis://h:port"]
)
def test_broker_that_is_away(system, skill, tmp_path, url):
    """It is tried before anything is started, its password is not shown, and no run is left behind."""
    environ = system.environ | {"STEPFAST_BROKER_URL": url}
    refused = answer("run", skill, env=environ, cwd=tmp_path)
    refused.refuses(3, "The broker cannot be reached: ", "STEPFAST_BROKER_URL")
    assert "hidden" not in refused.err
    assert answer("runs", "--json", env=environ, cwd=tmp_path).json == []


def test_database_that_is_not_migrated(cli, empty_database_url, monkeypatch):
    """Says `stepfast migrate`."""
    monkeypatch.setenv("STEPFAST_DATABASE_URL", empty_database_url)
    for command in DATABASE_COMMANDS[:-1]:
        cli(*command).refuses(3, "no Stepfast tables", "stepfast migrate")


def test_database_that_is_too_new(cli, system, monkeypatch):
    """A database that asks for newer code is left alone."""
    monkeypatch.setenv("STEPFAST_DATABASE_URL", system.database_url)
    opened = engine(system.database_url, pool_max=1)
    with opened.connect() as connection:
        connection.exec_driver_sql("update stepfast.meta set min_code_version = 99")
    opened.dispose()
    for command in DATABASE_COMMANDS[:-1]:
        cli(*command).refuses(3, "asks for code version 99", "Upgrade Stepfast.")


def test_run_that_is_not_named_well(cli, system, here):
    """Unknown, ambiguous, no id at all, or no run yet: exit 2, and what to do."""
    cli("show", "last").refuses(2, "There is no run yet.", "stepfast run SKILL")
    opened = engine(system.database_url, pool_max=1)
    store = Store(opened)
    definition = pipeline(agent("only"))
    store.publish(definition)
    first = {str(store.enqueue(definition.name, {})[0])[0] for _ in range(17)}
    opened.dispose()
    assert len(first) <= 16  # so one digit begins two ids
    said = [cli("show", digit) for digit in "0123456789abcdef"]
    ambiguous = next(each for each in said if "Several" in each.err)
    ambiguous.refuses(2, "Several begin with", "Give more of the id.")
    cli("show", "0" * 32).refuses(2, "No run has an id", "stepfast runs")
    cli("resume", "nonsense").refuses(2, "'nonsense' is no run's id.", "stepfast runs")
    cli("show", "\x1b[2J").refuses(2, r"is no run's id")
    cli("dead", "show", "0123").refuses(2, "No dead letter has an id", "stepfast dead")
    cli("dead", "show").refuses(2, "take the ID")
    cli("dead", "discard").refuses(2, "take the ID")
    cli("dead", "list", "0123").refuses(2, "take none")


def test_pipeline_that_is_not_published(cli, here, skill, monkeypatch):
    """A name that nobody published says `stepfast publish`; a folder of that name is run as a path."""
    cli("run", "nobody").refuses(2, "No pipeline is published as nobody.", "stepfast publish SKILL")
    monkeypatch.chdir(skill.parent)
    cli("run", skill.name).refuses(2, "No pipeline is published", f"stepfast run ./{skill.name}")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("no pair", "is no key=value."),
        ("=value", "is no key=value."),
        ("big=@big", "is larger than 1000000 bytes"),
        ("nul=@nul", "input.nul holds a NUL byte."),
        (r'nul="\u0000"', "input.nul holds a NUL byte."),
        (r'half="\ud800"', "input.half holds a lone surrogate"),
        ("half=\udcff", "input.half holds a lone surrogate"),
        ("far=1e999", "input.far is inf, which is no JSON."),
        ("gone=@gone", "The input file gone is missing."),
        ("near=@bigg", "Did you mean 'big'?"),
        ("folder=@.", "The input file . is not a regular file."),
        ("pipe=@pipe", "The input file pipe is not a regular file."),
        ("bytes=@bytes", "The input file bytes, line 2, column 3, is not UTF-8"),
        ("@list.json", "holds no JSON object"),
        ("@nul", "is not JSON"),
        ("@deep.json", "is not JSON"),
        ("@", "The input file . is not a regular file."),
    ],
)
def test_bad_input(cli, here, skill, tmp_path, monkeypatch, given, said):
    """What Postgres or JSON would refuse is refused first, by name; no run is left behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "big").write_bytes(b"x" * 1_000_001)
    (tmp_path / "nul").write_bytes(b"a\0b")
    (tmp_path / "bytes").write_bytes(b"ok\nab\xff")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    os.mkfifo(tmp_path / "pipe")
    cli("run", skill, "--input", given).refuses(2, said)
    assert _run_count(cli) == 0


def test_too_much_input(cli, here, skill, tmp_path):
    """A megabyte in several parts is refused as a whole; one key may be given once."""
    (tmp_path / "half").write_text("x" * 600_000)
    cli("run", skill, "--input", f"a=@{tmp_path}/half", "--input", f"b=@{tmp_path}/half").refuses(
        2, "The input has 1,200", "STEPFAST_INPUT_MAX_BYTES"
    )
    cli("run", skill, "--input", "a=1", "--input", "a=2").refuses(2, "--input gives 'a' twice.")
    assert _run_count(cli) == 0


@pytest.mark.parametrize("command", ["audit", "publish", "run"])
def test_skill_that_cannot_be_read(cli, here, tmp_path, command):
    """Missing, a folder without one, not UTF-8: the fault is shown, with the file."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff")
    for name in ("gone.yaml", "empty", "bytes.yaml"):
        said = cli(command, tmp_path / name)
        assert said.code == 2
        assert str(tmp_path / name) in said.out + said.err
        assert "Traceback" not in said.out + said.err


def test_wrong_words(cli):
    """The nearest command, option or choice is named."""
    cli("rnus").refuses(2, "No such command 'rnus'. Did you mean 'runs'?", "stepfast --help")
    cli("runs", "--jsn").refuses(2, "No such option '--jsn'. Did you mean '--json'?", "stepfast runs --help")
    cli("runs", "--state", "done").refuses(2, "'completed'")
    cli("runs", "--limit", "0").refuses(2, "--limit")
    cli("show").refuses(2, "Missing argument 'RUN'")
    cli("run", "x", "--simulate").refuses(2, "--simulate needs --embedded")
    cli("new", "folder", "--from", "file").refuses(2, "--from completes")


def test_embedded_asks_for_one_thing(cli, write_skill, monkeypatch):
    """Nothing falls back: no simulator unless asked for, and no embedded servers beside named ones."""
    folder = write_skill("- {id: a, model: claude-sonnet-5-5, output_schema: answer}")
    cli("new", "--from", folder)
    cli("run", folder, "--embedded").refuses(3, "ANTHROPIC_API_KEY is not set.", "--simulate")
    monkeypatch.setenv("STEPFAST_BROKER_URL", NOWHERE_BROKER)
    for command in (["run", folder, "--simulate"], ["resume", "last"], ["runs"], ["show", "last"], ["dead"]):
        cli(*command, "--embedded").refuses(2, "STEPFAST_BROKER_URL names another", "leave --embedded out")


def test_wrong_setting(cli, monkeypatch):
    """A misspelled or bad variable is named, with the nearest good one."""
    monkeypatch.setenv("STEPFAST_DATABSE_URL", "x")
    cli("runs").refuses(3, "STEPFAST_DATABSE_URL is not a setting.", "STEPFAST_DATABASE_URL")


def test_errors_as_json(cli):
    """With --json an error is the one document on standard output."""
    said = cli("runs", "--json")
    assert said.code == 3
    assert said.json.keys() == {"error"}
    assert said.json["error"] == {
        "message": "STEPFAST_DATABASE_URL is not set.",
        "next_step": said.json["error"]["next_step"],
    }
    assert cli("runs", "--jsno", "--json").json["error"]["next_step"] == "See: stepfast runs --help"


def test_own_bug_is_one_sentence(cli, here, monkeypatch, tmp_path):
    """A bug of ours says so, keeps its traceback, without secrets, in a private file, and exits 1."""
    from app.runs.reads import Reads

    def broken(*_arguments, **_options):
        raise ZeroDivisionError("sk-ant-api03-verysecretindeed")

    monkeypatch.setattr(Reads, "run_list", broken)
    said = cli("runs")
    assert said.code == 1
    assert said.err.startswith(
        "Error: This is a bug in Stepfast: ZeroDivisionError: [redacted]\nPlease report it, with "
    )
    (kept,) = (tmp_path / "home").glob("bug-*.txt")
    assert str(kept) in said.err
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    text = kept.read_text()
    assert "Traceback" in text
    assert "verysecret" not in text


def test_from_a_folder_with_foreign_modules(system, skill, tmp_path):
    """A user's own app.py, celeryconfig.py and migrations in the current folder are not ours, and are not run."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for name in ("app.py", "celeryconfig.py", "migrations.py", "click.py", "stepfast.py"):
        (folder / name).write_text("raise SystemExit('foreign code was run')\n")
    started = answer("run", skill, "--json", env=system.environ, cwd=folder)
    assert started.code == 0, started
    assert started.json["state"] == "pending"
    assert answer("migrate", env=system.environ, cwd=folder).code == 0
    assert answer("runs", env=system.environ, cwd=folder).code == 0
    # Nor is what stands on PYTHONPATH, where a team's own handler modules may be.
    on_path = tmp_path / "on_path"
    on_path.mkdir()
    (on_path / "app.py").write_text("raise SystemExit('foreign code was run')\n")
    assert answer("runs", env=system.environ | {"PYTHONPATH": str(on_path)}, cwd=tmp_path).code == 0


def test_folder_that_cannot_be_written(cli, tmp_path):
    """`new` in a place that is a file says which."""
    (tmp_path / "file").touch()
    cli("new", tmp_path / "file" / "skill").refuses(2, "cannot be written")


def test_terminal_that_cannot_show_a_letter(system, skill, tmp_path):
    """Letters outside the terminal's encoding become escapes, not an error."""
    environ = system.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    said = answer("run", "ü", env=environ, cwd=tmp_path)
    said.refuses(2, "\\xfc")
