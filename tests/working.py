"""What the agents' tests share: one attempt's work, a record of effects in memory, and the events that were emitted."""

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from deploying import Memory

from app import events
from app.agents import handlers
from app.agents.handlers import Handler
from app.agents.work import Work
from app.clock import Deadline
from app.pipelines.model import Agent, Prompt
from app.settings import Settings

RUN = UUID("3f2a9c1e-7b1d-4c55-9a3e-0d6f1b2c3d4e")
KEY = "sk-ant-test-0123456789abcdef"
SCHEMA = {
    "type": "object",
    "properties": {"verdict": {"enum": ["good", "bad"]}, "score": {"type": "number", "minimum": 0, "maximum": 1}},
    "required": ["verdict", "score"],
    "additionalProperties": False,
}
GOOD = {"verdict": "good", "score": 0.5}
PROMPT = Prompt("You judge.", "Judge the text.")


def work(*, given=None, outputs=None, timeout_ms=10_000, run=RUN, **fields) -> Work:
    """An attempt at an agent of a model, or of the `handler` that is named."""
    values = {"schema": SCHEMA, "prompt": PROMPT, "model": "claude-sonnet-5-5", "timeout_ms": timeout_ms} | fields
    if "handler" in fields:
        values |= {"model": None, "schema": fields.get("schema"), "prompt": None}
    agent = Agent("judge", **values)
    return Work(
        run_id=run,
        attempt_id=UUID(int=1),
        pipeline="tested",
        agent=agent,
        generation=1,
        number=1,
        input={"issue": "it breaks"} if given is None else given,
        outputs=outputs or {},
        deadline=Deadline.after_ms(timeout_ms),
    )


def order(**fields) -> Work:
    """An attempt at an agent of a handler, one that may be repeated."""
    return work(**{"handler": "handlers:judge", "idempotent": True} | fields)


def call_handler(function, *, effects=None, settings=None, repeatable=False, **fields):
    """The output of a function, called as a handler."""
    handler = Handler(function, "0" * 64, repeatable)
    return handlers.call(handler, order(**fields), effects or Memory(), settings or Settings()).output


def settings_for(url: str, **fields) -> Settings:
    return Settings(anthropic_base_url=url, **{"anthropic_api_key": KEY, **fields})


@contextmanager
def emitting() -> Iterator[list]:
    """Every event inside, as (event, fields)."""
    found = []

    def note(event, fields):
        found.append((event, dict(fields)))

    events.subscribe(note)
    try:
        yield found
    finally:
        events._subscribers.remove(note)
