"""The connections to the model: shared by calls after one another, as many as calls at once, closed where idle."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from conftest import eventually
from working import GOOD, settings_for, work

from app.agents import claude, transport
from app.errors import Unavailable
from app.simulator.script import parse
from app.simulator.server import Simulator


@pytest.fixture
def ask():
    """Calls the simulator, which answers by the one rule given."""
    claude.warm_up()
    with Simulator(seed=7) as simulator:

        def ask(rule=None):
            if rule:
                simulator.use(parse({"rules": [rule]}))
            return claude.call(work(timeout_ms=20_000), settings_for(simulator.url))

        yield ask
        claude.close()


@pytest.fixture
def made(monkeypatch):
    """The sockets of the connections that are made."""
    sockets = []
    connect = transport._Network.connect_tcp

    def noted(*args, **options):
        stream = connect(*args, **options)
        sockets.append(stream.get_extra_info("socket"))
        return stream

    monkeypatch.setattr(transport._Network, "connect_tcp", noted)
    return sockets


def test_calls_after_one_another_share_a_connection(ask, made):
    """Also after an error, whose answer is read to its end."""
    for rule in ({"reply": GOOD}, {"status": 529}, {"reply": GOOD}):
        with suppress(Unavailable):
            ask(rule)
    assert len(made) == 1


def test_idle_connections_are_closed_by_later_calls(ask, made, monkeypatch):
    """What a burst of calls left is closed once it was idle for too long, and not used again."""
    monkeypatch.setattr(transport, "IDLE_MAX_S", 0.1)
    together = threading.Barrier(10)

    def call(_):
        together.wait(20)
        return ask()

    assert ask({"reply": GOOD, "delay_ms": 300}).output == GOOD
    with ThreadPoolExecutor(10) as pool:
        assert all(answer.output == GOOD for answer in pool.map(call, range(10)))
    assert len(made) > 2
    ask({"reply": GOOD})
    eventually(lambda: ask() and sum(known.fileno() != -1 for known in made) == 1, what="one connection")
    claude.close()
    assert all(known.fileno() == -1 for known in made)
