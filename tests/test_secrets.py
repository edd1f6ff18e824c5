"""Secrets, planted wherever a run can carry them, and searched for in everything that comes out."""

import json
import subprocess

import psycopg
import redis
from commanding import STEPFAST
from conftest import ROOT, eventually

from app import operations

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
"""
SCHEMA = {
    "type": "object",
    "properties": {
        "password": {"type": "string"},
        "note": {"type": "string"},
        "diagnosis": {"type": "string", "x-sensitive": True},
    },
}
GIVEN = {
    "password": SECRETS["in a key's name"],
    "note": f"{SECRETS['of Anthropic']} {SECRETS['of GitHub']} {SECRETS['of AWS']}",
    "url": f"https://ada:{SECRETS['in an address']}@example.invalid/x",
    "diagnosis": SECRETS["marked in the schema"],
}


def _found(text: str) -> list[str]:
    return [name for name, secret in SECRETS.items() if secret in text]


def test_no_secret_leaves_by_any_output(system, here, write_skill):
    """Logs, dead letters (row and message), errors and events hold none, with log_inputs and log_outputs on."""
    folder = write_skill(
        "- {id: first, output_schema: first}\n- {id: second, depends_on: [first], retry_policy: {max_attempts: 1}}",
        HANDLERS,
        files={"schemas/first.json": json.dumps(SCHEMA)},
    )
    file = folder / "tested.skill.yaml"
    # The input's schema marks what is sensitive in the input, as the output's does in the output.
    (folder / "schemas" / "given.json").write_text(
        json.dumps({"type": "object", "properties": {"diagnosis": {"type": "string", "x-sensitive": True}}})
    )
    file.write_text(
        file.read_text().replace("agents:", "input_schema: given\nagents:")
        + "tracing: {enabled: true, provider: logs, log_inputs: true, log_outputs: true}\n"
    )
    system.environ["ANTHROPIC_API_KEY"] = SECRETS["of Anthropic"]
    system.start_worker()
    name = system.publish(here, folder)
    run = system.ended(operations.start(here, name, GIVEN).run_id)
    assert run["state"] == "failed"
    path, _, number = system.broker_url.removeprefix("redis+socket://").partition("?virtual_host=")
    with redis.Redis(unix_socket_path=path, db=int(number)) as client:
        eventually(lambda: client.llen("stepfast.dead"), what="the dead letter's message")
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
    for command in (
        ["show", "last"],
        ["show", "last", "--json"],
        ["runs", "--json"],
        ["dead"],
        ["dead", "list", "--json"],
    ):
        done = subprocess.run(
            [STEPFAST, *command],
            cwd=ROOT,
            env=system.environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in {0, 1}, done.stderr
        assert _found(done.stdout + done.stderr) == [], command


def _decoded(messages: list[bytes]) -> str:
    import base64

    return "".join(base64.b64decode(json.loads(message)["body"]).decode() for message in messages)
