"""The read cache of outputs: what it saves, and that nothing that happens to it costs a re-run or a wrong output."""

import hashlib
import json
import zlib

import pytest
from conftest import valkey
from sqlalchemy import event, text
from working import emitting

from app.errors import NotReady
from app.execution.executor import execute
from app.runs.database import engine
from app.runs.invariants import check
from app.runs.output_cache import COMPRESSED_FROM_BYTES, OutputCache, as_postgres_spells
from app.runs.store import StepKey

SKILL = "- {id: a, idempotent: true}\n- {id: b, depends_on: [a], idempotent: true}\n- {id: c, depends_on: [b]}"
HANDLERS = """
    def a(ctx): return {"text": "é" * ctx.run.input.get("size", 3), "n": [1, 2.5, None], "longer key": {"b": 1, "aa": True}}
    def b(ctx): return {"a": ctx.inputs["a"]}
    def c(ctx): return {"a": ctx.inputs["a"], "b": ctx.inputs["b"]}
"""


@pytest.fixture
def client(broker_url):
    with valkey(broker_url) as connected:
        yield connected


@pytest.fixture
def cached(system, monkeypatch, write_skill, statements):
    """The process as a worker with a cache, a pipeline that asks for it, and what each step cost."""
    system.environ["STEPFAST_REDIS_URL"] = system.broker_url
    with system.here(monkeypatch) as here:
        folder = write_skill(SKILL, HANDLERS)
        file = folder / "tested.skill.yaml"
        file.write_text(file.read_text() + "checkpointing: {store: redis, ttl_minutes: 5}\n")
        yield _Cached(here, system.publish(here, folder), statements)


class _Cached:
    def __init__(self, here, name, statements):
        self.here, self.name, self.statements = here, name, statements

    def start(self, **given):
        self.run, _ = self.here.store.enqueue(self.name, given)
        self.hash = self.here.store.take_unsent(self.run, 1)[0].pipeline_hash

    def step(self, agent):
        """Executes it. Returns how many statements that took beside its claim and its commit."""
        self.here.definition(self.hash)
        assert self.here.worker_id
        self.statements.clear()
        assert execute(self.here, StepKey(self.run, agent), self.hash).state == "completed"
        return len(self.statements) - 2

    def output(self, agent):
        with self.here.store.engine.connect() as connection:
            found = connection.execute(
                text("select output, output_hash from stepfast.attempts where run_id = :r and agent = :a"),
                {"r": self.run, "a": agent},
            ).all()
            assert check(connection, self.run) == []
        (row,) = found  # one attempt: nothing was done again
        return row.output


def test_outputs_come_from_the_cache(cached, client):
    """Filled after the commit, with the file's ttl; then a step costs no statement more than without it."""
    cached.start()
    assert [cached.step(agent) for agent in "abc"] == [0, 0, 0]
    assert cached.output("c")["b"] == {"a": cached.output("a")} == {"a": cached.output("c")["a"]}
    names = client.keys("stepfast:output:*")
    assert len(names) == 3
    assert all(0 < client.ttl(name) <= 300 for name in names)


@pytest.mark.parametrize(
    "harm",
    [
        lambda client, names: client.flushdb(),
        lambda client, names: client.delete(names[0]),
        lambda client, names: [client.set(name, b'-{"text": "forged"}') for name in names],
        lambda client, names: [client.set(name, b"z" + b"no zlib") for name in names],
        lambda client, names: [client.set(name, b"") for name in names],
    ],
    ids=["wiped", "expired", "forged", "broken", "empty"],
)
def test_whatever_happens_to_the_cache_is_a_miss(cached, client, harm):
    """One statement more reads Postgres, fills the cache again, and nothing is done twice."""
    cached.start()
    cached.step("a")
    cached.step("b")
    harm(client, client.keys("stepfast:output:*"))
    assert cached.step("c") == 1
    assert cached.output("c")["a"] == cached.output("a")
    assert len(client.keys("stepfast:output:*")) == 3


