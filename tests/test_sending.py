"""A step's message goes the short way to Redis. It is the one that Celery's own way would send."""

import json
from base64 import b64decode
from uuid import uuid4

import pytest
from celery import chain, group, signals
from conftest import valkey

from app.execution import canvas
from app.execution.task_events import Dispatcher
from app.pipelines import loader

LINE = """
    - {id: a}
    - {id: b, depends_on: [a]}
    - {id: c, depends_on: [b]}
"""
HANDLERS = "def a(ctx): return {}\ndef b(ctx): return {}\ndef c(ctx): return {}\n"
OF_EACH_MESSAGE = ("id", "root_id", "correlation_id", "delivery_tag", "group", "group_id", "task_id", "uuid")


@pytest.fixture
def app(here):
    from app.celery import celery

    celery.loader.import_default_modules()
    return celery


@pytest.fixture
def waiting(system):
    """What stands in the queue of handlers, decoded, oldest first; and the queue's server."""
    with valkey(system.broker_url) as client:

        def read():
            found = [json.loads(entry) for entry in reversed(client.lrange("handlers", 0, -1))]
            client.delete("handlers")
            return [entry | {"body": json.loads(b64decode(entry["body"]))} for entry in found]

        read.server = client
        yield read


def alike(value):
    """Without what differs from message to message."""
    if isinstance(value, dict):
        return {name: "…" if name in OF_EACH_MESSAGE and entry else alike(entry) for name, entry in value.items()}
    return [alike(entry) for entry in value] if isinstance(value, list | tuple) else value


def signatures(write_skill):
    found = loader.load(write_skill(LINE, HANDLERS), aliases={}, handler_modules=())
    run = uuid4()
    one, two, three = (canvas.signature(found, run, name) for name in "abc")
    # As a worker reads them from a message.
    read = canvas.Signature.from_dict(json.loads(json.dumps(two)))
    rest = json.loads(json.dumps([three]))
    return {
        "one": one.apply_async,
        "chain": chain(one, two, three).apply_async,
        "group": group(chain(one, two), three).apply_async,
        "next": lambda: read.apply_async((None,), chain=rest, parent_id="P", root_id="R", priority=None),
    }


@pytest.mark.parametrize("how", ["one", "chain", "group", "next"])
def test_message_and_event_are_those_of_celery(app, waiting, write_skill, monkeypatch, how):
    """Field for field but for ids: what a worker, Flower, and whoever looks into Redis, read."""
    told, ways = [], []
    monkeypatch.setattr(Dispatcher, "publish", lambda _, kind, fields, *__, **___: told.append((kind, fields)))
    short = app._send_step
    monkeypatch.setattr(app, "_send_step", lambda *args, **options: ways.append(how) or short(*args, **options))
    send = signatures(write_skill)[how]
    send()
    quick, quick_told = waiting(), list(told)
    assert ways == [how] * len(quick)
    told.clear()
    ways.clear()

    def listens(**_):
        """With somebody who listens, Celery's own way is taken."""

    signals.before_task_publish.connect(listens)
    try:
        send()
    finally:
        signals.before_task_publish.disconnect(listens)
    usual = waiting()
    assert ways == []
    assert len(usual) == len(quick) == (2 if how == "group" else 1)
    assert alike(quick) == alike(usual)
    assert list(quick[0]["headers"]) == list(usual[0]["headers"])
    assert alike(quick_told) == alike(told)
    assert [kind for kind, _ in told] == ["task-sent"] * len(quick)


def test_result_names_what_was_sent(app, waiting, write_skill):
    """As Celery's does."""
    found = loader.load(write_skill(LINE, HANDLERS), aliases={}, handler_modules=())
    result = canvas.signature(found, uuid4(), "a").apply_async()
    (message,) = waiting()
    assert (message["headers"]["id"], result.ignored) == (result.id, True)


@pytest.mark.parametrize(
    "options", [{"countdown": 60}, {"serializer": "yaml"}, {"priority": 3}, {"expires": 9}, {"ignore_result": False}]
)
def test_whatever_else_is_asked_for_goes_the_way_of_celery(app, write_skill, monkeypatch, options):
    """A delay, another serializer, a priority, a result: what the short way does not know of, it leaves alone."""
    found = loader.load(write_skill(LINE, HANDLERS), aliases={}, handler_modules=())
    monkeypatch.setattr(app, "_send_step", lambda *_, **__: pytest.fail("the short way was taken"))
    canvas.signature(found, uuid4(), "a").apply_async(**options)


def test_connection_that_was_lost_is_made_anew(app, waiting, write_skill):
    """The broker drops what stands idle: the next message arrives all the same, once."""
    found = loader.load(write_skill(LINE, HANDLERS), aliases={}, handler_modules=())
    task = canvas.signature(found, uuid4(), "a")
    task.apply_async()
    waiting()
    waiting.server.client_kill_filter(_type="normal", skipme=True)
    task.apply_async()
    assert len(waiting()) == 1
