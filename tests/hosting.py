"""What the tests of `stepfast`, the client, share: a pipeline, a host's database, and hosts that die or meet no broker."""

import socket
import threading
import uuid
from contextlib import contextmanager

import psycopg

# A worker that starts nothing but what it gets a message for, as long as a test lasts.
UNSWEPT = {"STEPFAST_SWEEP_S": "600", "STEPFAST_LEASE_S": "2000"}
AGENTS = """
    - {id: check, output_schema: checked}
    - {id: ship, depends_on: [check], requires_human_approval: true}
"""
HANDLERS = """
    def check(ctx):
        if ctx.run.input.get("broken"):
            raise ValueError("the shop is closed")
        return {"order": ctx.run.input["order"]}

    def ship(ctx):
        return {"shipped": ctx.inputs["check"]["order"]}
"""
FILES = {
    "schemas/checked.json": '{"type": "object", "properties": {"order": {"type": "integer"}}, "required": ["order"], '
    '"additionalProperties": false}',
    "schemas/order.json": '{"type": "object", "properties": {"order": {"type": "integer"}, "broken": {"type": "boolean"}},'
    ' "required": ["order"], "additionalProperties": false}',
}


def publish(system, here, write_skill, *, approval: bool = False) -> str:
    """A pipeline of two handlers, whose input must be {"order": integer}."""
    agents = AGENTS if approval else AGENTS.replace(", requires_human_approval: true", "")
    agents = agents.replace("output_schema: checked", "output_schema: checked, retry_policy: {max_attempts: 1}")
    folder = write_skill(agents, HANDLERS, files=FILES)
    file = folder / "tested.skill.yaml"
    file.write_text(file.read_text() + "input_schema: order\n")
    return system.publish(here, folder)


def plain(url: str) -> str:
    """A URL as psycopg and Django know it."""
    return url.replace("+psycopg", "")


def fetch(url: str, query: str, *values: object) -> list[tuple]:
    """Rows, on a connection of its own."""
    with psycopg.connect(plain(url), autocommit=True) as connection:
        return connection.execute(query, values).fetchall()


@contextmanager
def role(database_url: str, rights: str):
    """A URL of the same database for a role of its own, with these rights; the role is dropped after."""
    from app.runs.database import allow

    name = f"role_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(plain(database_url), autocommit=True) as connection:
        connection.execute(f"create role {name} login")
        allow(database_url, {name: rights})
        head, _, rest = plain(database_url).partition("://postgres@")
        try:
            yield f"{head}://{name}@{rest}"
        finally:
            connection.execute(f"drop owned by {name} cascade")
            connection.execute(f"drop role {name}")


@contextmanager
def silent_broker():
    """A port that takes connections and never answers: a broker that hangs."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        taken = []
        stop = threading.Event()

        def take():
            while not stop.is_set():
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=take)
        thread.start()
        try:
            yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"
        finally:
            stop.set()
            with socket.socket() as last:
                last.connect(server.getsockname())
            thread.join()
            for one in taken:
                one.close()
