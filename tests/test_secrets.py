"""Secrets, planted wherever a run can carry them, and searched for in everything that comes out."""

import json

import commanding
import psycopg
from conftest import eventually, valkey

from app import operations
from app.runs.reads import Reads

SECRETS = {
    "in a key's name": "hunter2-correct-horse",
    "of Anthropic": "sk-ant-api03-AAAAAAAAAAAAAAAAAAAAAAAA",
    "of GitHub": "ghp_0123456789abcdefghijklmnopqrstuvwxyz",
    "of AWS": "AKIAIOSFODNN7EXAMPLE",
    "in an address": "swordfish-4711",
    "marked in the schema": "the patient is Ada",
}
HANDLERS = """
    import json, sys

    def first(ctx):
        given = ctx.run.input
        print("printed", given["note"], given["url"])
        print(json.dumps({"password": given["password"]}), file=sys.stderr)
        ctx.log.info("logged " + given["note"], password=given["password"], url=given["url"])
        return {"password": given["password"], "note": given["note"], "diagnosis": given["diagnosis"]}

    def second(ctx):
        raise ValueError("cannot reach " + ctx.run.input["url"] + " with " + ctx.run.input["note"])

    def reviewed(ctx): return {}
"""
# A rendered key, a review's feedback and a request to approve are further ways out.
AGENTS = """
    - {id: first, output_schema: first, idempotent: true, idempotency_key: "{{input.diagnosis}}:{{input.password}}"}
    - id: reviewed
      depends_on: [first]
      gate: "{{first.note}} == 'never'"
      on_refused: {rerun: first, max_rounds: 1}
      failure_mode: continue
    - {id: approved, handler: handlers:reviewed, idempotent: true, depends_on: [first], requires_human_approval: true}
    - {id: second, depends_on: [reviewed], retry_policy: {max_attempts: 1}, failure_mode: continue}
"""
SCHEMA = {
    "type": "object",
    "properties": {
        "password": {"type": "string"},
        "note": {"type": "string"},
        "diagnosis": {"type": "string", "x-sensitive": True},
    },
    "required": ["password", "note", "diagnosis"],
}
GIVEN = {
    "password": SECRETS["in a key's name"],
    "note": f"{SECRETS['of Anthropic']} {SECRETS['of GitHub']} {SECRETS['of AWS']}",
    "url": f"https://ada:{SECRETS['in an address']}@example.invalid/x",
    "diagnosis": SECRETS["marked in the schema"],
}


def _found(text: str) -> list[str]:
    return [name for name, secret in SECRETS.items() if secret in text]


def test_no_secret_leaves_by_any_output(system, here, write_skill, capsys):
    """Logs, dead letters (row and message), errors and events hold none, with log_inputs and log_outputs on."""
    folder = write_skill(
        AGENTS,
        HANDLERS,
        files={"schemas/first.json": json.dumps(SCHEMA)},
    )
    file = folder / "tested.skill.yaml"
    # The input's schema marks what is sensitive in the input, as the output's does in the output.
    (folder / "schemas" / "given.json").write_text(json.dumps(SCHEMA))
    file.write_text(
        file.read_text().replace("agents:", "input_schema: given\nagents:")
        + "tracing: {enabled: true, provider: logs, log_inputs: true, log_outputs: true}\n"
    )
    system.environ["ANTHROPIC_API_KEY"] = SECRETS["of Anthropic"]
    system.start_worker()
    name = system.publish(here, folder)
    run_id = operations.start(here, name, GIVEN).run_id
    ends = {"first": "completed", "reviewed": "discarded", "approved": "suspended", "second": "discarded"}
    eventually(lambda: system.states(run_id) == ends, what="a run that waits for a person")
    assert system.run(run_id)["steps"][0]["feedback"]
    # The same key with another input is refused.
    assert system.ended(operations.start(here, name, GIVEN | {"note": "another"}).run_id)["state"] == "failed"
    letters = [entry["id"] for entry in Reads(here.store.engine).dead_letter_list()]
    assert len(letters) == 3
    with valkey(system.broker_url) as client:
        eventually(lambda: client.llen("stepfast.dead") >= len(letters), what="the letters' messages")
        assert _found(_decoded(client.lrange("stepfast.dead", 0, -1))) == []

    logs = "".join(worker.log.read_text() for worker in system.workers)
    assert "printed" in logs
    assert "logged" in logs
    assert _found(logs) == []
    with psycopg.connect(system.database_url.replace("+psycopg", "")) as connection:
        for question in (
            "select payload from stepfast.dead_letters",
            "select error from stepfast.attempts",
            "select data from stepfast.events",
        ):
            assert _found(str(connection.execute(question).fetchall())) == [], question
    _search(commanding.in_process(capsys), run_id, letters)


def _search(cli, run_id, letters):
    for command in (
        ["show", str(run_id)],
        ["show", str(run_id), "--json"],
        ["explain", str(run_id)],
        ["explain", "last"],
        ["approve", str(run_id), "approved"],
        ["resume", "last", "--plan"],
        ["show", str(run_id), "--timeline"],
        ["show", str(run_id), "--timeline", "--json"],
        *(["show", str(run_id), "--agent", agent] for agent in ("first", "approved", "reviewed", "second")),
        ["show", str(run_id), "--agent", "first", "--json"],
        ["diff", str(run_id), "last"],
        ["diff", str(run_id), "last", "--json"],
        ["report"],
        ["report", "--json"],
        ["runs", "--stuck"],
        *(["dead", "show", letter] for letter in letters),
        ["runs", "--json"],
        ["dead"],
        ["dead", "list", "--json"],
    ):
        said = cli(*command)
        # Nobody can be asked here: it shows what it would ask for.
        assert said.code == (2 if command[0] == "approve" else 0), said
        assert _found(said.out + said.err) == [], command


def _decoded(messages: list[bytes]) -> str:
    import base64

    return "".join(base64.b64decode(json.loads(message)["body"]).decode() for message in messages)