def test_outputs_that_nobody_gives_fail_their_attempt(cached, client, monkeypatch):
    """Where the cache misses and Postgres stays away, the attempt fails as any other does, and another one is made."""
    monkeypatch.setattr("app.execution.cached.OUTAGE_MAX_S", 0.001)
    cached.start()
    cached.step("a")
    client.flushdb()
    store, cuts = cached.here.store, [1]

    def cut(connection, cursor, statement, *_):
        if "from stepfast.attempts where run_id" in statement and cuts:
            cuts.pop()
            pid = connection.connection.dbapi_connection.info.backend_pid
            with store.engine.connect() as other:
                other.execute(text("select pg_terminate_backend(:pid, 5000)"), {"pid": pid})

    event.listen(store.engine, "before_cursor_execute", cut)
    assert execute(cached.here, StepKey(cached.run, "b"), cached.hash).error == "handler_failed"
    with store.engine.connect() as connection:
        error = connection.execute(text("select error->>'message' from stepfast.attempts where state = 'failed'"))
        assert "terminating connection" in error.scalar_one()
        connection.execute(
            text("update stepfast.steps set state = 'available', scheduled_at = null where state = 'retryable'")
        )
    assert cached.step("b") == 1


def test_large_outputs_are_compressed(cached, client):
    """In the cache by us, from 256 KiB on; in Postgres by Postgres."""
    cached.start(size=COMPRESSED_FROM_BYTES)
    assert [cached.step(agent) for agent in "ab"] == [0, 0]
    assert all(client.strlen(name) < COMPRESSED_FROM_BYTES / 10 for name in client.keys("stepfast:output:*"))
    with cached.here.store.engine.connect() as connection:
        sizes = connection.execute(
            text("select octet_length(output::text), pg_column_size(output) from stepfast.attempts")
        )
        assert all(whole > 2 * COMPRESSED_FROM_BYTES and stored < COMPRESSED_FROM_BYTES / 10 for whole, stored in sizes)
    assert cached.output("b")["a"] == cached.output("a")


def test_redis_that_is_away_is_said_once_and_slows_nothing(system, monkeypatch, write_skill, statements):
    """Every step reads Postgres meanwhile."""
    system.environ["STEPFAST_REDIS_URL"] = "redis://127.0.0.1:1/0"
    with system.here(monkeypatch) as here, emitting() as told:
        folder = write_skill(SKILL, HANDLERS)
        file = folder / "tested.skill.yaml"
        file.write_text(file.read_text() + "checkpointing: {store: redis}\n")
        cached = _Cached(here, system.publish(here, folder), statements)
        cached.start()
        assert [cached.step(agent) for agent in "abc"] == [0, 1, 1]
        assert cached.output("c")["a"] == cached.output("a")
        assert len([fields for name, fields in told if name == "checkpoint.cache_away"]) == 1


def test_address_that_is_none_is_refused(system, monkeypatch):
    """A worker that cannot have what it is told to have does not start without it."""
    system.environ["STEPFAST_REDIS_URL"] = "postgresql://somewhere"
    with pytest.raises(NotReady, match="STEPFAST_REDIS_URL is not a Redis URL"), system.here(monkeypatch):
        pass


def test_pipeline_that_does_not_ask_uses_no_cache(system, monkeypatch, write_skill, client, statements):
    """`store: postgres`, the default, whatever the worker has."""
    system.environ["STEPFAST_REDIS_URL"] = system.broker_url
    with system.here(monkeypatch) as here:
        cached = _Cached(here, system.publish(here, write_skill(SKILL, HANDLERS)), statements)
        cached.start()
        assert [cached.step(agent) for agent in "ab"] == [0, 0]
        assert client.keys("stepfast:output:*") == []


@pytest.mark.parametrize(
    "output",
    [
        {},
        {"b": 1, "a": 2, "aa": 3, "B": 4, "é": 5, "zz": 6},
        {"n": [0, -1, 1.5, 0.1, 100000.0, True, None], "s": 'a"\\/\n\t\x01\x7fé\u2028😀'},
        {"deep": [{"list": [[], {}]}]},
    ],
)
def test_spelling_is_that_of_postgres(database_url, output):
    """Otherwise nothing would be found: the hash is of Postgres's text."""
    opened = engine(database_url, pool_max=1)
    with opened.connect() as connection:
        spelt = connection.execute(
            text("select cast(cast(:o as jsonb) as text)"), {"o": json.dumps(output)}
        ).scalar_one()
    opened.dispose()
    assert as_postgres_spells(output).decode() == spelt


def test_entry_cannot_unfold_without_end(broker_url, client):
    """A small entry that unfolds into a large text is cut, and so is a miss."""
    bomb = b'{"a": "' + b"x" * 10_000_000 + b'"}'
    client.set("stepfast:output:bomb", b"z" + zlib.compress(bomb))
    cache = OutputCache(broker_url, max_bytes=1_000)
    assert cache.get({"bomb": hashlib.sha256(bomb).hexdigest()}) == {}
    cache.close()
